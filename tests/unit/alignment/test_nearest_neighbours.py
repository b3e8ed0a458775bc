"""nearest_neighbours: the sets of the definition, whatever the blocks, the precision of products and the ties."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from rsa_megatron.alignment.nearest_neighbours import _decide, nearest_neighbours, shared_neighbours
from rsa_megatron.alignment.neighbour_candidates import Candidates, CentredRows
from tests.support.naive_metrics import neighbour_sets

PRODUCTS = (torch.float32, torch.bfloat16)


def rows(num_samples=90, width=16, seed=0):
    return torch.randn(num_samples, width, generator=torch.Generator().manual_seed(seed))


def narrow_cone(num_samples=400, width=64):
    """As language models' features lie: a large common mean, one dimension much larger than all others."""
    x_ND = rows(num_samples, width) * torch.arange(1, width + 1) ** -0.5 + 10 * rows(1, width, seed=1)
    x_ND[:, 7] += 100
    return x_ND


def by_sorting(x_ND, k):
    """[N, k] from the whole matrix of float64 cosines; for features without ties."""
    u_ND = torch.nn.functional.normalize(x_ND.double())
    return (u_ND @ u_ND.T).fill_diagonal_(-2).argsort(descending=True)[:, :k].sort().values


def sets(index_Nk):
    return [set(index_k.tolist()) for index_k in index_Nk]


@pytest.mark.parametrize("product_dtype", PRODUCTS)
@pytest.mark.parametrize("block_rows", (7, 32, 1024))
def test_the_sets_are_those_of_the_definition(product_dtype, block_rows):
    x_ND = rows()
    for k in (1, 5, 60, 88, 89):  # 89 is everyone else
        index_Nk = nearest_neighbours(x_ND, k, block_rows=block_rows, product_dtype=product_dtype)
        assert index_Nk.shape == (90, k) and index_Nk.dtype == torch.int64
        assert sets(index_Nk) == neighbour_sets(x_ND, k)
        assert torch.equal(index_Nk, index_Nk.sort(dim=1).values)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
@pytest.mark.parametrize("product_dtype", PRODUCTS)
def test_features_of_any_float_type(dtype, product_dtype):
    x_ND = rows(300, 48).to(dtype)
    before = x_ND.clone()
    assert torch.equal(nearest_neighbours(x_ND, 10, product_dtype=product_dtype), by_sorting(x_ND, 10))
    assert torch.equal(x_ND, before)


def test_more_samples_than_are_worth_timing_and_blocks_that_do_not_divide_them():
    x_ND = rows(2500, 40)
    assert torch.equal(nearest_neighbours(x_ND, 10, block_rows=601), by_sorting(x_ND, 10))


@pytest.mark.parametrize("product_dtype", PRODUCTS)
def test_features_in_a_narrow_cone(product_dtype):
    # Cosines between 0.9997 and 1; bfloat16 has nothing between 0.996 and 1.
    x_ND = narrow_cone()
    assert torch.equal(nearest_neighbours(x_ND, 10, block_rows=64, product_dtype=product_dtype), by_sorting(x_ND, 10))


def spiked(num_samples=400, width=256):
    """A few rows with one huge entry, heavy tails, near copies and samples in order of their direction."""
    x_ND = rows(num_samples, width) ** 5
    x_ND[::50, 3] += 1e4
    x_ND[1::3] = x_ND[::3][: len(x_ND[1::3])] + 1e-3 * rows(len(x_ND[1::3]), width, seed=4)
    return x_ND[x_ND[:, 0].argsort()]


@pytest.mark.parametrize("product_dtype", PRODUCTS)
def test_features_with_spikes_near_copies_and_an_order(product_dtype):
    x_ND = spiked()
    assert torch.equal(nearest_neighbours(x_ND, 10, block_rows=64, product_dtype=product_dtype), by_sorting(x_ND, 10))


