"""How full rows are, packed and unpacked, from the lengths of samples in the order in which training reads them."""

from collections.abc import Sequence
from dataclasses import dataclass

from rsa_megatron.data.packing import pack_buffers


@dataclass(frozen=True)
class RowFill:
    """Samples in packed rows, and the same samples in a row each."""

    row_length: int
    num_samples: int
    num_rows: int
    #: share of the packed rows' positions that are samples'
    fill: float
    #: the same of rows of one sample, each padded to row_length, as under pipeline parallelism
    fill_unpacked: float

    @property
    def samples_per_row(self) -> float:
        return self.num_samples / self.num_rows


def measure_fill(
    positions: Sequence[int],
    tiles: Sequence[int],
    keys: Sequence[str],
    *,
    row_length: int,
    max_tiles: int,
    buffer_size: int,
) -> RowFill:
    """Pack samples, none longer than a row, buffer by buffer, as a data worker does (--packing-buffer-size).

    Args:
        positions: of each sample in a packed row: images spliced in, its last token too.
        tiles: of each sample, its images' together.

    Raises:
        ValueError: there is no sample.
    """
    if not positions:
        raise ValueError(f"no sample fits a row of {row_length} positions")
    num_rows = sum(1 for _ in pack_buffers(positions, tiles, keys, row_length, max_tiles, buffer_size))
    # A sample alone is a position shorter: its last token is a label alone.
    alone = sum(positions) - len(positions)
    return RowFill(
        row_length,
        num_samples=len(positions),
        num_rows=num_rows,
        fill=sum(positions) / (num_rows * row_length),
        fill_unpacked=alone / (len(positions) * row_length),
    )


def measure_micro_batches(positions: Sequence[int], micro_batch_size: int) -> float:
    """Return the fill of unpacked micro-batches, each padded to its longest sample, as without pipeline parallelism."""
    padded = 0
    for first in range(0, len(positions), micro_batch_size):
        batch = positions[first : first + micro_batch_size]
        padded += len(batch) * (max(batch) - 1)
    return (sum(positions) - len(positions)) / padded
