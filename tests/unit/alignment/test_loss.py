"""rsa_loss is eq. 5, in value and gradient, whatever the rows; its share over ranks is the whole."""

import pytest
import torch

from rsa_megatron.alignment import loss as loss_module
from rsa_megatron.alignment.distances import DISTANCES, Manhattan, pairwise_distance
from rsa_megatron.alignment.loss import NORMALIZATIONS, rsa_loss, rsa_loss_reference
from tests.support.loss_cases import pairs, relative, value_and_gradients

SETTINGS = [(d, n) for d in DISTANCES for n in NORMALIZATIONS]


BLOCK = loss_module._BLOCK


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks smaller than the inputs, so that every test crosses their borders."""
    monkeypatch.setattr(loss_module, "_BLOCK", {"cpu": (5, 9)})
    monkeypatch.setattr(Manhattan, "block_shape", (7, 7))


def test_reference_is_equation_5_by_hand():
    # |v1 - v2| = 5, |v1 - v3| = 0, |v2 - v3| = 5; |t1 - t2| = 1, |t1 - t3| = 2, |t2 - t3| = 1
    v_ND = torch.tensor([[0.0, 0], [3, 4], [0, 0]])
    t_NE = torch.tensor([[0.0], [1], [2]])
    expected = 2 * ((5 - 1) ** 2 + (0 - 2) ** 2 + (5 - 1) ** 2) / 9
    assert rsa_loss_reference(v_ND, t_NE).item() == pytest.approx(expected)
    assert rsa_loss(v_ND, t_NE).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "distance, expected",
    [
        ("euclidean", 5.0),
        ("sqeuclidean", 25.0),
        ("manhattan", 7.0),
        ("cosine", 1 - 3 / 5),
    ],
)
def test_distances_by_hand(distance, expected):
    rows = torch.tensor([[1.0, 0], [4, 4]]) if distance != "cosine" else torch.tensor([[2.0, 0], [3, 4]])
    k_NN = pairwise_distance(rows, distance=distance)
    assert k_NN[0, 1].item() == pytest.approx(expected)
    assert torch.equal(k_NN.diagonal(), torch.zeros(2))


@pytest.mark.parametrize("distance, normalize", SETTINGS)
def test_blocked_equals_reference_in_float64(distance, normalize):
    settings = dict(distance=distance, normalize=normalize)
    expected = value_and_gradients(rsa_loss_reference, *pairs(), **settings)
    actual = value_and_gradients(rsa_loss, *pairs(), **settings)
    for a, e in zip(actual, expected):
        assert relative(a, e) < 1e-13  # some hundred roundings of 1e-16


@pytest.mark.parametrize("distance, normalize", SETTINGS)
def test_gradcheck(distance, normalize):
    v_ND, t_NE = pairs(num_pairs=9)
    assert torch.autograd.gradcheck(lambda v, t: rsa_loss(v, t, distance=distance, normalize=normalize), (v_ND, t_NE))


def test_gradcheck_would_see_a_wrong_factor():
    v_ND, t_NE = pairs(num_pairs=9)

    def wrong(v, t):
        value = rsa_loss(v, t)
        return value.detach() + 0.99 * (value - value.detach())

    assert not torch.autograd.gradcheck(wrong, (v_ND, t_NE), raise_exception=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distance", DISTANCES)
def test_arithmetic_is_float32_whatever_the_input(dtype, distance):
    v_ND, t_NE = (x.detach().to(dtype).requires_grad_() for x in pairs())
    value, *gradients = value_and_gradients(rsa_loss, v_ND, t_NE, distance=distance)
    exact_inputs = (x.detach().double().requires_grad_() for x in (v_ND, t_NE))
    expected, *expected_gradients = value_and_gradients(rsa_loss_reference, *exact_inputs, distance=distance)
    assert value.dtype == torch.float32
    assert relative(value, expected) < 1e-6  # float32: 23 pairs of 1e-7; bf16 arithmetic would be off by 1e-2
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert gradient.dtype == dtype
        # the gradient is rounded to the input's type at the very end
        assert relative(gradient, expected_gradient) < max(torch.finfo(dtype).eps, 2e-6)


def test_products_keep_their_digits_whatever_the_process_allows():
    rows = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    expected = value_and_gradients(rsa_loss, rows.clone().requires_grad_(), rows[:, :9].clone().requires_grad_())
    torch.set_float32_matmul_precision("medium")  # bf16 on CPUs that have it, TF32 on GPUs
    try:
        actual = value_and_gradients(rsa_loss, rows.clone().requires_grad_(), rows[:, :9].clone().requires_grad_())
        assert all(torch.equal(a, e) for a, e in zip(actual, expected))
        assert torch.get_float32_matmul_precision() == "medium"  # and the process has its setting back
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "manhattan"])
def test_a_large_common_offset_costs_no_digits(distance):
    v_ND, t_NE = (x.detach() * 1e-2 for x in pairs())
    moved = [(x + 1000).float() for x in (v_ND, t_NE)]  # what float32 keeps of rows far from the origin
    expected = value_and_gradients(rsa_loss_reference, *(x.double().requires_grad_() for x in moved), distance=distance)
    actual = value_and_gradients(rsa_loss, *(x.requires_grad_() for x in moved), distance=distance)
    for a, e in zip(actual, expected):
        assert relative(a, e) < 2e-6  # the noise floor of float32, as without an offset


def test_without_centring_the_offset_does_cost_digits():
    rows = (pairs()[0].detach() * 1e-2 + 1000).float()
    uncentred = rows.square().sum(1)[:, None] + rows.square().sum(1)[None] - 2 * rows @ rows.T
    exact = pairwise_distance(rows.double()).square()
    assert (uncentred - exact).abs().max() > exact.max()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("case", ["duplicates", "zero rows", "all equal", "one pair", "no pair"])
def test_degenerate_rows_give_finite_values(case, distance, normalize):
    v_ND, t_NE = (x.detach() for x in pairs())
    if case == "duplicates":
        v_ND[5], t_NE[7] = v_ND[3], t_NE[3]
    elif case == "zero rows":
        v_ND[2], t_NE[2], v_ND[4] = 0, 0, 0
    elif case == "all equal":
        v_ND[:], t_NE[:] = v_ND[0], t_NE[0]
    elif case in ("one pair", "no pair"):
        v_ND, t_NE = (x[: int(case == "one pair")] for x in (v_ND, t_NE))
    settings = dict(distance=distance, normalize=normalize)
    expected = value_and_gradients(rsa_loss_reference, v_ND.requires_grad_(), t_NE.requires_grad_(), **settings)
    actual = value_and_gradients(rsa_loss, v_ND, t_NE, **settings)
    for a, e in zip(actual, expected):
        assert a.isfinite().all() and e.isfinite().all()
        assert torch.allclose(a, e, rtol=1e-12, atol=1e-13)
    if case in ("all equal", "one pair", "no pair"):
        assert all((a == 0).all() for a in actual)


def test_duplicate_rows_are_at_distance_0_in_wide_float32():
    # 3584 products of one dot product round many times: what is left of |x - x|^2 must count as nothing.
    rows = torch.randn(64, 3584, generator=torch.Generator().manual_seed(0)) * 3
    rows[32:] = rows[:32]
    value, v_gradient, _ = value_and_gradients(
        rsa_loss, rows.clone().requires_grad_(), torch.zeros(64, 2, requires_grad=True)
    )
    expected = rsa_loss_reference(rows.double(), torch.zeros(64, 2).double())
    assert relative(value, expected) < 1e-6
    assert v_gradient.isfinite().all()
    kernel = loss_module.PairwiseKernel(rows, "euclidean")
    assert (kernel.block(slice(0, 32), slice(32, 64)).diagonal() == 0).all()


def test_a_side_without_gradient_gets_none_and_evaluation_computes_none(monkeypatch):
    v_ND, t_NE = pairs()
    rsa_loss(v_ND, t_NE.detach()).backward()
    assert v_ND.grad is not None and t_NE.grad is None
    expected, _, _ = value_and_gradients(rsa_loss, *pairs())
    monkeypatch.setattr(loss_module.PairwiseKernel, "gradient", None)  # calling it would raise
    with torch.no_grad():
        assert torch.equal(rsa_loss(*pairs()), expected)


def test_no_matrix_of_all_pairs_is_made(monkeypatch):
    monkeypatch.setattr(loss_module, "_BLOCK", BLOCK)
    num_pairs = 4096
    v_ND, t_NE = (torch.randn(num_pairs, 8, requires_grad=True) for _ in range(2))
    with torch.profiler.profile(profile_memory=True) as profile:
        rsa_loss(v_ND, t_NE).backward()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert 0 < max(sizes) <= 4 * num_pairs * 512  # a block row at the very most; N x N would be eight times that


def test_normalized_loss_ignores_the_scales_and_does_not_reward_shrinking():
    v_ND, t_NE = pairs()
    value, v_gradient, t_gradient = value_and_gradients(rsa_loss, v_ND, t_NE, normalize="mean-distance")
    scaled, *_ = value_and_gradients(rsa_loss, v_ND * 30, t_NE * 0.1, normalize="mean-distance")
    assert scaled.item() == pytest.approx(value.item(), rel=1e-12)
    for rows, gradient in ((v_ND, v_gradient), (t_NE, t_gradient)):
        centred = rows - rows.mean(0)
        along_scale = (centred * gradient).sum().abs() / (centred.norm() * gradient.norm())
        assert along_scale < 1e-14  # no pull towards smaller or larger distances


def test_unknown_settings_are_named():
    v_ND, t_NE = pairs()
    with pytest.raises(ValueError, match="unknown distance 'chebyshev'.*euclidean"):
        rsa_loss(v_ND, t_NE, distance="chebyshev")
    with pytest.raises(ValueError, match="unknown normalize 'std'.*mean-distance"):
        rsa_loss(v_ND, t_NE, normalize="std")
    with pytest.raises(ValueError, match=r"must pair up: \(23, 5\) against \(22, 8\)"):
        rsa_loss(v_ND, t_NE[1:])
