"""Rows of two sets of embeddings in pairs, of unit length, a block at a time.

Each set is a tensor or its pieces in order, and the two may be cut differently. Rows that have no direction, and rows without
a partner, are reported after the last row, with their counts.

Shapes: N pairs, D width; b rows of a block.
"""

from collections.abc import Iterator
from itertools import chain

from torch import Tensor

from rsa_megatron.realign.unit_rows import Embeddings, RowFaults, iterate_unit_blocks

#: what messages call the two sets
NAMES = "image embeddings", "text embeddings"


def iterate_unit_pairs(image_ND: Embeddings, text_ND: Embeddings) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield unit rows of both in float64 and in step, [b, D] and [b, D].

    Raises:
        ValueError: at the end, when rows are zero or not finite, numbers of rows differ or are below 2; at once for widths.
    """
    counts, faults = [0, 0], [RowFaults(), RowFaults()]
    left, right = (_count_rows(x, which, counts, faults) for which, x in enumerate((image_ND, text_ND)))
    x_bD, y_bD = next(left, None), next(right, None)
    while x_bD is not None and y_bD is not None:
        check_widths(x_bD, y_bD)
        num_rows = min(len(x_bD), len(y_bD))
        yield x_bD[:num_rows], y_bD[:num_rows]
        x_bD = x_bD[num_rows:] if num_rows < len(x_bD) else next(left, None)
        y_bD = y_bD[num_rows:] if num_rows < len(y_bD) else next(right, None)
    for _ in chain(left, right):
        pass  # rows without a partner are counted, too
    for name, count, found in zip(NAMES, counts, faults):
        if wrong := found.format_message(count):
            raise ValueError(f"{name}: {wrong}, with their partners")
    if counts[0] != counts[1] or counts[0] < 2:
        raise ValueError(
            f"there are {counts[0]} {NAMES[0]} and {counts[1]} {NAMES[1]}: they must pair up row by row, at least two of each"
        )


def _count_rows(embeddings: Embeddings, which: int, counts: list[int], faults: list[RowFaults]) -> Iterator[Tensor]:
    pieces = [embeddings] if isinstance(embeddings, Tensor) else embeddings
    try:
        for unit_bD in iterate_unit_blocks(pieces, faults[which]):
            counts[which] += len(unit_bD)
            yield unit_bD.clone()  # the next block takes its memory
    except ValueError as error:
        raise ValueError(f"{NAMES[which]}: {error}") from error


def check_widths(image_D: Tensor, text_D: Tensor) -> None:
    """Raise ValueError unless rows of images and of texts, or their means, are equally wide."""
    if image_D.shape[-1] != text_D.shape[-1]:
        raise ValueError(
            f"{NAMES[0]} have width {image_D.shape[-1]} and {NAMES[1]} {text_D.shape[-1]}: "
            "a gap needs one space, so take both from the two halves of one encoder"
        )