def dominated(kind, ratio, num_samples=60, width=16):
    """One column, two or a common mean `ratio` times as large as what the rows differ by."""
    x_ND = rows(num_samples, width)
    if kind == "constant":
        x_ND[:, 3] = ratio
    elif kind == "of one sign":
        x_ND[:, 3] = ratio * (1 + 0.1 * x_ND[:, 3])
    elif kind == "of both signs":
        x_ND[:, 3] *= ratio
    elif kind == "two":
        x_ND[:, [3, 8]] *= ratio
    else:
        x_ND += ratio * (torch.ones(width) if kind == "mean" else rows(1, width, seed=5))
    return x_ND


DOMINATED = ("constant", "of one sign", "of both signs", "two", "mean", "means")


def by_fractions(x_ND, k):
    """[N, k] from cosines that are never rounded: their squares with their sign, in fractions of whole numbers."""
    table = [[Fraction(number) for number in row] for row in x_ND.double().tolist()]
    square = [sum(number * number for number in row) for row in table]
    found = []
    for i, row in enumerate(table):
        dots = [sum(p * q for p, q in zip(row, other)) for other in table]
        # cos_ij |cos_ij| |x_i|^2, in the order of cos_ij
        order = sorted((-dot * abs(dot) / square[j], j) for j, dot in enumerate(dots) if j != i)
        found.append(sorted(j for _, j in order[:k]))
    return torch.tensor(found)


@pytest.mark.parametrize("ratio", (1e2, 3e3, 1e6))
@pytest.mark.parametrize("kind", DOMINATED)
def test_a_dominating_column_hides_no_neighbours(kind, ratio):
    """Cosines then differ by 1 / ratio^2: by 1e-13 between these rows at 1e6."""
    x_ND = dominated(kind, ratio)
    for k in (5, 40):  # 40: also among rows of the other sign, at cosines near -1
        expected = by_fractions(x_ND, k)
        for product_dtype in PRODUCTS:
            assert torch.equal(nearest_neighbours(x_ND, k, product_dtype=product_dtype), expected), k


