"""Rows of embeddings brought to unit length in float64, a block at a time, and those that cannot be, counted and named.

A set of embeddings is a tensor, or anything that gives its pieces one after another each time it is iterated over. A piece is
taken in blocks that stay in the processor's cache and are converted there: memory does not grow with the set or its pieces.

Rows that have no direction (NaN, infinity, zeros) are never replaced: a reader reads a set to its end, and then raises the
message of RowFaults.

Shapes: N rows in all, b in a block; D width.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

Embeddings = Tensor | Iterable[Tensor]
#: wraps an iterable of pieces, and says what it shows: lambda pieces, what: tqdm(pieces, desc=what)
Progress = Callable[[Iterable[Tensor], str], Iterable[Tensor]]

# A block of 2^18 numbers is 2 MB in float64: it and what is computed from it stay in the second and third level of cache.
# GPUs have launches to hide instead: 128 MB.
BLOCK_NUMBERS = {"cpu": 2**18, "cuda": 2**24}
# Squares of lengths within these bounds neither overflow nor lose digits below the smallest normal number, 2e-308.
SHORTEST, LONGEST = 1e-140, 1e140
NAMED_ROWS = 5


@dataclass
class RowFaults:
    """What is wrong with the rows that a rank has read; reported once all are read."""

    rows: dict[str, list[int]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, rows: Tensor, first_row: int) -> None:
        known = self.rows.setdefault(kind, [])
        known += [first_row + row for row in rows.tolist()[: NAMED_ROWS - len(known)]]
        self.counts[kind] = self.counts.get(kind, 0) + len(rows)

    def format_message(self, num_rows: int) -> str:
        """Count and name the faults; empty if there are none."""
        if not self.counts:
            return ""
        found = ", ".join(
            f"{count} {kind} ({_format_row_numbers(self.rows[kind], count)})" for kind, count in self.counts.items()
        )
        return f"of {num_rows} rows {found}: they have no direction; remove them"


def _format_row_numbers(rows: list[int], count: int) -> str:
    names = ", ".join(map(str, rows))
    return f"row{'s' if count > 1 else ''} {names}{', ...' if count > len(rows) else ''}"


@torch.no_grad()
def normalise_rows(x_ND: Tensor) -> Tensor:
    """Divide rows by their length, [N, D], float64; a positive factor of a row changes nothing.

    Raises:
        ValueError: a row is zero or holds NaN or infinity; the message counts and names them.
    """
    faults = RowFaults()
    u_ND = torch.empty(x_ND.shape, dtype=torch.float64, device=x_ND.device)
    row = 0
    for unit_bD in iterate_unit_blocks([x_ND], faults):
        u_ND[row : row + len(unit_bD)] = unit_bD
        row += len(unit_bD)
    if faults.counts:
        raise ValueError(faults.format_message(row))
    return u_ND


def iterate_unit_blocks(pieces: Iterable[Tensor], faults: RowFaults) -> Iterator[Tensor]:
    """Yield blocks of unit rows in float64, [b, D], to be overwritten at will: the next block takes their memory.

    Rows that have no direction are 0, and `faults` names them.
    """
    row, width, scratch_bD = 0, None, None
    for piece_ND in pieces:
        _check_piece(piece_ND, row, width)
        width = piece_ND.shape[1]
        num_rows = max(1, BLOCK_NUMBERS.get(piece_ND.device.type, 2**24) // width)
        if scratch_bD is None or scratch_bD.device != piece_ND.device:
            scratch_bD = torch.empty(num_rows, width, dtype=torch.float64, device=piece_ND.device)
        for raw_bD in piece_ND.detach().split(num_rows) if len(piece_ND) else ():
            # To float32 first: half the time of the direct way from float16, and exact.
            x_bD = scratch_bD[: len(raw_bD)].copy_(raw_bD if raw_bD.dtype == torch.float64 else raw_bD.float())
            yield x_bD.mul_(_compute_inverse_lengths(x_bD, faults, row)[:, None])
            row += len(raw_bD)


def _check_piece(piece_ND, row: int, width: int | None) -> None:
    if not isinstance(piece_ND, Tensor):
        raise ValueError(
            f"embeddings must be tensors [N, D], but from row {row} on there is a {type(piece_ND).__name__}"
        )
    if piece_ND.ndim != 2 or not piece_ND.is_floating_point() or not piece_ND.shape[1]:
        what = f"{str(piece_ND.dtype).removeprefix('torch.')} {list(piece_ND.shape)}"
        raise ValueError(
            f"embeddings must be rows [N, D] of floating-point numbers, but from row {row} on they are {what}"
        )
    if width not in (None, piece_ND.shape[1]):
        raise ValueError(
            f"embeddings of a set must have one width, but it is {width} before row {row} and {piece_ND.shape[1]} from there on"
        )


def _compute_inverse_lengths(x_bD: Tensor, faults: RowFaults, first_row: int) -> Tensor:
    length_b = torch.linalg.vector_norm(x_bD, dim=1)
    is_usual_b = (length_b > SHORTEST) & (length_b < LONGEST)  # False for NaN
    if is_usual_b.all():
        return length_b.reciprocal_()
    for row in (~is_usual_b).nonzero()[:, 0].tolist():
        x_D = x_bD[row]
        largest = x_D.abs().max()  # NaN if there is one
        if torch.isfinite(largest) and largest > 0:
            length_b[row] = x_D.div_(largest).norm()
            continue
        kind = "hold NaN" if largest.isnan() else "hold infinity" if largest else "are zero"
        faults.add(kind, torch.tensor([row]), first_row)
        x_D.zero_()
        length_b[row] = torch.inf  # its factor is 0
    return length_b.reciprocal_()
