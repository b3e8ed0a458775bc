"""rsa_loss of rows that people may have: of any size, near float's limits, of other types and shapes; and differentiated twice."""

import pytest
import torch

from rsa_megatron.alignment import loss as loss_module
from rsa_megatron.alignment import spaces
from rsa_megatron.alignment.distances import DISTANCES, Manhattan, unit_rows
from rsa_megatron.alignment.global_batch_loss import rsa_sums
from rsa_megatron.alignment.loss import NORMALIZATIONS, rsa_loss, rsa_loss_of_rows, rsa_loss_reference
from tests.support.loss_cases import pairs, relative, value_and_gradients

SETTINGS = [(d, n) for d in DISTANCES for n in NORMALIZATIONS]
# float32 ends at 3e38, its squares at 2e19; normal numbers begin at 1e-38, squares that keep half of their digits at 1e-21.
SIZES = [(1e-36, 1e-36), (1e-30, 1e-30), (1e-23, 1e-23), (1e-19, 1e-19), (1e19, 1e19), (1e30, 1e30), (5e37, 5e37)]
SIZES += [(1e19, 1.0), (1.0, 1e-23), (1e-23, 1.0), (1e30, 1e-30)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(loss_module, "_BLOCK", {"cpu": (5, 9)})
    monkeypatch.setattr(Manhattan, "block_shape", (7, 7))


def pairs_of_size(size_v, size_t, dtype=torch.float32):
    return [(x.detach() * size).to(dtype).requires_grad_() for x, size in zip(pairs(), (size_v, size_t))]


def in_float64(rows, **settings):
    return value_and_gradients(rsa_loss_reference, *(x.detach().double().requires_grad_() for x in rows), **settings)


@pytest.mark.parametrize("size_v, size_t", SIZES)
@pytest.mark.parametrize("distance, normalize", SETTINGS)
def test_rows_of_any_size_are_as_in_float64(distance, normalize, size_v, size_t):
    settings, rows = dict(distance=distance, normalize=normalize), pairs_of_size(size_v, size_t)
    actual, expected = value_and_gradients(rsa_loss, *rows, **settings), in_float64(rows, **settings)
    has_no_loss = not expected[0].float().isfinite()
    for a, e in zip(actual, expected):
        if not e.float().isfinite().all():  # no float32 can hold it
            assert not a.isfinite().all()
        elif has_no_loss and not a.isfinite().all():  # nor a factor of the gradient, which itself could be one
            assert (distance, size_v, size_t) == ("sqeuclidean", 1e30, 1e-30)
        elif e.float().abs().max() < 2**-126:  # nor, with its digits, this
            assert (a.double() - e).abs().max() <= 2**-126 * 1e-6
        else:
            # As of rows near 1: some tens of roundings. (In the gradient small distances stand between larger ones.)
            assert relative(a, e) < 5e-6


def test_without_the_powers_of_two_they_are_not(monkeypatch):
    rows = pairs_of_size(1e-23, 1e-23)
    monkeypatch.setattr(spaces, "scale_near_one", lambda largest: torch.ones_like(largest))
    value, *_ = value_and_gradients(rsa_loss, *rows, normalize="mean-distance")
    assert abs(value / in_float64(rows, normalize="mean-distance")[0] - 1) > 0.1


@pytest.mark.parametrize("distance, normalize", SETTINGS)
def test_powers_of_two_change_no_bit(distance, normalize):
    """The loss of 2^k v and 2^k t is 2^2pk the loss, p the distance's degree."""
    rows = pairs_of_size(1.0, 1.0)
    value, *gradients = value_and_gradients(rsa_loss, *rows, distance=distance, normalize=normalize)
    degree = DISTANCES[distance].degree if normalize == "none" else 0
    for k in (-20, 20):
        moved = [(x.detach() * 2.0**k).requires_grad_() for x in rows]
        other, *others = value_and_gradients(rsa_loss, *moved, distance=distance, normalize=normalize)
        assert other == value * 2.0 ** (2 * degree * k)
        for a, b in zip(others, gradients):
            assert torch.equal(a, b * 2.0 ** ((2 * degree - 1) * k))


@pytest.mark.parametrize("size", [1e-250, 1e-60, 1e60, 1e150])
def test_float64_has_its_own_limits(size):
    rows = pairs_of_size(size, size, torch.float64)
    small, one = (
        value_and_gradients(rsa_loss, *x, normalize="mean-distance")
        for x in (rows, pairs_of_size(1.0, 1.0, torch.float64))
    )
    assert relative(small[0], one[0]) < 1e-13
    for a, b in zip(small[1:], one[1:]):
        assert relative(a * size, b) < 1e-12


def test_each_row_of_cosine_may_have_a_size_of_its_own():
    v_ND, t_NE = (x.detach().float() for x in pairs())
    sizes_N1 = 10.0 ** torch.linspace(-37, 37, len(v_ND))[:, None]
    rows = [(x * sizes_N1).requires_grad_() for x in (v_ND, t_NE)]
    actual, expected = value_and_gradients(rsa_loss, *rows, distance="cosine"), in_float64(rows, distance="cosine")
    assert relative(actual[0], expected[0]) < 1e-6
    for a, e in zip(actual[1:], expected[1:]):
        # Row by row: 1 / |x| is in the gradient.
        assert ((a - e).norm(dim=1) < 5e-6 * e.norm(dim=1) + 1e-44).all()
    assert relative(unit_rows(rows[0]), unit_rows(v_ND)) < 1e-6


@pytest.mark.parametrize("distance", DISTANCES)
def test_smallest_of_all_and_zero(distance):
    v_ND, t_NE = (x.detach().float() for x in pairs())
    for rows in ((v_ND * 1e-44, t_NE), (v_ND * 0, t_NE), (v_ND * 0, t_NE * 0)):
        rows = [x.clone().requires_grad_() for x in rows]
        for normalize in NORMALIZATIONS:
            actual = value_and_gradients(rsa_loss, *rows, distance=distance, normalize=normalize)
            assert actual[0].isfinite() and actual[2].isfinite().all() and not actual[1].isnan().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("distance, normalize", SETTINGS)
def test_a_row_that_is_not_finite_is_seen(distance, normalize, bad):
    for side in (0, 1):
        rows = [x.detach().float() for x in pairs()]
        rows[side][3, 2] = bad
        value, *gradients = value_and_gradients(
            rsa_loss, *(x.requires_grad_() for x in rows), distance=distance, normalize=normalize
        )
        assert not value.isfinite() and all(g.isnan().any() for g in gradients)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_wider_of_two_types_is_computed_in(distance):
    v_ND, t_NE = (x.detach() for x in pairs())
    rows = [v_ND.requires_grad_(), t_NE.bfloat16().requires_grad_()]
    value, v_gradient, t_gradient = value_and_gradients(rsa_loss, *rows, distance=distance)
    expected = in_float64(rows, distance=distance)
    assert value.dtype == v_gradient.dtype == torch.float64 and t_gradient.dtype == torch.bfloat16
    assert relative(value, expected[0]) < 1e-13 and relative(v_gradient, expected[1]) < 1e-12
    assert relative(t_gradient, expected[2]) < 2**-8


@pytest.mark.parametrize("function", [rsa_loss, rsa_loss_reference])
def test_what_is_no_rows_of_floats_is_named(function):
    v_ND, t_NE = (x.detach() for x in pairs())
    for rows, message in (
        ((v_ND[0], t_NE[0]), r"image vectors must be rows, one a pair, \[N, width\]; these are of shape \(5,\)"),
        ((v_ND, t_NE[None]), r"caption vectors must be rows, .*; these are of shape \(1, 23, 8\)"),
        ((v_ND[:0, 0], t_NE[:0]), r"image vectors must be rows, .*; these are of shape \(0,\)"),
        ((v_ND + 0j, t_NE), "image vectors must be of a real float type, and these are torch.complex128"),
        ((v_ND, t_NE.long()), "caption vectors must be of a real float type, and these are torch.int64: convert"),
        ((v_ND > 0, t_NE), "and these are torch.bool"),
        ((v_ND, t_NE[1:]), r"must pair up: \(23, 5\) against \(22, 8\)"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            function(*rows)
        assert "\n" not in str(refused.value)


def test_what_is_no_share_of_rows_is_named():
    v_ND, t_NE = (x.detach() for x in pairs())
    with pytest.raises(ValueError, match=r"rows 20 to 24 of \(23, 5\) cannot be own rows \(4, 5\)"):
        rsa_loss_of_rows(v_ND[:4], t_NE[:4], v_ND, t_NE, 20)
    with pytest.raises(ValueError, match=r"rows 0 to 4 of \(23, 8\) cannot be own rows \(4, 7\)"):
        rsa_loss_of_rows(v_ND[:4], t_NE[:4, :7], v_ND, t_NE, 0)
    with pytest.raises(ValueError, match=r"must pair up: \(26, 5\) against \(25, 8\)"):
        rsa_sums(v_ND, t_NE, v_ND, t_NE, 0, v_ND[:3], t_NE[:2])
    with pytest.raises(ValueError, match="image vectors must be of a real float type, and these are torch.complex128"):
        rsa_sums(v_ND, t_NE, v_ND, t_NE, 0, v_ND[:3] + 0j, t_NE[:3])


@pytest.mark.parametrize("distance", DISTANCES)
def test_rows_without_columns_are_all_at_distance_0(distance):
    v_ND, t_NE = pairs()
    expected = rsa_loss_reference(v_ND.detach()[:, :0], t_NE, distance=distance) if distance != "cosine" else None
    actual = rsa_loss(v_ND.detach()[:, :0], t_NE, distance=distance)
    assert expected is None or relative(actual, expected) < 1e-12
    assert actual.isfinite()


@pytest.mark.parametrize("distance, normalize", SETTINGS)
def test_a_script_s_autocast_changes_no_bit(distance, normalize):
    settings = dict(distance=distance, normalize=normalize)
    expected = value_and_gradients(rsa_loss, *pairs_of_size(1.0, 1.0), **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = value_and_gradients(rsa_loss, *pairs_of_size(1.0, 1.0), **settings)
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))


# Second derivatives.


def another_loss(v_ND):
    return v_ND.pow(3).sum()


@pytest.mark.parametrize("with_another", [False, True], ids=["alone", "beside another loss"])
@pytest.mark.parametrize("distance, normalize", SETTINGS)
def test_a_second_derivative_is_refused_and_never_without_rsa_s_part(distance, normalize, with_another):
    def first_derivative():
        weight = torch.ones((), dtype=torch.float64, requires_grad=True)
        rows = v_ND, t_NE = pairs(num_pairs=6)
        loss = weight * rsa_loss(v_ND * 2, t_NE, distance=distance, normalize=normalize)
        if with_another:
            loss = loss + another_loss(v_ND) + another_loss(t_NE)
        return *torch.autograd.grad(loss, rows, create_graph=True), (*rows, weight)

    of_v, of_t, leaves = first_derivative()
    v_ND, t_NE = pairs(num_pairs=6)
    expected = rsa_loss(v_ND * 2, t_NE, distance=distance, normalize=normalize)
    once = torch.autograd.grad(expected + with_another * (another_loss(v_ND) + another_loss(t_NE)), (v_ND, t_NE))
    assert torch.equal(of_v, once[0]) and torch.equal(of_t, once[1])  # the first is what it is without
    for leaf in leaves:
        for gradient in (of_v, of_t):
            with pytest.raises(RuntimeError, match="no second derivative: take .*rsa_loss_reference"):
                torch.autograd.grad(gradient.sum(), leaf, retain_graph=True)
    for index in (0, 1):
        with pytest.raises(RuntimeError, match="rsa_loss has no second derivative"):
            first_derivative()[index].square().sum().backward()


def test_over_micro_batches_it_is_refused_too():
    v_ND, t_NE = pairs(num_pairs=6)
    loss = rsa_sums(v_ND, t_NE, v_ND.detach(), t_NE.detach(), 0, v_ND.detach() + 1, t_NE.detach()).loss
    (of_v,) = torch.autograd.grad(loss + another_loss(v_ND), v_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="rsa_loss has no second derivative"):
        torch.autograd.grad(of_v.sum(), v_ND)


def test_a_side_without_gradient_has_no_part_in_it():
    v_ND, t_NE = pairs(num_pairs=6)
    (of_v,) = torch.autograd.grad(rsa_loss(v_ND, t_NE.detach()) + another_loss(v_ND), v_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="rsa_loss has no second derivative"):
        of_v.sum().backward()


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_reference_has_a_second_derivative(distance):
    v_ND, t_NE = pairs(num_pairs=4)
    assert torch.autograd.gradgradcheck(lambda v, t: rsa_loss_reference(v, t, distance=distance), (v_ND, t_NE))
