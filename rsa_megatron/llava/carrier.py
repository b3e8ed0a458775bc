"""The image vectors' way through the pipeline: a few extra rows at the end of the hidden state.

v is made on the first stage, the loss on the last. Between stages Megatron sends one tensor [S, B, H] forward
and its gradient back. v is appended to it as K rows a sample and taken off again before any layer sees them, so
that Megatron's own backward pass brings dL/dv to the first stage, in any schedule.

One row of numbers a sample: [hi | lo | id | start | zeros | width], cut into rows of width H.
    hi, lo  v in the pipeline's type, and what that rounding lost. hi alone keeps 8 bits of v in bf16, and the
            distance of two nearby vectors is a difference in which those are gone; hi + lo keeps 16. The
            gradient goes through hi alone: lo is a constant. An fp32 pipeline needs no lo.
    id      the 8 bytes of the sample's id, each exact even in bf16, so that the last stage can tell whether it
            reads the same samples as the first.
    start   where in its row the copy of the sample's caption begins, in 4 bytes (caption_copies.py); 0 without one.
    width   D in two bytes, the last two numbers: stages without a tower learn it, and so K, from what they receive.

Shapes: B samples, D width of v, H width of the hidden state, K rows.
"""

import math

import torch
from torch import Tensor

_NUM_ID_BYTES, _NUM_START_BYTES, _NUM_WIDTH_BYTES = 8, 4, 2


def num_rows(vector_width: int, hidden_width: int, dtype: torch.dtype) -> int:
    """K: how many rows of width H carry a vector of width D and what goes with it."""
    num_bytes = _NUM_ID_BYTES + _NUM_START_BYTES + _NUM_WIDTH_BYTES
    return math.ceil((vector_width * _num_parts(dtype) + num_bytes) / hidden_width)


def pack(v_BD: Tensor, sample_id_B: Tensor, start_B: Tensor, hidden_width: int, dtype: torch.dtype) -> Tensor:
    """Rows to append, [K, B, H] in `dtype`; differentiable with respect to v."""
    v_BD = v_BD.float()
    batch_size, vector_width = v_BD.shape
    hi_BD = v_BD.to(dtype)
    parts = [hi_BD]
    if _num_parts(dtype) == 2:
        parts.append((v_BD - hi_BD.float()).detach().to(dtype))
    parts.append(_to_bytes(sample_id_B, _NUM_ID_BYTES).to(dtype))
    parts.append(_to_bytes(start_B, _NUM_START_BYTES).to(dtype))
    k = num_rows(vector_width, hidden_width, dtype)
    num_zeros = k * hidden_width - sum(part.shape[1] for part in parts) - _NUM_WIDTH_BYTES
    width_B = torch.full_like(sample_id_B, vector_width)
    parts += [hi_BD.new_zeros(batch_size, num_zeros), _to_bytes(width_B, _NUM_WIDTH_BYTES).to(dtype)]
    return torch.cat(parts, dim=1).view(batch_size, k, hidden_width).transpose(0, 1)


def vector_width(received_SBH: Tensor) -> int:
    """D, from a hidden state that ends in carrier rows. Waits for the device: ask once, D does not change."""
    return int(_from_bytes(received_SBH[-1, :1, -_NUM_WIDTH_BYTES:]))


def unpack(rows_KBH: Tensor, vector_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack`: v, [B, D] in float32 and differentiable, the sample ids and the starts, [B] each."""
    num_parts = _num_parts(rows_KBH.dtype)
    row_BF = rows_KBH.transpose(0, 1).flatten(1)
    v_BD = row_BF[:, :vector_width].float()
    if num_parts == 2:
        v_BD = v_BD + row_BF[:, vector_width : 2 * vector_width].detach().float()
    bytes_BF = row_BF[:, num_parts * vector_width :]
    id_B = _from_bytes(bytes_BF[:, :_NUM_ID_BYTES])
    return v_BD, id_B, _from_bytes(bytes_BF[:, _NUM_ID_BYTES : _NUM_ID_BYTES + _NUM_START_BYTES])


def _num_parts(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.float32 else 2


def _to_bytes(number_B: Tensor, num_bytes: int) -> Tensor:
    return (number_B[:, None] >> _shifts(number_B, num_bytes)) & 255


def _from_bytes(bytes_Bn: Tensor) -> Tensor:
    bytes_Bn = bytes_Bn.detach().long()
    return (bytes_Bn << _shifts(bytes_Bn, bytes_Bn.shape[1])).sum(dim=1)


def _shifts(like: Tensor, num_bytes: int) -> Tensor:
    return torch.arange(0, 8 * num_bytes, 8, device=like.device)
