"""What the rows of a run hold, a sample each or packed: from stated means, or from measured lengths of samples.

Without pipeline parallelism rows are as long as what they hold, and each step waits for the rank that has most to do; a micro-batch
of several rows is padded to its longest. Both are simulated, on steps that are drawn from the rows.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

_NUM_ROWS_DRAWN = 4000
_FEWEST_STEPS_DRAWN = 10


@dataclass(frozen=True)
class Row:
    """One row, or the mean of several. What is padded is not in it."""

    num_samples: float
    num_positions: float
    #: the sum of its sequences' lengths squared: they attend to themselves alone
    squared_lengths: float
    num_tiles: float

    @classmethod
    def of_samples(cls, lengths: Sequence[float], tiles: Sequence[float]) -> "Row":
        return cls(len(lengths), sum(lengths), sum(length**2 for length in lengths), sum(tiles))

    @classmethod
    def of_mean_samples(cls, num_samples: float, length: float, tiles: float) -> "Row":
        """Make a row of so many samples, all of the same length and number of tiles."""
        return cls(num_samples, num_samples * length, num_samples * length**2, num_samples * tiles)


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a data set, of which a run reads at random."""

    rows: Sequence[Row]
    mean: Row = field(init=False)
    _known: dict = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self):
        names = ("num_samples", "num_positions", "squared_lengths", "num_tiles")
        means = {name: statistics.fmean(getattr(row, name) for row in self.rows) for name in names}
        object.__setattr__(self, "mean", Row(**means))

    def estimate_waiting(
        self, costs: tuple[float, float, float], *, num_ranks: int, num_micro_batches: int, micro_batch_size: int
    ) -> float:
        """Estimate a step's time as a multiple of what it would be if every rank had mean rows to do, and no padding.

        Args:
            costs: of a tile, of a position, and of a unit of a sequence's length squared.
        """
        if len(self.rows) == 1:
            return 1.0
        key = (costs, num_ranks, num_micro_batches, micro_batch_size)
        if key not in self._known:
            self._known[key] = self._simulate(*key)
        return self._known[key]

    def _simulate(self, costs, num_ranks: int, num_micro_batches: int, micro_batch_size: int) -> float:
        of_tile, of_position, of_square = costs

        def cost(rows: list[Row]) -> float:
            tower = of_tile * sum(row.num_tiles for row in rows)
            if len(rows) == 1:
                return tower + of_position * rows[0].num_positions + of_square * rows[0].squared_lengths
            longest = max(row.num_positions for row in rows)
            return tower + len(rows) * (of_position * longest + of_square * longest**2)

        generator, num_rows = random.Random(0), num_ranks * num_micro_batches * micro_batch_size
        num_steps = max(_FEWEST_STEPS_DRAWN, _NUM_ROWS_DRAWN // num_rows)

        def work_of_a_rank() -> float:
            return sum(cost(generator.choices(self.rows, k=micro_batch_size)) for _ in range(num_micro_batches))

        slowest = statistics.fmean(max(work_of_a_rank() for _ in range(num_ranks)) for _ in range(num_steps))
        return slowest / (num_micro_batches * micro_batch_size * cost([self.mean]))