@pytest.mark.parametrize("kind", DOMINATED)
def test_a_dominating_column_of_many_rows(kind):
    """Against differences of float64 unit rows, by all pairs."""
    x_ND = dominated(kind, 3e3, 600, 96)
    u_ND = torch.nn.functional.normalize(x_ND.double())
    near_NN = torch.cdist(u_ND, u_ND, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(9)
    expected = near_NN.argsort()[:, :10].sort().values
    for product_dtype in PRODUCTS:
        assert torch.equal(nearest_neighbours(x_ND, 10, block_rows=128, product_dtype=product_dtype), expected)


def test_cosines_in_steps_of_a_billionth_would_not_do():
    """Negative control: most rows have other neighbours then, as they had."""
    x_ND = dominated("means", 1e4)
    u_ND = torch.nn.functional.normalize(x_ND.double())
    steps_NN = (u_ND @ u_ND.T).fill_diagonal_(-2).mul_(2**30).round_()
    coarse = steps_NN.sort(dim=1, descending=True, stable=True).indices[:, :5].sort().values
    assert (coarse != nearest_neighbours(x_ND, 5)).any(dim=1).sum() > 30


def test_ordinary_features_need_no_second_look_at_all_rows():
    """The rows that have more near ones than candidates: none of these, but each where a column has both signs."""
    shares = {}
    for name, x_ND in (
        ("normal", rows(2000, 512)),
        ("cone", narrow_cone(2000, 512)),
        ("constant", dominated("constant", 3e3, 2000, 512)),
        ("both", dominated("of both signs", 3e3, 2000, 512)),
    ):
        _, undecided_N = _decide(Candidates(CentredRows(x_ND, torch.float32), 10).sweep(1024))
        shares[name] = undecided_N.double().mean().item()
    assert shares["normal"] == shares["cone"] == shares["constant"] == 0 and shares["both"] > 0.5


@pytest.mark.parametrize("product_dtype", PRODUCTS)
@pytest.mark.parametrize(
    "x_ND",
    (
        rows(500, 1000),
        rows(500, 16),
        narrow_cone(),
        spiked(),
        rows(20, 300).repeat(20, 1),
        dominated("constant", 3e3, 300, 200),
        dominated("of both signs", 3e3, 300, 200),
    ),
)
def test_no_two_products_err_by_more_than_the_margin(x_ND, product_dtype):
    """Then two products of a row that are further apart than the margin stand in their true order."""
    every, centred = slice(None), CentredRows(x_ND, product_dtype)
    product_NN = centred.left(every) @ centred.right(every).T
    share_NN = differences_of_errors(x_ND, product_NN) / centred.margin(every, product_NN.T.float()).T
    assert share_NN.max() <= 1
    # And is not set so high that it costs all the time. Libraries add up float32 in blocks, which errs less than the worst order.
    assert share_NN.max() > (0.02 if product_dtype == torch.bfloat16 else 0.0004)


def test_the_margin_holds_in_the_worst_order_of_sums():
    """Beside one large term small ones that are alike are all rounded the same way if it comes first."""
    sign_N1, other_N1 = (rows(20, 1, seed=seed).sign() for seed in (1, 2))
    x_ND = 0.5 * sign_N1 * rows(1, 3000).sign() + 0.01 * rows(20, 3000)
    x_ND[:, :1] = 3e3 * other_N1
    every, centred = slice(None), CentredRows(x_ND, torch.float32)
    left_NF, right_NF = centred.left(every).numpy(), centred.right(every).numpy()
    in_turn_NN = torch.tensor(np.cumsum(left_NF[:, None] * right_NF[None], axis=2, dtype=np.float32)[..., -1])
    difference_NN = differences_of_errors(x_ND, in_turn_NN)
    assert (difference_NN <= centred.margin(every, in_turn_NN.T).T).all()
    by_the_root = 4 * torch.finfo(torch.float32).eps * 3000**0.5  # as if roundings were independent
    assert difference_NN.max() > by_the_root


def differences_of_errors(x_ND, product_NN):
    """By how much at most each product of a row errs more, or less, than another of that row."""
    u_ND = torch.nn.functional.normalize(x_ND.double())
    error_NN = product_NN.double() - u_ND @ u_ND.T
    error_NN.diagonal().copy_(error_NN.median(dim=1).values)  # a row is not compared with itself
    return torch.maximum(error_NN.amax(dim=1, keepdim=True) - error_NN, error_NN - error_NN.amin(dim=1, keepdim=True))


def test_without_the_margin_of_error_bfloat16_products_would_not_do(monkeypatch):
    monkeypatch.setattr(CentredRows, "margin", lambda self, rows, value_b: torch.zeros_like(value_b))
    x_ND = rows(2000, 32)
    wrong = nearest_neighbours(x_ND, 10, product_dtype=torch.bfloat16) != by_sorting(x_ND, 10)
    assert wrong.any(dim=1).sum() > 10


@pytest.mark.parametrize("product_dtype", PRODUCTS)
@pytest.mark.parametrize("copies", (3, 40))  # 40 equal rows are more than the k + 22 candidates
def test_of_equal_rows_the_smaller_index_goes_first(product_dtype, copies):
    x_ND = rows(30, 24).repeat(copies, 1)[torch.randperm(30 * copies, generator=torch.Generator().manual_seed(1))]
    expected = None
    for block_rows in (41, 256, 2048):
        index_Nk = nearest_neighbours(x_ND, 4, block_rows=block_rows, product_dtype=product_dtype)
        expected = index_Nk if expected is None else expected
        assert torch.equal(index_Nk, expected)
    if copies == 3:
        assert sets(expected) == neighbour_sets(x_ND, 4)
    else:  # four of a row's own copies, the first there are
        for i in range(0, len(x_ND), 13):
            own = (x_ND == x_ND[i]).all(1).nonzero()[:, 0]
            assert expected[i].tolist() == own[own != i][:4].tolist()


def test_multiples_of_a_row_are_its_equals():
    x_ND = rows(20)
    # 3 and 0.7 round each number by 6e-8; a cosine of 1 changes by the square of that.
    x_ND[[3, 8, 15]] = x_ND[3] * torch.tensor([[1.0], [3.0], [0.7]])
    index_Nk = nearest_neighbours(x_ND, 1)
    assert index_Nk[[3, 8, 15], 0].tolist() == [8, 3, 3]


def test_a_zero_row_is_as_near_to_all():
    x_ND = rows(40)
    x_ND[[10, 20]] = 0.0
    index_Nk = nearest_neighbours(x_ND, 3)
    assert index_Nk[10].tolist() == index_Nk[20].tolist() == [0, 1, 2]
    assert sets(index_Nk) == neighbour_sets(x_ND, 3)


def test_lengths_from_1e_minus_30_to_1e30_change_nothing():
    x_ND = rows()
    scale_N1 = 10.0 ** torch.linspace(-30, 30, 90)[:, None]
    assert torch.equal(nearest_neighbours(x_ND * scale_N1, 5), nearest_neighbours(x_ND, 5))


def test_rows_turned_scaled_and_permuted():
    x_ND, order = rows(width=16), torch.randperm(90, generator=torch.Generator().manual_seed(2))
    rotation, _ = torch.linalg.qr(rows(16, 16, seed=3).double())
    index_Nk = nearest_neighbours(x_ND, 5)
    assert torch.equal(nearest_neighbours(0.3 * x_ND.double() @ rotation, 5), index_Nk)
    assert torch.equal(order[nearest_neighbours(x_ND[order], 5)].sort().values, index_Nk[order])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.float64))
