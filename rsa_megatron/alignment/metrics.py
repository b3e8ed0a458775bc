"""How well two spaces agree on which samples are alike: numbers to report, without gradient.

Definitions are those of Huh et al. 2024 (platonic-rep), the papers behind them, and their differences beside each.
None of them adds 1e-6 to a denominator, as platonic-rep does. All take features as they are given: which step comes
before (`clip_outliers`, unit rows) is the caller's choice, and METRICS' for the command line. What is computed from
kernels is computed in float64, from features of any float type. What each gives for unrelated samples, which belongs beside every
figure reported, is shuffled_pairs.py's; how few samples say anything, `least_samples`'.

Shapes: N samples, the rows of both inputs in the same order; widths D and E; k neighbours; M pairs of samples.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rsa_megatron.alignment.distances import at_least_fp32, unit_rows
from rsa_megatron.alignment.hsic import KernelSums, kernel_sums, unbiased_hsic
from rsa_megatron.alignment.loss import rsa_loss
from rsa_megatron.alignment.nearest_neighbours import check_features, nearest_neighbours, shared_neighbours
from rsa_megatron.alignment.neighbour_candidates import pair_cosines, row_norms


@torch.no_grad()
def mutual_knn(a_ND: Tensor, b_NE: Tensor, k: int = 10) -> float:
    """Mean share of a sample's k nearest neighbours that the two spaces have in common (paper, eq. 9).

    Neighbours are those of largest cosine similarity, the sample itself left out, as in Huh et al. 2024
    (platonic-rep's mutual_knn without its clipping of outliers); of equally near ones the smaller index. 1 for a
    space against itself; about k / (N - 1) for spaces that have nothing to do with each other.

    Raises:
        ValueError: when there are no k other samples, the inputs do not pair up, rows hold NaN or infinity, or all
            rows of a space point the same way.
    """
    check_pair(a_ND, b_NE, "mutual_knn")
    return shared_neighbours(nearest_neighbours(a_ND, k), nearest_neighbours(b_NE, k))


@torch.no_grad()
def cycle_knn(a_ND: Tensor, b_NE: Tensor, k: int = 10) -> float:
    """Share of samples that are among the neighbours in A of one of their neighbours in B.

    About k^2 / (N - 1) by chance where that is small; not symmetric in A and B.
    """
    check_pair(a_ND, b_NE, "cycle_knn")
    return share_of_cycles(nearest_neighbours(a_ND, k), nearest_neighbours(b_NE, k))


def share_of_cycles(a_Nk: Tensor, b_Nk: Tensor) -> float:
    """`cycle_knn` from the two lists of neighbours."""
    itself_N = torch.arange(len(a_Nk), device=a_Nk.device)
    pieces = zip(b_Nk.split(4096), itself_N.split(4096))
    return sum((a_Nk[b_bk] == i_b[:, None, None]).any(2).any(1).sum().item() for b_bk, i_b in pieces) / len(a_Nk)


@torch.no_grad()
def cka(a_ND: Tensor, b_NE: Tensor, *, kernel: str = "linear", sigma: float = 1.0) -> float:
    """Centered kernel alignment, HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) (Kornblith et al. 2019).

    Args:
        kernel: "linear", K_ij = a_i.a_j, or "rbf", K_ij = exp(-|a_i - a_j|^2 / (2 sigma^2)).
        sigma: of "rbf", in the features' own units: 1 is a sensible choice for unit rows alone.

    Raises:
        ValueError: as mutual_knn; all rows of a space equal leave nothing to align.
    """
    return align_kernels(_sums(a_ND, b_NE, "cka", kernel, sigma), KernelSums.hsic)


@torch.no_grad()
def unbiased_cka(a_ND: Tensor, b_NE: Tensor, *, kernel: str = "linear", sigma: float = 1.0) -> float:
    """CKA of the unbiased estimate of HSIC (Song et al. 2012, eq. 5): about 0 by chance, and below it at times.

    nan where that estimate of a space against itself is not positive, as it may be for a handful of samples.
    """
    if len(a_ND) < 4:
        raise ValueError(f"unbiased_cka needs at least 4 samples; there are {len(a_ND)}")
    return align_kernels(_sums(a_ND, b_NE, "unbiased_cka", kernel, sigma), KernelSums.unbiased_hsic)


def align_kernels(sums: KernelSums, hsic: Callable) -> float:
    """CKA of one of KernelSums' two estimates of HSIC."""
    return _ratio(hsic(sums, "a", "b"), hsic(sums, "a", "a"), hsic(sums, "b", "b"))


