"""One row of packed sequences: which of its samples each text position belongs to, and whether the script's bounds can be right.

Bounds (cu_seqlens) count positions of the decoder's row. A script that counts them before LLaVAModel puts each image's tokens in
the place of one has all sequences after the first image too early: captions would go to other samples' images without a word.

Under pipeline parallelism LLaVAModel fills the row up to its longest length: the bounds end there, with the rest as the last sequence,
which has no image and takes no part. Stages that read no text must be given the same bounds (checks.check_bounds_are_known).

Shapes: S text positions of the one row, n samples.
"""

from typing import NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from rsa_megatron.hooks.host import Host


def is_packed(arguments: dict) -> bool:
    """Whether several samples, or one, share a row as packed sequences.

    Args:
        arguments: of the model's forward, by name.
    """
    packed = arguments.get("packed_seq_params")
    return packed is not None and packed.qkv_format == "thd"


def sequence_bounds(packed: PackedSeqParams) -> Tensor:
    """0 and where each sequence of the row ends, its padding included, [number of sequences + 1]."""
    return packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded


class PackedRow(NamedTuple):
    """The bounds are as they were given; `check_bounds` says whether they can be right."""

    num_samples: int
    #: which sequence a text position belongs to, from 0, [1, S]
    sample_BS: Tensor
    #: whether it lies behind its sequence's own positions, in padding, or behind all sequences, [1, S]
    in_padding_BS: Tensor
    #: 0 and where each sequence ends, its padding included, [n + 1]
    bounds: Tensor
    #: positions of each sequence without its padding, [n]
    lengths: Tensor
    #: whether a script knows of no sample in the last one
    last_is_padding: bool = False


def packed_row(packed: PackedSeqParams, position_BS: Tensor) -> PackedRow:
    """The row as its bounds have it.

    Args:
        position_BS: where each text position lies in the decoder's row.

    Raises:
        ValueError: there are more rows than one, or no bounds.
    """
    if len(position_BS) != 1:
        raise ValueError(f"RSA reads packed sequences from one row, not {len(position_BS)}: set --micro-batch-size 1")
    given = {name: getattr(packed, name) for name in ("cu_seqlens_q", "cu_seqlens_q_padded")}
    own, padded = (None if one is None else one.to(position_BS) for one in given.values())
    for name, one in given.items():
        if (one is not None and (one.dim() != 1 or len(one) < 2)) or (own is None and padded is None):
            found = "None" if one is None else f"of shape {tuple(one.shape)}"
            raise ValueError(f"packed_seq_params.{name} is {found}: give the bounds of n sequences in a tensor [n + 1]")
    if own is not None and padded is not None and len(own) != len(padded):
        raise ValueError(
            f"packed_seq_params.cu_seqlens_q has {len(own)} bounds and cu_seqlens_q_padded {len(padded)}: "
            "give both for the same sequences"
        )
    bounds = own if padded is None else padded
    lengths = (bounds if own is None else own).diff()
    sample_BS = _sequence_of(position_BS, bounds)
    in_padding_BS = position_BS - bounds[sample_BS] >= lengths[sample_BS]
    return PackedRow(len(bounds) - 1, sample_BS, in_padding_BS, bounds, lengths)


def check_bounds(row: PackedRow, packed: PackedSeqParams, position_BS: Tensor, is_read_BS: Tensor, host: Host) -> None:
    """Raise ValueError, with a remedy, for bounds that cannot be those of this row.

    All numbers are read at once. Like the look-ups of images before it, that waits for the device: once, in a queue that these
    have emptied.

    Args:
        is_read_BS: where there is an image, or a token that a loss or RSA reads.
    """
    is_behind_all_BS = position_BS >= row.bounds[-1]
    # An image's position is that of its last token; its first follows what is before it.
    first_BS = torch.nn.functional.pad(position_BS[:, :-1] + 1, (1, 0))
    counts = [
        (is_read_BS & row.in_padding_BS & ~is_behind_all_BS).sum(),
        (is_read_BS & is_behind_all_BS).sum(),
        (_sequence_of(first_BS, row.bounds) != row.sample_BS).sum(),
        (is_read_BS & (row.sample_BS == row.num_samples - 1)).sum(),
    ]
    numbers = torch.cat([row.bounds, row.lengths, position_BS[0, -1:] + 1, torch.stack(counts)]).tolist()
    bounds, lengths = numbers[: row.num_samples + 1], numbers[row.num_samples + 1 : -5]
    row_length, num_misplaced, num_behind_all, num_divided, num_in_last = numbers[-5:]
    name = "packed_seq_params.cu_seqlens_q" + ("" if packed.cu_seqlens_q_padded is None else "_padded")
    if bounds[0] != 0:
        raise ValueError(f"{name} begins at {bounds[0]}: give 0 first, then where each sequence ends")
    for before, after in zip(bounds, bounds[1:]):
        if after < before:
            raise ValueError(f"{name} goes back from {before} to {after}: give where each sequence ends, in order")
    for number, (length, room) in enumerate(zip(lengths, torch.tensor(bounds).diff().tolist())):
        if not 0 <= length <= room:
            raise ValueError(
                f"packed_seq_params.cu_seqlens_q gives sequence {number} {length} positions, and cu_seqlens_q_padded {room}: "
                "count padding in the second alone"
            )
    if bounds[-1] != row_length:
        # With total_tokens a script says itself that padding follows after the last sequence.
        if getattr(packed, "total_tokens", None) == row_length:
            num_misplaced += num_behind_all
        elif bounds[-1] not in host.row_lengths(row_length):
            raise ValueError(
                f"{name} ends at {bounds[-1]}, and the packed row has {row_length} positions with its images' tokens: count each "
                "image as the tokens that it becomes, and the row's padding to its last sequence"
            )
    if num_misplaced:
        raise ValueError(
            f"{num_misplaced} image, trained or caption tokens of the packed row lie in what packed_seq_params.cu_seqlens_q leaves "
            "for padding: count each image as the tokens that it becomes, in cu_seqlens_q as in cu_seqlens_q_padded"
        )
    if row.last_is_padding and num_in_last:
        raise ValueError(
            f"RSAPlugin(select=...) gave eligible of {row.num_samples - 1} samples, and the packed row has {row.num_samples} sequences, "
            f"of which the last is not its padding ({num_in_last} image, trained or caption tokens)"
        )
    if num_divided:
        raise ValueError(
            f"{name} ends a sequence within an image, {num_divided} times: count each image as the tokens that it becomes"
        )


def _sequence_of(position_BS: Tensor, bounds: Tensor) -> Tensor:
    """Which sequence a position of the decoder's row belongs to, from 0; what lies behind all to the last."""
    return (torch.searchsorted(bounds, position_BS, right=True) - 1).clamp(min=0, max=len(bounds) - 2)