def test_a_gpu_finds_the_same(dtype):
    for x_ND in (rows(5000, 96).to(dtype), narrow_cone().to(dtype), rows(30, 24).repeat(40, 1).to(dtype)):
        for block_rows in (512, None):
            on_gpu = nearest_neighbours(x_ND.cuda(), 10, block_rows=block_rows)
            assert torch.equal(on_gpu.cpu(), nearest_neighbours(x_ND, 10))


def test_errors_name_the_rows():
    x_ND = rows()
    for value in (float("nan"), float("inf"), float("-inf")):
        bad = x_ND.clone()
        bad[[4, 17, 60], 3] = value
        with pytest.raises(ValueError, match=r"3 of 90 rows hold NaN or infinity \(4, 17, 60\); leave them out"):
            nearest_neighbours(bad, 5)
    with pytest.raises(ValueError, match=r"90 of 90 rows hold NaN or infinity \(0, 1, 2, 3, 4, ...\)"):
        nearest_neighbours(x_ND * float("nan"), 5)
    large = torch.full((4, 8), 60000.0, dtype=torch.float16)  # its sum is infinite, its numbers are not
    assert nearest_neighbours(large * torch.eye(4, 8).half() + 1, 1).shape == (4, 1)


@pytest.mark.parametrize("num_samples", (0, 1, 5))
def test_too_few_samples_are_named(num_samples):
    with pytest.raises(ValueError, match=f"k=5 neighbours need at least k \\+ 1 samples; there are {num_samples}"):
        nearest_neighbours(rows(num_samples), 5)
    with pytest.raises(ValueError, match="k=0 neighbours"):
        nearest_neighbours(rows(), 0)


@pytest.mark.parametrize("x", (rows()[0], rows().long(), rows()[:, :0]))
def test_what_is_no_matrix_of_floats_is_refused(x):
    with pytest.raises(ValueError, match="must be a matrix of floats, a row for each sample: got"):
        nearest_neighbours(x, 5)


@pytest.mark.parametrize("x_ND", (torch.ones(50, 8), torch.zeros(50, 8), torch.arange(1, 51)[:, None] * rows(1)))
@pytest.mark.parametrize("k", (5, 49))
def test_rows_that_all_point_one_way_have_no_neighbours(x_ND, k):
    with pytest.raises(ValueError, match="all 50 rows are equal or point the same way: there are no neighbours"):
        nearest_neighbours(x_ND, k)


def test_shared_neighbours_by_hand():
    a_Nk, b_Nk = torch.tensor([[1, 2], [0, 3], [0, 1]]), torch.tensor([[2, 1], [3, 2], [4, 3]])
    assert shared_neighbours(a_Nk, b_Nk) == pytest.approx((2 + 1 + 0) / 6)
    with pytest.raises(ValueError, match=r"\(3, 2\) against \(2, 2\)"):
        shared_neighbours(a_Nk, b_Nk[:2])
