"""Leakage, rotation, and statistics over a window of training steps: bounds attained, and mistakes that would be seen.

Tolerances: 1e-12 for numbers of order 1 in float64.
"""

import math

import pytest
import torch

from rsa_megatron.realign.decomposition import decompose
from rsa_megatron.realign.frame import Frame
from rsa_megatron.realign.realign import normalise_rows
from rsa_megatron.realign.trajectory import (
    covariance_correlations,
    drift,
    leakage,
    leakage_bound,
    rotation_sine,
    stability,
    window_covariances,
)
from tests.support import planted_gap as planted

WIDTH, RANK = planted.WIDTH, planted.RANK


def frame_of(axes_DD, rank=RANK):
    return Frame(axes_DD, torch.arange(WIDTH, 0, -1, dtype=torch.float64), rank)


def turned(angle, first=1, second=RANK + 2):
    """The frame with one direction of U turned towards one of V."""
    turn_DD = torch.eye(WIDTH, dtype=torch.float64)
    turn_DD[first, first] = turn_DD[second, second] = math.cos(angle)
    turn_DD[second, first], turn_DD[first, second] = math.sin(angle), -math.sin(angle)
    return frame_of(planted.axes_DD @ turn_DD)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Rotation and leakage


@pytest.mark.parametrize("angle", (0.0, 1e-10, 0.03, 0.7, math.pi / 2))
def test_the_sine_is_that_of_the_rotation(angle):
    frame = frame_of(planted.axes_DD)
    assert rotation_sine(turned(angle), frame) == pytest.approx(math.sin(angle), rel=1e-5, abs=1e-14)
    sigma = torch.linalg.svdvals(frame.basis_DR.T @ turned(angle).basis_DR)[-1].item()
    by_cosine = math.sqrt(max(0.0, 1 - sigma**2))
    if angle == 1e-10:  # the paper's other form of it has lost all digits there
        assert abs(by_cosine - math.sin(angle)) > 0.5 * math.sin(angle)
    else:
        assert by_cosine == pytest.approx(math.sin(angle), abs=1e-7)


def test_bases_that_span_the_same_are_not_turned_and_a_larger_one_is():
    mixed_DD = planted.axes_DD.clone()
    mixed_DD[:, :RANK] = planted.axes_DD[:, :RANK] @ torch.linalg.qr(normal(RANK, RANK)).Q
    assert rotation_sine(frame_of(mixed_DD), frame_of(planted.axes_DD)) < 1e-14
    assert rotation_sine(frame_of(planted.axes_DD, RANK + 1), frame_of(planted.axes_DD)) == pytest.approx(1, abs=1e-12)
    assert rotation_sine(frame_of(planted.axes_DD, RANK - 1), frame_of(planted.axes_DD)) < 1e-14


def test_gradients_in_the_turned_frame_leak_at_most_its_sine():
    """Lemma B.7; the direction that was turned attains it."""
    frame, frame_t = frame_of(planted.axes_DD), turned(0.3)
    sine = rotation_sine(frame_t, frame)
    inside_ND = normal(200, RANK) @ frame_t.basis_DR.T
    each = [leakage(gradient_D[None], frame) for gradient_D in inside_ND]
    assert max(each) <= leakage_bound(sine) + 1e-12 and max(each) > 0.9 * sine > 10 * min(each)
    # all of them together: a ratio of RMS, no mean of ratios
    energy = sum((leaked * gradient_D.norm().item()) ** 2 for leaked, gradient_D in zip(each, inside_ND))
    assert leakage(inside_ND, frame) == pytest.approx(math.sqrt(energy) / inside_ND.norm().item())
    assert leakage(frame_t.axes_DD[:, 1][None], frame) == pytest.approx(sine, abs=1e-12)
    assert leakage(normal(200, WIDTH), frame) > leakage_bound(sine)  # gradients of any direction are not bound by it
    for useless in (0.0, math.nan):
        with pytest.raises(
            ValueError, match=f"the gradients' length is {useless}: they have no share outside the frame"
        ):
            leakage(torch.full((3, WIDTH), useless), frame)


def test_gradients_that_follow_a_coupling_leak_at_most_the_sum():
    """g = h + L h with h in U_t and L into V: |P_V g| <= (sin theta + |L|) |h|, and |g| >= |h| as L h is orthogonal to h."""
    frame, frame_t = frame_of(planted.axes_DD), turned(0.1)
    inside_ND = normal(200, RANK) @ frame_t.basis_DR.T
    map_VR = 0.05 * normal(WIDTH - RANK - 3, RANK, seed=1)  # onto directions of V that were not turned
    follow_ND = inside_ND @ frame_t.basis_DR @ map_VR.T @ planted.axes_DD[:, RANK + 3 :].T
    bound = leakage_bound(rotation_sine(frame_t, frame), torch.linalg.matrix_norm(map_VR, 2).item())
    each = [leakage(gradient_D[None], frame) for gradient_D in inside_ND + follow_ND]
    assert rotation_sine(frame_t, frame) < max(each) <= bound < 1
    assert leakage_bound(0.9, 0.3) == 1 and leakage_bound(0.2, 0.1, 0.05) == pytest.approx(0.35)


