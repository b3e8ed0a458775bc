"""Which samples are nearest to which, by cosine similarity: exact sets, without an N x N matrix.

The first pass (neighbour_candidates.py) leaves k + 22 candidates a row, by products that err by a known margin. The second takes
up those that are nearer than that to the boundary between rank k and k + 1, and computes them in float64 from differences of
rows. A row with more of them than candidates, such as one of many equal rows, is multiplied with all rows in float64 before.

What is compared in the end are squared distances of unit rows, 2 - 2 cos, in relative steps of 2^-30 (1e-9): finer than
float32 features tell them apart, however near they are, since a large mean or one dominating column may leave 1e-12 of a cosine
for all differences. Equally near are rows within a step, and those that differ from a row by no more than rounding its
multiples to float32 does; the smaller index goes first. Block size, thread count, device and the precision of products that
the process allows change the order of sums, and so not the result.

Shapes: N rows, D width, k neighbours, C candidates; b rows of a block.
"""

import time

import torch
from torch import Tensor

from rsa_megatron.alignment.neighbour_candidates import (
    DISTANCE_STEPS,
    Candidates,
    CentredRows,
    slices,
)
from rsa_megatron.alignment.pairwise_kernel import float32_products

# 1024 x 1024 products are 4 MiB in float32: near the CPU's cache, and large enough for the full rate of products. On a
# GPU each block costs some dozen launches: 8192 x 8192 are 256 MiB.
_BLOCK_ROWS = {"cpu": 1024, "cuda": 8192}
# Above this share of rows that bfloat16 cannot decide, float32 for all costs less than float64 for those.
_UNDECIDED_SHARE = 0.05
# Fewer samples are multiplied sooner than timed.
_SAMPLES_WORTH_TIMING = 2048
_FIRST, _LAST = torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min
# Nearness is below 2^7 in steps of 2^-30: so many bits are left for the index.
_INDEX_BITS = 25


@torch.no_grad()
@float32_products()
def nearest_neighbours(
    x_ND: Tensor, k: int, *, block_rows: int | None = None, product_dtype: torch.dtype | None = None
) -> Tensor:
    """The k rows of largest cosine similarity to each row, itself left out: [N, k] in int64, in order of index.

    A set for each row: which of the k is the nearest is not returned. Squared distances of unit rows (2 - 2 cos) within a
    billionth of each other are ties, and so are rows of one direction; the smaller index goes first. A zero row has
    cosine 0 with every other.

    Args:
        x_ND: features of any float type, on the CPU or a GPU.
        k: neighbours.
        block_rows: rows multiplied at a time; by default 1024, on a GPU 8192. Memory beside the features is one copy
            of them in `product_dtype` and some block_rows x block_rows blocks. No effect on the result.
        product_dtype: of the first pass, bfloat16 or float32; by default the faster of the two, timed for an
            instant (on a GPU float32). No effect on the result either.

    Raises:
        ValueError: when there are no k other rows, rows hold NaN or infinity, or all point the same way.
    """
    check_features(x_ND)
    num_rows = len(x_ND)
    if not 0 < k < num_rows:
        raise ValueError(f"k={k} neighbours need at least k + 1 samples; there are {num_rows}")
    if num_rows > 2**_INDEX_BITS:
        raise ValueError(f"neighbours are found among at most {2**_INDEX_BITS} samples; there are {num_rows}")
    block_rows = block_rows or _BLOCK_ROWS.get(x_ND.device.type, 1024)
    for dtype in [product_dtype] if product_dtype else _worth_trying(x_ND):
        rows = CentredRows(x_ND, dtype)
        if rows.all_equal:
            raise ValueError(f"all {num_rows} rows are equal or point the same way: there are no neighbours to compare")
        if k == num_rows - 1:
            return _all_others(num_rows, x_ND.device)
        index_Nk, undecided_N = _decide(Candidates(rows, k).sweep(block_rows))
        if dtype == torch.float32 or undecided_N.sum() <= _UNDECIDED_SHARE * num_rows:
            break
    _compare_with_all(rows, index_Nk, undecided_N.nonzero()[:, 0], block_rows)
    return index_Nk.sort(dim=1).values


def shared_neighbours(a_Nk: Tensor, b_Nk: Tensor) -> float:
    """Mean share of a sample's neighbours that two lists have in common; each holds a row's without repetition."""
    if a_Nk.shape != b_Nk.shape:
        raise ValueError(f"lists of neighbours must pair up: {tuple(a_Nk.shape)} against {tuple(b_Nk.shape)}")
    common = sum((a_bk[:, :, None] == b_bk[:, None, :]).sum() for a_bk, b_bk in zip(a_Nk.split(4096), b_Nk.split(4096)))
    return common.item() / a_Nk.numel()


