"""What a metric gives for pairs that are none: the second space's samples in another order. It is each metric's chance.

It may be far from 0: linear CKA of random features is 0.80 at a width of 4096 and N = 1000. It differs from features to features, and
the best of many pairs of layers is above that of each: take the best of the same pairs in each order. The expectation is known for
mutual-kNN, k / (N - 1), for unbiased CKA, 0, and for CKA, tr(K) tr(L) / ((N - 1) |K| |L|) of centred kernels, which a test checks.

Neighbours, kernels and directions do not depend on the pairing and are found once, so that all orders together cost less
than the metric itself, or, of kernels of more than 4096 samples, about as much again for each of three.

Shapes: N samples; widths D and E; k neighbours; P orders.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rsa_megatron.alignment import metrics
from rsa_megatron.alignment.distances import at_least_fp32
from rsa_megatron.alignment.hsic import MATRIX_ROWS, KernelSums, kernel_sums, shuffled_kernel_sums
from rsa_megatron.alignment.nearest_neighbours import nearest_neighbours, shared_neighbours
from rsa_megatron.alignment.neighbour_candidates import slices
from rsa_megatron.alignment.pairwise_kernel import PairwiseKernel, float32_products

_NUM_ORDERS, _NUM_ORDERS_OF_LARGE_KERNELS = 10, 3
_KERNEL_METRICS = ("cka", "cka-rbf", "unbiased-cka", "rsa")

#: a_ND, b_NE, k and order_PN -> the metric's value, and that of each order
Scores = tuple[float, list[float]]


def draw_orders(metric: str, num_samples: int, seed: int = 0) -> Tensor:
    """Orders of the second space's samples, the same at each call: [P, N] in int64, on the CPU.

    P is 10, and 3 for kernels of more than 4096 samples.
    """
    large = metric in _KERNEL_METRICS and num_samples > MATRIX_ROWS
    generator = torch.Generator().manual_seed(seed)
    count = _NUM_ORDERS_OF_LARGE_KERNELS if large else _NUM_ORDERS
    return torch.stack([torch.randperm(num_samples, generator=generator) for _ in range(count)])


@torch.no_grad()
def score_with_shuffled(metric: str, a_ND: Tensor, b_NE: Tensor, k: int, order_PN: Tensor) -> Scores:
    """Score a metric, and the same of pairs that are none.

    Args:
        metric: one of metrics.METRICS, which gives the same value.
        order_PN: of `draw_orders`.

    Raises:
        ValueError: as the metric.
    """
    metrics.check_pair(a_ND, b_NE, metric)
    if few := metrics.describe_too_few(metric, k, len(a_ND)):
        raise ValueError(few)
    return _SCORERS[metric](a_ND, b_NE, k, order_PN.to(b_NE.device))


def shuffle_neighbours(index_Nk: Tensor, order_N: Tensor) -> Tensor:
    """The lists of neighbours of the samples in another order, by their new places: [N, k], each in order of index."""
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return place_N[index_Nk[order_N]].sort(dim=1).values


def _score_lists(score: Callable[[Tensor, Tensor], float]):
    def score_lists(a_ND: Tensor, b_NE: Tensor, k: int, order_PN: Tensor) -> Scores:
        a_Nk, b_Nk = nearest_neighbours(a_ND, k), nearest_neighbours(b_NE, k)
        return score(a_Nk, b_Nk), [score(a_Nk, shuffle_neighbours(b_Nk, order_N)) for order_N in order_PN]

    return score_lists


def _score_cknna(a_ND: Tensor, b_NE: Tensor, k: int, order_PN: Tensor) -> Scores:
    a_Nk, b_Nk = nearest_neighbours(a_ND, k), nearest_neighbours(b_NE, k)
    variances = metrics.neighbour_variance(a_ND, a_Nk), metrics.neighbour_variance(b_NE, b_Nk)

    def score(b_NE: Tensor, b_Nk: Tensor) -> float:
        return metrics.align_neighbours(a_ND, b_NE, a_Nk, b_Nk, variances)

    return score(b_NE, b_Nk), [score(b_NE[order_N], shuffle_neighbours(b_Nk, order_N)) for order_N in order_PN]


def _score_kernels(hsic: Callable, kernel: str):
    def score_kernels(a_ND: Tensor, b_NE: Tensor, k: int, order_PN: Tensor) -> Scores:
        rows, options = metrics.to_unit_rows(a_ND, b_NE), {"kernel": kernel, "sigma": 1.0}
        sums = kernel_sums(*rows, **options)
        shuffled = shuffled_kernel_sums(sums, *rows, order_PN, **options)
        return metrics.align_kernels(sums, hsic), [metrics.align_kernels(one, hsic) for one in shuffled]

    return score_kernels


def _score_svcca(a_ND: Tensor, b_NE: Tensor, k: int, order_PN: Tensor) -> Scores:
    a_NR, b_NR = metrics.leading_directions(a_ND, b_NE)
    return metrics.correlate_spans(a_NR, b_NR), [metrics.correlate_spans(a_NR, b_NR[order_N]) for order_N in order_PN]


@float32_products()
def _score_rsa(a_ND: Tensor, b_NE: Tensor, k: int, order_PN: Tensor) -> Scores:
    own, num_rows = metrics.rsa_discrepancy(a_ND, b_NE), len(a_ND)
    if num_rows > MATRIX_ROWS:
        return own, [metrics.rsa_discrepancy(a_ND, b_NE[order_N]) for order_N in order_PN]
    every = slice(0, num_rows)
    k_NN, l_NN = (PairwiseKernel(at_least_fp32(x), "euclidean").block(every, every) for x in (a_ND, b_NE))
    blocks = slices(num_rows, 1024)
    return own, [
        sum((k_NN[i] - l_NN[order_N[i]][:, order_N]).double().square().sum() for i in blocks).item() / num_rows**2
        for order_N in order_PN
    ]


_SCORERS: dict[str, Callable[[Tensor, Tensor, int, Tensor], Scores]] = {
    metrics.MUTUAL_KNN: _score_lists(shared_neighbours),
    "cka": _score_kernels(KernelSums.hsic, "linear"),
    "cka-rbf": _score_kernels(KernelSums.hsic, "rbf"),
    "unbiased-cka": _score_kernels(KernelSums.unbiased_hsic, "linear"),
    "cknna": _score_cknna,
    "cycle-knn": _score_lists(metrics.share_of_cycles),
    "svcca": _score_svcca,
    "rsa": _score_rsa,
}