@torch.no_grad()
def cknna(a_ND: Tensor, b_NE: Tensor, k: int = 10) -> float:
    """CKA of unit rows over those pairs alone that are neighbours in both spaces (Huh et al. 2024, appendix A).

    Kernels are cosines, zeroed but for pairs (i, j) with j among i's neighbours in both spaces, and in its own space
    alone for the denominator; HSIC is the unbiased estimate. nan where the denominator is not positive.
    """
    check_pair(a_ND, b_NE, "cknna")
    return align_neighbours(a_ND, b_NE, nearest_neighbours(a_ND, k), nearest_neighbours(b_NE, k))


def align_neighbours(
    a_ND: Tensor, b_NE: Tensor, a_Nk: Tensor, b_Nk: Tensor, variances: tuple[Tensor, Tensor] | None = None
) -> float:
    """`cknna` from features and the two lists of neighbours, each in order of index.

    Args:
        variances: `neighbour_variance` of each, where they are at hand.
    """
    if a_Nk.shape[1] < 2 or len(a_ND) < 4:
        raise ValueError(
            f"cknna needs k of at least 2 and at least 4 samples; got k={a_Nk.shape[1]} and {len(a_ND)} samples"
        )
    near_a, near_b = _pair_numbers(a_Nk), _pair_numbers(b_Nk)
    both = _unbiased_hsic_of_neighbours(near_a[torch.isin(near_a, near_b)], a_ND, b_NE)
    return _ratio(both, *(variances or (neighbour_variance(a_ND, a_Nk), neighbour_variance(b_NE, b_Nk))))


def neighbour_variance(x_ND: Tensor, index_Nk: Tensor) -> Tensor:
    """HSIC of a space with itself over its own pairs of neighbours: what `cknna` divides by the root of."""
    return _unbiased_hsic_of_neighbours(_pair_numbers(index_Nk), x_ND, x_ND)


@torch.no_grad()
def svcca(a_ND: Tensor, b_NE: Tensor, *, num_directions: int = 10) -> float:
    """Mean canonical correlation of the two spaces' leading directions (Raghu et al. 2017).

    Columns are centred and divided by their standard deviation (+ 1e-8); the left singular vectors of the 10 largest
    singular values span each space; their canonical correlations are the cosines between the two spans. Exact and
    the same at each call: platonic-rep finds both by random or iterative approximations, with noise added.
    About 8 / (3 pi) sqrt(10 / N) by chance.
    """
    check_pair(a_ND, b_NE, "svcca")
    if len(a_ND) <= num_directions:
        raise ValueError(f"svcca of {num_directions} directions needs more samples than that; there are {len(a_ND)}")
    return correlate_spans(*leading_directions(a_ND, b_NE, num_directions))


def correlate_spans(a_NR: Tensor, b_NR: Tensor) -> float:
    """Mean canonical correlation of what two sets of orthonormal columns span."""
    return torch.linalg.svdvals(a_NR.T @ b_NR).mean().item()


def leading_directions(a_ND: Tensor, b_NE: Tensor, num_directions: int = 10) -> list[Tensor]:
    """The spans that `svcca` compares, [N, num_directions] each. Raises ValueError where features vary in fewer."""
    named = (a_ND, "the first"), (b_NE, "the second")
    return [_leading_directions(x, num_directions, name) for x, name in named]


