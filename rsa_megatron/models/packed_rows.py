"""A packed row: several samples one behind the other, each a sequence that attends to itself alone, on every pipeline stage.

Stages between the first and the last read no data. Without the bounds their attention would run on from sample to sample, and no
log would show it. So each stage tells the next: a few rows behind the hidden state hold a bit for each position of the row, set at
the last one of each sequence. What stands behind the last of them is padding. A row without any is not packed.

Eight bits go into one number, which bf16, fp16 and fp32 hold exactly.

Shapes: B rows, L positions of the decoder's row, of which a rank has P (all of them, or its part under sequence parallelism), K rows
of bounds, m sequences, H width of the hidden state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

_BITS = 8


@dataclass
class PackedRowParams(PackedSeqParams):
    """Megatron's parameters of a packed row, with the sequences' lengths as numbers, for which no layer waits for a device."""

    #: of the samples' sequences; the rest of the row is padding
    sequence_lengths: tuple[int, ...] = ()


def make_packed_seq_params(
    sequence_lengths: Sequence[int] | Tensor,
    row_length: int,
    device: torch.device | str | None = None,
    *,
    context_parallel_size: int = 1,
) -> PackedRowParams:
    """Make what the decoder's layers need to know of a row of m sequences.

    The row's padding is one more sequence: rotary positions and Transformer Engine's kernels take bounds that end where the row ends.
    The longest sequence, not the row, is what max_seqlen says: Megatron takes a table of rotary positions that is as long as the row
    for positions of the whole row, in which no sequence begins anew.

    Args:
        sequence_lengths: positions of each sequence in order, images spliced in, [m].
        row_length: L, positions of the decoder's row.
        context_parallel_size: ranks that share each sequence. Transformer Engine divides it into twice as many parts and rounds down: a
            sequence that is no multiple would be attended to wrongly without a word (TransformerEngine #3331).

    Raises:
        ValueError: a sequence has no positions, or is no such multiple, or they do not fit into the row.
    """
    lengths = tuple(map(int, sequence_lengths))
    if not lengths or min(lengths) < 1:
        raise ValueError(f"a packed row needs sequences of one position or more, and has {list(lengths)}")
    num_padding = row_length - sum(lengths)
    if num_padding < 0:
        raise ValueError(f"a packed row's sequences have {sum(lengths)} positions, and the row only {row_length}")
    parts = [*lengths, *[num_padding] * (num_padding > 0)]
    num_parts = 2 * context_parallel_size if context_parallel_size > 1 else 1
    if any(part % num_parts for part in parts):
        raise ValueError(
            f"under --context-parallel-size {context_parallel_size} each sequence of a packed row, and its padding, is to be a multiple "
            f"of {num_parts} positions, and they have {parts}"
        )
    bounds = torch.tensor([0, *parts]).cumsum(0).to(torch.int32).to(device)
    return PackedRowParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(parts),
        max_seqlen_kv=max(parts),
        # LLaVAModel and Transformer Engine ask for them under context parallelism. Being the same, they say that there is no padding.
        cu_seqlens_q_padded=bounds if num_parts > 1 else None,
        cu_seqlens_kv_padded=bounds if num_parts > 1 else None,
        # Said, because Transformer Engine would compare bounds on the device in each layer to find it out.
        pad_between_seqs=False,
        sequence_lengths=lengths,
    )


def count_bounds_rows(row_length: int, hidden_width: int) -> int:
    """Return K."""
    return math.ceil(row_length / (_BITS * hidden_width))


def put_on_bounds(hidden_PBH: Tensor, packed: PackedRowParams | None, num_rows: int) -> Tensor:
    """Return the hidden state with K rows behind it, [P + K, B, H], on each rank that has a part of it; None: the rows are not packed."""
    _, batch_size, width = hidden_PBH.shape
    if packed is None:
        return torch.cat([hidden_PBH, hidden_PBH.new_zeros(num_rows, batch_size, width)])
    bits = torch.zeros(num_rows * width * _BITS, dtype=torch.int64)
    bits[torch.tensor(packed.sequence_lengths).cumsum(0) - 1] = 1
    numbers = (bits.view(-1, _BITS) << torch.arange(_BITS)).sum(dim=1)
    return torch.cat([hidden_PBH, numbers.to(hidden_PBH).view(num_rows, 1, width)])


def take_off_bounds(
    received_PBH: Tensor, num_rows: int, num_shards: int, context_parallel_size: int = 1
) -> tuple[Tensor, PackedRowParams | None]:
    """Return the hidden state without the K rows, and what they say: None where its rows are not packed.

    Args:
        received_PBH: as put_on_bounds made it, [P + K, B, H].
        num_shards: tensor-parallel ranks that share the row of one context-parallel rank.
    """
    # A slice along dim 0 is no copy, and its gradient returns through it.
    hidden_PBH, rows_KBH = received_PBH[:-num_rows], received_PBH[-num_rows:]
    if received_PBH.shape[1] > 1:
        return hidden_PBH, None
    numbers = rows_KBH.detach().cpu().long().flatten()
    bits = (numbers[:, None] >> torch.arange(_BITS)) & 1
    ends = (bits.flatten().nonzero().flatten() + 1).tolist()
    if not ends:
        return hidden_PBH, None
    lengths = [end - begin for begin, end in zip([0, *ends], ends)]
    length = len(hidden_PBH) * num_shards * context_parallel_size
    packed = make_packed_seq_params(lengths, length, hidden_PBH.device, context_parallel_size=context_parallel_size)
    return hidden_PBH, packed


def check_same_bounds(received: PackedRowParams | None, own: PackedRowParams | None) -> None:
    """Raise RuntimeError where the last stage has read another row than the first."""
    first, last = (() if packed is None else packed.sequence_lengths for packed in (received, own))
    if first != last:
        raise RuntimeError(
            f"the first and the last pipeline stage read different rows: sequences of {_name_lengths(first)} positions against "
            f"{_name_lengths(last)}. Both stages must read the same data in the same order; a sample that only one of them could "
            "load, or a data folder that differs between nodes, breaks it."
        )


def _name_lengths(lengths: tuple[int, ...]) -> str:
    return ", ".join(map(str, lengths)) or "no packed row's"