def check_features(x_ND: Tensor, name: str = "features") -> None:
    """Raise ValueError unless x_ND is a matrix of finite floats with at least one column."""
    if x_ND.dim() != 2 or not x_ND.is_floating_point() or x_ND.shape[1] == 0:
        raise ValueError(
            f"{name} must be a matrix of floats, a row for each sample: got {x_ND.dtype} {tuple(x_ND.shape)}"
        )
    if len(x_ND) == 0 or x_ND.sum().isfinite():
        return
    finite_N = torch.cat([x_bD.isfinite().all(dim=1) for x_bD in x_ND.split(1024)])
    if not finite_N.all():  # a sum may overflow where no number is infinite
        bad = (~finite_N).nonzero()[:, 0].tolist()
        numbers = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise ValueError(f"{name}: {len(bad)} of {len(finite_N)} rows hold NaN or infinity ({numbers}); leave them out")


def _worth_trying(x_ND: Tensor) -> list[torch.dtype]:
    """bfloat16 and then float32; float32 alone where it is no slower or the products take no time."""
    # GPUs may add up bfloat16 products in bfloat16, which the margin of error does not know.
    if x_ND.device.type != "cpu" or len(x_ND) < _SAMPLES_WORTH_TIMING:
        return [torch.float32]
    dtypes = (torch.bfloat16, torch.float32)
    turns = [[_product_seconds(dtype) for dtype in dtypes] for _ in range(3)]
    bfloat16_s, float32_s = map(min, zip(*turns))
    return list(dtypes) if bfloat16_s < float32_s else [torch.float32]


def _product_seconds(dtype: torch.dtype) -> float:
    x = torch.ones(512, 512, dtype=dtype)  # a millisecond or two
    start = time.perf_counter()
    x @ x
    return time.perf_counter() - start


def _all_others(num_rows: int, device: torch.device) -> Tensor:
    all_NN = torch.arange(num_rows, device=device).repeat(num_rows, 1)
    return all_NN[~torch.eye(num_rows, dtype=torch.bool, device=device)].view(num_rows, num_rows - 1)


def _decide(best: Candidates) -> tuple[Tensor, Tensor]:
    """The k neighbours of each row, and for which rows there were too few candidates to tell."""
    value_NC, k = best.value_NC, best.k
    num_rows, num_candidates = value_NC.shape
    least_N = best.least(slice(None))
    undecided_N = (value_NC[:, -1] >= least_N) & (num_candidates < num_rows - 1)
    # Above the k + 1-st by more than the margin: k of all rows at most can be so.
    most_N = value_NC[:, k] + best.rows.margin(slice(None), value_NC[:, k])
    rank_NC = _rank_near_boundary(
        best.rows, torch.arange(num_rows, device=value_NC.device), best.index_NC, value_NC, least_N, most_N, undecided_N
    )
    return best.index_NC.gather(1, rank_NC.topk(k, dim=1).indices), undecided_N


def _rank_near_boundary(
    rows: CentredRows,
    chosen_b: Tensor,
    index_bC: Tensor,
    value_bC: Tensor,
    least_b: Tensor,
    most_b: Tensor,
    left_out_b: Tensor | None = None,
) -> Tensor:
    """Rank the candidates of some rows, [b, C]: first whose product is above `most`, last below `least`, exactly between."""
    inside_bC = value_bC > most_b[:, None]
    between_bC = ~inside_bC & (value_bC >= least_b[:, None])
    if left_out_b is not None:
        between_bC &= ~left_out_b[:, None]
    rank_bC = torch.where(inside_bC, _FIRST, _LAST)
    row, column = between_bC.nonzero(as_tuple=True)
    other = index_bC[row, column]
    rank_bC[row, column] = _rank(rows.nearness(chosen_b[row], other), other)
    return rank_bC


def _rank(nearness: Tensor, index: Tensor) -> Tensor:
    """A whole number, larger for the nearer, and of the equally near for the one of smaller index."""
    return (nearness * DISTANCE_STEPS).round_().long() * 2**_INDEX_BITS - index


def _compare_with_all(rows: CentredRows, index_Nk: Tensor, undecided: Tensor, block_rows: int) -> None:
    """Write down the neighbours of the rows numbered `undecided`, from their float64 products with all rows."""
    num_rows, k = index_Nk.shape
    every_N = torch.arange(num_rows, device=undecided.device)
    for piece in slices(len(undecided), max(1, 2**23 // num_rows)):  # 64 MiB of products, as much of ranks
        chosen = undecided[piece]
        value_bN, margin_b = rows.float64_products(chosen, block_rows)
        value_bN.scatter_(1, chosen[:, None], float("-inf"))
        last_b, next_b = value_bN.topk(k + 1, dim=1).values[:, k - 1 :].unbind(1)
        index_bN = every_N.expand_as(value_bN)
        rank_bN = _rank_near_boundary(rows, chosen, index_bN, value_bN, last_b - margin_b, next_b + margin_b)
        index_Nk[chosen] = rank_bN.topk(k, dim=1).indices
