"""How far two clouds of unit rows have become one, and what a map between them did to its source.

The figures that modality-gap-subspace-alignment.txt and its successor report of text embeddings moved onto images:
    mixing rate         are both modalities among a row's nearest neighbours? (section 4.3)
    JS divergence       are the rows of one cloud spread as those of the other, whatever place it has?
    Phi, Psi, overlap   is a moved row near its source, and are the same rows alike as before?
The paper leaves details open; the choices made are at each function. Rows of any length count by their direction.

Cosines are float64 and taken a block at a time: beside the features there are some blocks of 1024 x 1024 pairs, and for
neighbours a copy of the features in the dtype of their first pass. Histograms count cosines in steps of 2^-30, so
that the order of sums, 1e-16 of a cosine, changes no count.

Shapes: N rows of a cloud, M of another; D width; B bins; P pairs of rows in a block.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rsa_megatron.alignment.distances import unit_rows
from rsa_megatron.alignment.nearest_neighbours import check_features, nearest_neighbours, shared_neighbours
from rsa_megatron.alignment.neighbour_candidates import slices

#: of the histograms of cosines: each is 0.01 wide
NUM_BINS = 200
# Cosines are counted as whole numbers in [-2^30, 2^30].
_COSINE_STEPS = 2**30
# 1024 x 1024 cosines are 8 MiB in float64.
_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Fidelity:
    """What is left of the source in moved rows: 1 each where nothing but a rotation common to both has happened."""

    #: Phi, the mean cosine of a row and the same row moved
    mean_cosine: float
    #: Psi, the correlation of the cosines of all pairs of rows before and after; nan where either are all equal
    cosine_correlation: float
    #: mean share of a row's k nearest neighbours that are still among them
    neighbour_overlap: float


@torch.no_grad()
def mixing_rate(x_ND: Tensor, y_MD: Tensor, k: int = 20) -> float:
    """Return the share of a row's k nearest neighbours in both clouds that are of the other cloud, over all N + M rows.

    0 where the clouds lie apart. Where both are samples of one cloud each neighbour is any of the N + M - 1 others
    (`chance_of_mixing`): about 1/2 for N = M. Neighbours are by cosine and exact; of equally near ones the smaller index.

    Raises:
        ValueError: when widths differ, rows hold NaN, infinity or only zeros, or there are no k others.
    """
    _check_rows(x_ND, "the first rows")
    _check_rows(y_MD, "the second rows")
    if x_ND.shape[1] != y_MD.shape[1]:
        widths = f"{x_ND.shape[1]} and {y_MD.shape[1]}"
        raise ValueError(f"rows of width {widths} cannot be compared: take both from one pair of encoders")
    dtype = torch.promote_types(x_ND.dtype, y_MD.dtype)
    near_Nk = nearest_neighbours(torch.cat([x_ND.to(dtype), y_MD.to(dtype)]), k)
    of_second_Nk = near_Nk >= len(x_ND)
    crossings = of_second_Nk[: len(x_ND)].sum() + (~of_second_Nk[len(x_ND) :]).sum()
    return crossings.item() / near_Nk.numel()


def chance_of_mixing(num_rows: int, num_others: int) -> float:
    """Return the expected `mixing_rate` of N and M samples of one cloud: N sees M others of N + M - 1, M sees N."""
    total = num_rows + num_others
    return 2 * num_rows * num_others / (total * (total - 1))


@torch.no_grad()
def cosine_histogram(x_ND: Tensor, *, num_bins: int = NUM_BINS) -> Tensor:
    """Count the N (N - 1) / 2 pairs of rows by their cosine's bin, [B] in int64.

    Bins are equally wide from -1 to 1, closed below, the last one above as well.

    Raises:
        ValueError: when rows hold NaN, infinity or only zeros, or there are fewer than two.
    """
    count_B = torch.zeros(num_bins, dtype=torch.int64, device=x_ND.device)
    for cosine_P in _pair_cosines(x_ND, "rows"):
        steps_P = (cosine_P.clamp_(-1, 1) * _COSINE_STEPS).round_().long()
        # From [-2^30, 2^30] to [0, B]; the largest belongs to the last bin.
        bin_P = ((steps_P + _COSINE_STEPS) * num_bins // (2 * _COSINE_STEPS)).clamp_max_(num_bins - 1)
        count_B += torch.bincount(bin_P, minlength=num_bins)
    return count_B


def js_divergence(count_B: Tensor, other_B: Tensor) -> float:
    """Compute the Jensen-Shannon divergence of two histograms in bits (log to base 2): 0 where equal, 1 where disjoint.

    JS = H((p + q) / 2) - (H(p) + H(q)) / 2 with the entropy H, p and q the shares of each bin. The divergence itself,
    not its root. Finer bins give more: compare figures of the same bins and numbers of rows only.
    """
    if count_B.shape != other_B.shape or not (count_B.sum() > 0 and other_B.sum() > 0):
        shapes = f"{tuple(count_B.shape)} and {tuple(other_B.shape)}"
        raise ValueError(f"histograms must have the same bins and at least one count: got {shapes}")
    p_B, q_B = (count.double() / count.sum() for count in (count_B, other_B))
    # As sums of p log2(p / m): each term is exactly 0 for equal histograms, which a difference of entropies is not.
    m_B = (p_B + q_B) / 2
    m_B.masked_fill_(m_B == 0, 1.0)
    nats = sum(torch.special.xlogy(r_B, r_B / m_B).sum().item() for r_B in (p_B, q_B)) / 2
    return nats / math.log(2)


@torch.no_grad()
def fidelity(source_ND: Tensor, moved_ND: Tensor, k: int = 10) -> Fidelity:
    """Compare rows with what a map made of them, row by row and pair of rows by pair.

    Raises:
        ValueError: when shapes differ, rows hold NaN, infinity or only zeros, or there are no k others.
    """
    if source_ND.shape != moved_ND.shape:
        shapes = f"{tuple(source_ND.shape)} and {tuple(moved_ND.shape)}"
        raise ValueError(f"rows are compared with the same rows moved: got {shapes}")
    correlation = _cosine_correlation(source_ND, moved_ND)
    pieces = zip(source_ND.split(_BLOCK_ROWS), moved_ND.split(_BLOCK_ROWS))
    total = sum((unit_rows(a_bD.double()) * unit_rows(b_bD.double())).sum().item() for a_bD, b_bD in pieces)
    overlap = shared_neighbours(nearest_neighbours(source_ND, k), nearest_neighbours(moved_ND, k))
    return Fidelity(total / len(source_ND), correlation, overlap)


def _cosine_correlation(a_ND: Tensor, b_ND: Tensor) -> float:
    """Compute Pearson's correlation over the pairs i < j."""
    centre_a, centre_b = _mean_cosine(a_ND), _mean_cosine(b_ND)
    square_a = square_b = product = 0.0
    for a_P, b_P in zip(_pair_cosines(a_ND, "the source"), _pair_cosines(b_ND, "the moved rows")):
        a_P, b_P = a_P.sub_(centre_a), b_P.sub_(centre_b)
        square_a, square_b, product = square_a + a_P @ a_P, square_b + b_P @ b_P, product + a_P @ b_P
    # Cosines that are all equal differ by rounding, 1e-16 each: the root mean square of a difference that counts is more.
    least = len(a_ND) ** 2 * 1e-28
    return (product / (square_a * square_b).sqrt()).item() if min(square_a, square_b) > least else float("nan")


