"""Passes over embeddings that need not fit in memory: mean and variance of their unit rows, over pieces and ranks.

A pass stores a few vectors, whatever the size of the set. Each rank of a process group reads its own shard; the ranks' results are
gathered once a pass and merged in the order of ranks on every one, so that all have the same bits. Bad rows, too, are
reported in that gather, and all ranks raise the same error: one that raised at once would leave the others waiting.

Shapes: N rows in all, b in a block; D width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from rsa_megatron.realign.unit_rows import Embeddings, Progress, RowFaults, iterate_unit_blocks

# The sums of a pass err by some 1e-14. One zero row among N takes 1/N from the mean square length.
INTEGRITY = 1e-10


@dataclass
class Moments:
    """Of N rows: their mean, and their squared distances from it."""

    num_rows: int
    #: [D], float64
    mean_D: Tensor
    #: sum of |row - mean|^2, float64, one number
    square_sum: Tensor
    #: sum of (row - mean) (row - mean)^T, [D, D], if requested
    scatter_DD: Tensor | None = None

    @classmethod
    def empty(cls) -> "Moments":
        return cls(0, torch.zeros(0, dtype=torch.float64), torch.zeros((), dtype=torch.float64))

    @classmethod
    def of_block(cls, x_bD: Tensor, *, with_scatter: bool = False, out: Tensor | None = None) -> "Moments":
        """Compute them of float64 rows, from differences to the mean, which go into `out`; that may be the rows' own memory."""
        mean_D = x_bD.sum(0) / len(x_bD)
        difference_bD = torch.sub(x_bD, mean_D, out=out)
        square_sum = torch.linalg.vector_norm(difference_bD).square()
        return cls(len(x_bD), mean_D, square_sum, difference_bD.T @ difference_bD if with_scatter else None)

    def merge(self, other: "Moments") -> None:
        """Add other rows. Chan, Golub and LeVeque 1979: M2 = M2_a + M2_b + |mean_a - mean_b|^2 N_a N_b / N."""
        if not other.num_rows:
            return
        if not self.num_rows:
            self.num_rows, self.mean_D, self.square_sum = other.num_rows, other.mean_D, other.square_sum
            self.scatter_DD = None if other.scatter_DD is None else other.scatter_DD.clone()  # it is added to in place
            return
        num_rows = self.num_rows + other.num_rows
        difference_D = other.mean_D - self.mean_D
        weight = self.num_rows * (other.num_rows / num_rows)
        self.square_sum = self.square_sum + other.square_sum + weight * difference_D.square().sum()
        if self.scatter_DD is not None:
            self.scatter_DD += other.scatter_DD
            self.scatter_DD.addr_(difference_D, difference_D, alpha=weight)
        self.mean_D = self.mean_D + difference_D * (other.num_rows / num_rows)
        self.num_rows = num_rows

    @property
    def covariance_DD(self) -> Tensor:
        """Divided by N, [D, D]; of moments that were taken with the scatter."""
        return self.scatter_DD / self.num_rows

    def trace(self) -> float:
        """Return T = mean |e - mean|^2 of N unit rows: the trace of their covariance, divided by N and not by N - 1.

        mean |e|^2 = |mean|^2 + T holds for any rows, and unit rows have mean |e|^2 = 1: T = 1 - |mean|^2. So both are computed
        and compared: a row that is not of unit length, a mean and a count that do not belong together are seen.
        """
        trace = self.square_sum.item() / self.num_rows
        expected = 1 - self.mean_D.square().sum().item()
        if not abs(trace - expected) <= INTEGRITY:
            raise RuntimeError(
                f"variance {trace!r} of unit rows is not 1 - |mean|^2 = {expected!r}: the sums are corrupt; fit again"
            )
        return trace


