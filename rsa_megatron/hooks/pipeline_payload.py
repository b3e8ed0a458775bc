"""What the last stage of a pipeline must know from those before it: a few extra rows at the end of the hidden state.

v is made on the first stage, the loss on the last. Between stages Megatron sends one tensor [S, B, H] forward
and its gradient back. v is appended to it as K rows a sample and taken off again before any layer sees them, so
that Megatron's own backward pass brings dL/dv to the first stage, in any schedule. So do the sums of caption states of
layers that stages on the way have (--rsa-layers): each has its place, zeros until its stage puts it there.

One row of numbers a sample: [hi | lo | id | start | mask | zeros | count | width], cut into rows of width H.
    hi, lo  the vector in the pipeline's type, and what that rounding lost. hi alone keeps 8 bits of it in bf16, and the
            distance of two nearby vectors is a difference in which those are gone; hi + lo keeps 16. The
            gradient goes through hi alone: lo is a constant. An fp32 pipeline needs no lo.
    id      the 8 bytes of the sample's id, each exact even in bf16, so that the last stage can tell whether it
            reads the same samples as the first.
    start   where in its row the copy of the sample's caption begins, in 4 bytes (isolated_captions.py); 0 without one.
    mask    which positions of the row are the caption's, 8 to a byte: for stages on the way, which read no data. Only
            where they need it: of no length otherwise.
    count   how many samples are packed into the row, in two bytes; 0 where each row is one sample. Stages that read no data learn
            from it how many payload rows there are.
    width   F in three bytes, the last three numbers: stages without a tower learn it, and so K, from what they receive.

Rows of one sample have theirs beside one another, [K, B, H]. Samples packed into one row have theirs one after the other, the K of
the first sample first: [n * K, 1, H].

Shapes: B samples (n of them where they are packed into one row), F width of the vector, H width of the hidden state, K rows a sample,
S positions and payload rows of what a stage receives, L positions that the mask tells of.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

_NUM_ID_BYTES, _NUM_START_BYTES, _NUM_COUNT_BYTES, _NUM_WIDTH_BYTES = 8, 4, 2, 3


class PipelinePayload(NamedTuple):
    """What the rows of one micro-batch hold."""

    #: [B, F] float32, differentiable
    vector_BF: Tensor
    #: [B] int64 each
    sample_id_B: Tensor
    start_B: Tensor
    #: [B, L] int64, 0 or 1; L may be 0
    mask_BL: Tensor


def num_rows(vector_width: int, hidden_width: int, dtype: torch.dtype, mask_length: int = 0) -> int:
    """K: how many rows of width H carry a vector of width F and what goes with it."""
    num_bytes = _NUM_ID_BYTES + _NUM_START_BYTES + math.ceil(mask_length / 8) + _NUM_COUNT_BYTES + _NUM_WIDTH_BYTES
    return math.ceil((vector_width * _num_parts(dtype) + num_bytes) / hidden_width)


def num_rows_received(
    received_SBH: Tensor, vector_width: int, mask_positions_per_row: int = 0, num_packed: int = 0
) -> int:
    """How many rows at the end of a hidden state are payload: K, or n * K behind n packed samples.

    Args:
        mask_positions_per_row: positions that the mask tells of for each of the other rows: 0 without a mask, else as many
            ranks as share the sequence. K depends on L then, and L = that times (S - n * K) on K: K grows by one where L
            grows by 8 H, so that one K alone fits.
        num_packed: n, as the payload says it (`num_packed_samples`); 0 where each row is one sample.
    """
    num_received, _, hidden_width = received_SBH.shape
    for k in itertools.count(1):
        num_payload = k * max(num_packed, 1)
        mask_length = (num_received - num_payload) * mask_positions_per_row
        if k == num_rows(vector_width, hidden_width, received_SBH.dtype, max(mask_length, 0)):
            return num_payload
        if num_payload >= num_received:
            raise RuntimeError(
                f"{num_received} rows hold no payload of a vector of width {vector_width}: do all stages have "
                "RSA's hooks, and the same --rsa-* flags?"
            )


def pack(payload: PipelinePayload, hidden_width: int, dtype: torch.dtype, *, in_one_row: bool = False) -> Tensor:
    """Rows to append, in `dtype`; differentiable with respect to the vector.

    Args:
        in_one_row: the samples are packed into one row: [n * K, 1, H]. Else each is a row: [K, B, H].
    """
    vector_BF, sample_id_B, start_B, mask_BL = payload
    vector_BF = vector_BF.float()
    batch_size, vector_width = vector_BF.shape
    hi_BF = vector_BF.to(dtype)
    parts = [hi_BF]
    if _num_parts(dtype) == 2:
        parts.append((vector_BF - hi_BF.float()).detach().to(dtype))
    parts.append(_to_bytes(sample_id_B, _NUM_ID_BYTES).to(dtype))
    parts.append(_to_bytes(start_B, _NUM_START_BYTES).to(dtype))
    parts.append(_bits_to_bytes(mask_BL).to(dtype))
    k = num_rows(vector_width, hidden_width, dtype, mask_BL.shape[1])
    num_zeros = k * hidden_width - sum(part.shape[1] for part in parts) - _NUM_COUNT_BYTES - _NUM_WIDTH_BYTES
    parts.append(hi_BF.new_zeros(batch_size, num_zeros))
    for number, num_bytes in ((batch_size * in_one_row, _NUM_COUNT_BYTES), (vector_width, _NUM_WIDTH_BYTES)):
        parts.append(_to_bytes(torch.full_like(sample_id_B, number), num_bytes).to(dtype))
    rows = torch.cat(parts, dim=1)
    return rows.view(-1, 1, hidden_width) if in_one_row else rows.view(batch_size, k, hidden_width).transpose(0, 1)


def vector_width(received_SBH: Tensor) -> int:
    """F, from a hidden state that ends in payload rows. Waits for the device: ask once, F does not change."""
    return int(_from_bytes(received_SBH[-1, :1, -_NUM_WIDTH_BYTES:]))


def num_packed_samples(received_SBH: Tensor) -> int:
    """How many samples are packed into the row of a hidden state that ends in payload rows; 0 where each row is one sample.

    Waits for the device, for a row of its own alone: of several rows none is packed.
    """
    if received_SBH.shape[1] > 1:
        return 0
    last_row = received_SBH[-1, :, :-_NUM_WIDTH_BYTES]
    return int(_from_bytes(last_row[:, -_NUM_COUNT_BYTES:]))


def unpack(rows_KBH: Tensor, vector_width: int, mask_length: int = 0, num_packed: int = 0) -> PipelinePayload:
    """The inverse of `pack`; num_packed: n, as the payload says it."""
    num_parts = _num_parts(rows_KBH.dtype)
    row_BN = rows_KBH.reshape(num_packed, -1) if num_packed else rows_KBH.transpose(0, 1).flatten(1)
    vector_BF = row_BN[:, :vector_width].float()
    if num_parts == 2:
        vector_BF = vector_BF + row_BN[:, vector_width : 2 * vector_width].detach().float()
    sizes = [_NUM_ID_BYTES, _NUM_START_BYTES, math.ceil(mask_length / 8)]
    id_Bn, start_Bn, mask_Bn = row_BN[:, num_parts * vector_width :][:, : sum(sizes)].split(sizes, dim=1)
    return PipelinePayload(
        vector_BF, _from_bytes(id_Bn), _from_bytes(start_Bn), _bytes_to_bits(mask_Bn)[:, :mask_length]
    )


def _num_parts(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.float32 else 2


def _to_bytes(number_B: Tensor, num_bytes: int) -> Tensor:
    return (number_B[:, None] >> _shifts(number_B, num_bytes)) & 255


def _from_bytes(bytes_Bn: Tensor) -> Tensor:
    bytes_Bn = bytes_Bn.detach().long()
    return (bytes_Bn << _shifts(bytes_Bn, bytes_Bn.shape[1])).sum(dim=1)


def _shifts(like: Tensor, num_bytes: int) -> Tensor:
    return torch.arange(0, 8 * num_bytes, 8, device=like.device)


def _bits_to_bytes(mask_BL: Tensor) -> Tensor:
    bits_Bn8 = torch.nn.functional.pad(mask_BL.long(), (0, -mask_BL.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bits_Bn8 << torch.arange(8, device=mask_BL.device)).sum(dim=2)


def _bytes_to_bits(bytes_Bn: Tensor) -> Tensor:
    bits_Bn8 = bytes_Bn.detach().long()[:, :, None] >> torch.arange(8, device=bytes_Bn.device)
    return (bits_Bn8 & 1).flatten(1)