def _mean_cosine(x_ND: Tensor) -> float:
    """Average over all pairs i < j at once: |sum_i u_i|^2 = N + 2 sum_{i<j} u_i.u_j."""
    n = len(x_ND)
    total_D = sum(unit_rows(x_bD.double()).sum(0) for x_bD in x_ND.split(_BLOCK_ROWS))
    return ((total_D @ total_D - n) / (n * (n - 1))).item()


def _pair_cosines(x_ND: Tensor, name: str) -> Iterator[Tensor]:
    """Yield the cosines of all pairs i < j block by block, [P] in float64."""
    _check_rows(x_ND, name)
    if len(x_ND) < 2:
        raise ValueError(f"{name}: a pair needs two rows, got {len(x_ND)}")
    blocks = slices(len(x_ND), _BLOCK_ROWS)
    for number, i in enumerate(blocks):
        u_bD = unit_rows(x_ND[i].double())
        for j in blocks[number:]:
            cosine_bc = u_bD @ (u_bD if i == j else unit_rows(x_ND[j].double())).T
            yield cosine_bc[cosine_bc.new_ones(cosine_bc.shape).triu_(1) > 0] if i == j else cosine_bc.flatten()


def _check_rows(x_ND: Tensor, name: str) -> None:
    check_features(x_ND, name)
    zero_N = torch.cat([(x_bD == 0).all(dim=1) for x_bD in x_ND.split(_BLOCK_ROWS)]) if len(x_ND) else x_ND.new_zeros(0)
    if zero_N.any():
        zero = zero_N.nonzero()[:, 0].tolist()
        numbers = ", ".join(map(str, zero[:5])) + (", ..." if len(zero) > 5 else "")
        what = f"{len(zero)} of {len(zero_N)} rows are zero and have no direction"
        raise ValueError(f"{name}: {what} ({numbers}); remove them")