@torch.no_grad()
def rsa_discrepancy(a_ND: Tensor, b_NE: Tensor, *, distance: str = "euclidean", normalize: str = "none") -> float:
    """1/N^2 sum_ij (K^A_ij - K^B_ij)^2, the RSA loss itself (paper, eq. 5): 0 for equal geometry, no upper end.

    `normalize="mean-distance"` makes it free of the spaces' scales. It asks nothing of single samples, and all rows
    equal are no error: their distances are 0.
    """
    check_pair(a_ND, b_NE, "rsa_discrepancy")
    dtype = torch.promote_types(at_least_fp32(a_ND).dtype, at_least_fp32(b_NE).dtype)
    return rsa_loss(a_ND.to(dtype), b_NE.to(dtype), distance=distance, normalize=normalize).item()


def clip_outliers(x: Tensor, quantile: float = 0.95, *, exact: bool = True) -> Tensor:
    """Features limited to [-q, q], platonic-rep's step before all its metrics; any shape with samples first, float32.

    Args:
        quantile: of the absolute values; 1 changes nothing.
        exact: q is the value of that rank over the whole tensor, the ceiling of exact interpolation. Otherwise it is
            the mean over samples of each sample's own quantile, as platonic-rep has it unless called with --precise.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile={quantile} is not above 0 and at most 1")
    x = at_least_fp32(x)
    if quantile == 1 or x.numel() == 0:
        return x
    if exact:
        limit = x.abs().flatten().kthvalue(int(quantile * x.numel()) + 1).values
    else:
        # Pieces of rows: torch.quantile takes 16 million numbers at most.
        pieces = x.flatten(1).split(max(1, 2**22 // x[0].numel()))
        limit = torch.cat([rows.abs().quantile(quantile, dim=1) for rows in pieces]).mean()
    return x.clamp(-limit, limit)


MUTUAL_KNN = "mutual-knn"
#: the metrics that k is for
NEIGHBOUR_METRICS = (MUTUAL_KNN, "cknna", "cycle-knn")
#: Of these lower is better.
DISCREPANCIES = ("rsa",)
#: by their names on the command line: of features a_ND and b_NE and k. Kernels are of unit rows, as in platonic-rep's
#: scores; neighbours depend on directions alone; the others take the features as they are.
METRICS: dict[str, Callable[[Tensor, Tensor, int], float]] = {
    MUTUAL_KNN: mutual_knn,
    "cka": lambda a_ND, b_NE, k: cka(*to_unit_rows(a_ND, b_NE)),
    "cka-rbf": lambda a_ND, b_NE, k: cka(*to_unit_rows(a_ND, b_NE), kernel="rbf"),
    "unbiased-cka": lambda a_ND, b_NE, k: unbiased_cka(*to_unit_rows(a_ND, b_NE)),
    "cknna": cknna,
    "cycle-knn": cycle_knn,
    "svcca": lambda a_ND, b_NE, k: svcca(a_ND, b_NE),
    "rsa": lambda a_ND, b_NE, k: rsa_discrepancy(a_ND, b_NE),
}


def least_samples(metric: str, k: int) -> int:
    """How many samples one of METRICS needs.

    With k + 1 all others are a sample's neighbours. Two samples have one distance, in whatever space: their CKA is 1.
    """
    least = {"cka": 3, "cka-rbf": 3, "unbiased-cka": 4, "cknna": max(4, k + 1), "svcca": 11, "rsa": 2}
    return least.get(metric, k + 1)


def describe_too_few(metric: str, k: int, num_samples: int) -> str | None:
    """One line where a metric says nothing of so many samples, else None."""
    least = least_samples(metric, k)
    return f"too few pairs ({num_samples}; need at least {least})" if num_samples < least else None


def find_chance(metric: str, k: int, num_samples: int) -> float | None:
    """What unrelated spaces are expected to get where that is known without them: k / (N - 1) of mutual-kNN."""
    if metric != MUTUAL_KNN or describe_too_few(metric, k, num_samples):
        return None
    return k / (num_samples - 1)


def to_unit_rows(*features: Tensor) -> list[Tensor]:
    """As kernels take them: float64, so that rows of one direction come out equal."""
    return [unit_rows(x.double()) for x in features]


def check_pair(a_ND: Tensor, b_NE: Tensor, metric: str) -> None:
    """Raise ValueError unless these are features of the same samples."""
    check_features(a_ND, "the first features")
    check_features(b_NE, "the second features")
    if len(a_ND) != len(b_NE):
        raise ValueError(f"{metric} compares the same samples: got {len(a_ND)} and {len(b_NE)} rows")


def _sums(a_ND, b_NE, metric: str, kernel: str, sigma: float) -> KernelSums:
    check_pair(a_ND, b_NE, metric)
    if len(a_ND) < 2:
        raise ValueError(f"{metric} needs at least 2 samples; there are {len(a_ND)}")
    return kernel_sums(a_ND, b_NE, kernel=kernel, sigma=sigma)


def _ratio(both: Tensor, first: Tensor, second: Tensor) -> float:
    """both / sqrt(first second); nan where one of those is no variance."""
    return (both / (first * second).sqrt()).item() if first > 0 and second > 0 else float("nan")


def _pair_numbers(index_Nk: Tensor) -> Tensor:
    """Pairs (i, j), j a neighbour of i, as i N + j: [N k], rising."""
    num_rows = len(index_Nk)
    return (num_rows * torch.arange(num_rows, device=index_Nk.device)[:, None] + index_Nk).flatten()


def _unbiased_hsic_of_neighbours(pairs_M: Tensor, first_ND: Tensor, second_NE: Tensor) -> Tensor:
    """Of cosine kernels that are zero but for these pairs; not symmetric, as being a neighbour is not."""
    n = len(first_ND)
    i_M, j_M = pairs_M // n, pairs_M % n
    k_M, l_M = (pair_cosines(x, row_norms(x), i_M, j_M) for x in (first_ND, second_NE))
    # tr(KL) pairs K_ij with L_ji: where (j, i) is among the pairs too.
    mirrored_M = j_M * n + i_M
    place_M = torch.searchsorted(pairs_M, mirrored_M).clamp_max(max(len(pairs_M) - 1, 0))
    trace = (k_M * l_M[place_M])[pairs_M[place_M] == mirrored_M].sum()
    columns_k_N, rows_l_N = torch.bincount(j_M, k_M, minlength=n), torch.bincount(i_M, l_M, minlength=n)
    return unbiased_hsic(trace, k_M.sum() * l_M.sum(), columns_k_N @ rows_l_N, n)


def _leading_directions(x_ND: Tensor, num_directions: int, name: str) -> Tensor:
    """Left singular vectors of the largest singular values of the standardised features, [N, num_directions]."""
    x_ND = x_ND.double()
    x_ND = x_ND - x_ND.mean(0)
    x_ND /= x_ND.std(0) + 1e-8
    # From the smaller of the two Gram matrices, whose eigenvalues are the squares.
    wide = x_ND.shape[0] <= x_ND.shape[1]
    square, vectors = torch.linalg.eigh(x_ND @ x_ND.T if wide else x_ND.T @ x_ND)
    rank = int((square > square[-1] * max(x_ND.shape) * torch.finfo(torch.float64).eps).sum()) if square[-1] > 0 else 0
    if rank < num_directions:
        raise ValueError(f"svcca of {num_directions} directions: {name} features vary in {rank} only; ask for fewer")
    vectors = vectors[:, -num_directions:]
    return vectors if wide else x_ND @ vectors / square[-num_directions:].sqrt()