# The gradient of the contrastive loss


def contrastive_loss(image_ND, text_ND, temperature):
    """Image to text, InfoNCE, summed over the images."""
    return -(image_ND @ text_ND.T / temperature).log_softmax(1).diagonal().sum()


def test_the_contrastive_gradient_of_an_image_is_a_combination_of_texts():
    temperature, num_pairs = 0.07, 6
    image_ND, text_ND = (
        normalise_rows(normal(num_pairs, WIDTH)).requires_grad_(),
        normalise_rows(normal(num_pairs, WIDTH, seed=1)),
    )
    (gradient_ND,) = torch.autograd.grad(contrastive_loss(image_ND, text_ND, temperature), image_ND)
    weight_NN = (image_ND.detach() @ text_ND.T / temperature).softmax(1)
    torch.testing.assert_close(gradient_ND, (weight_NN @ text_ND - text_ND) / temperature, rtol=0, atol=1e-12)
    of_texts = frame_of(torch.linalg.svd(text_ND.T).U, num_pairs)  # U is the span of the texts
    assert leakage(gradient_ND, of_texts) < 1e-12
    # Through the projection onto the sphere, a part along the image itself is taken off: no longer such a combination.
    raw_ND = (3 * image_ND.detach()).requires_grad_()
    through = torch.autograd.grad(
        contrastive_loss(torch.nn.functional.normalize(raw_ND), text_ND, temperature), raw_ND
    )[0]
    assert leakage(through, of_texts) > 0.05


# Windows


def steps(num_steps=8):
    """Pairs of a few steps over which the mean moves, in U and in V."""
    image_ND, text_ND = planted.planted_pairs(planted.balanced_signs())
    moves = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    towards_D = planted.axes_DD[:, 1] + 0.5 * planted.axes_DD[:, 10]
    return [(normalise_rows(normalise_rows(image_ND) + move * towards_D), text_ND) for move in moves]


def covariance(x_ND):
    return torch.cov(x_ND.T, correction=0)


def test_a_window_averages_the_covariance_of_each_step():
    frame = Frame.of(*steps()[0], rank=RANK)
    terms = [decompose(frame, *pairs) for pairs in steps()]
    delta_DD, zeta_DD = window_covariances(terms)
    torch.testing.assert_close(delta_DD, sum(covariance(t.delta_ND) for t in terms) / 8, rtol=0, atol=1e-12)
    torch.testing.assert_close(zeta_DD, sum(covariance(t.zeta_ND) for t in terms) / 8, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="a window without steps"):
        window_covariances([])


def test_samples_pooled_over_the_window_have_the_covariance_of_the_moving_mean_on_top():
    """Lemma B.9, the law of total covariance; pooling adds 12 % of the trace in U here, and 66 % in V."""
    frame = Frame.of(*steps()[0], rank=RANK)
    terms = [decompose(frame, *pairs) for pairs in steps()]
    delta_DD, zeta_DD = window_covariances(terms)
    pooled = decompose(frame, *(torch.cat(side) for side in zip(*steps())))
    beta_TD, gamma_TD = torch.stack([t.beta_D for t in terms]), torch.stack([t.gamma_D for t in terms])
    for pooled_ND, mean_DD, bias_TD in ((pooled.delta_ND, delta_DD, beta_TD), (pooled.zeta_ND, zeta_DD, gamma_TD)):
        torch.testing.assert_close(covariance(pooled_ND), mean_DD + covariance(bias_TD), rtol=0, atol=1e-12)
        assert covariance(pooled_ND).trace() > 1.1 * mean_DD.trace()


# Figures from step to step


def test_stability_and_drift_by_hand():
    first_D, second_D = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([-4.0, 3.0], dtype=torch.float64)
    assert stability(2 * first_D, first_D) == pytest.approx(1) and stability(first_D, second_D) == pytest.approx(0)
    assert stability(-first_D, first_D) == pytest.approx(-1)
    drifts = [drift(gamma_D, first_D) for gamma_D in (first_D, second_D, 2 * first_D)]
    assert drifts == pytest.approx([0, math.sqrt(2), 1])
    assert math.isfinite(drift(first_D, 0 * first_D))
    with pytest.raises(ValueError, match="gamma is zero at one of the two steps"):
        stability(first_D, 0 * first_D)


def test_covariances_are_compared_by_spectrum_and_by_axis():
    frame = frame_of(planted.axes_DD)

    def along(*variances):  # within U, and something else in V that does not count
        variance_D = torch.cat([torch.tensor(variances, dtype=torch.float64), normal(WIDTH - RANK).abs()])
        return planted.axes_DD @ torch.diag(variance_D) @ planted.axes_DD.T

    assert covariance_correlations(along(4, 3, 2, 1), along(8, 6, 4, 2), frame) == pytest.approx((1, 1))
    # the same variances along other axes: spectra cannot tell, diagonals can
    assert covariance_correlations(along(4, 3, 2, 1), along(1, 2, 3, 4), frame) == pytest.approx((1, -1))