def compute_moments(
    embeddings: Embeddings, name: str, *, group=None, progress: Progress | None = None, with_scatter=False
) -> Moments:
    """Compute mean and variance of a set's unit rows in one pass; over the ranks of `group`, each with its own rows.

    Args:
        name: what messages and the progress call the set, such as "image embeddings".

    Raises:
        ValueError: rows have no direction, or there are fewer than two, or widths differ; on every rank alike.
    """

    def read(faults: RowFaults) -> Moments:
        total = Moments.empty()
        for unit_bD in iterate_unit_blocks(_iterate_pieces(embeddings, name, progress), faults):
            total.merge(Moments.of_block(unit_bD, with_scatter=with_scatter, out=unit_bD))
        return total

    total = merge_over_ranks(read, name, group)
    if total.num_rows < 2:
        raise ValueError(f"{name}: a mean and a variance need at least 2 rows, got {total.num_rows}")
    return total


def compute_mean(
    block_sum: Callable[[Tensor], Tensor],
    embeddings: Embeddings,
    name: str,
    num_rows: int,
    *,
    group=None,
    progress: Progress | None = None,
) -> Tensor:
    """Average over a set, [D], a row made from each of its rows: one more pass.

    Args:
        block_sum: the sum over a block of the rows made, [D], from the block's unit rows, [b, D].
        num_rows: that the set has; detects a set that can be iterated over only once.
    """

    def read(faults: RowFaults) -> Moments:
        total = Moments.empty()
        for unit_bD in iterate_unit_blocks(_iterate_pieces(embeddings, name, progress), faults):
            mean_D = block_sum(unit_bD) / len(unit_bD)
            total.merge(Moments(len(unit_bD), mean_D, mean_D.new_zeros(())))
        return total

    total = merge_over_ranks(read, name, group)
    if total.num_rows != num_rows:
        raise ValueError(
            f"{name}: the first pass read {num_rows} rows, the next one {total.num_rows}; pass a tensor, a list, or an object "
            "that starts from the beginning each time it is iterated over"
        )
    return total.mean_D


def _iterate_pieces(embeddings: Embeddings, name: str, progress: Progress | None) -> Iterable[Tensor]:
    pieces = [embeddings] if isinstance(embeddings, Tensor) else embeddings
    return progress(pieces, name) if progress else pieces


def merge_over_ranks(read: Callable[[RowFaults], Moments], name: str, group) -> Moments:
    """Merge what all ranks have read, in the order of ranks; forward: one AG of objects a call, on every rank.

    Raises:
        ValueError: a rank could not read its rows, or some have no direction, or widths differ; the same on every rank.
    """
    faults = RowFaults()
    part, failure = Moments.empty(), None
    try:
        part = read(faults)
    except Exception as error:
        if group is None and not isinstance(error, ValueError):
            raise
        failure = error  # the other ranks wait in the gather
    part.mean_D, part.square_sum = part.mean_D.cpu(), part.square_sum.cpu()
    part.scatter_DD = None if part.scatter_DD is None else part.scatter_DD.cpu()
    parts = [(part, str(failure) if failure else faults.format_message(part.num_rows))]
    if group is not None:
        gathered = [None] * group.size()
        torch.distributed.all_gather_object(gathered, *parts, group=group)
        parts = gathered
    _check_ranks(parts, name, failure)
    total = Moments.empty()
    for part, _ in parts:
        total.merge(part)
    return total


def _check_ranks(parts: list[tuple[Moments, str]], name: str, failure: Exception | None) -> None:
    messages = [f"rank {rank}: {text}" if len(parts) > 1 else text for rank, (_, text) in enumerate(parts) if text]
    if messages:
        raise ValueError(f"{name}: {'; '.join(messages)}") from failure
    width_of = {rank: len(part.mean_D) for rank, (part, _) in enumerate(parts) if part.num_rows}
    if len(set(width_of.values())) > 1:
        texts = ", ".join(f"{width} on rank {rank}" for rank, width in width_of.items())
        raise ValueError(f"{name}: embeddings of a set must have one width, not {texts}")
