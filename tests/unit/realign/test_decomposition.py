"""The modality gap in a fixed frame: identities, planted data found again, and mistakes that would be seen.

Tolerances: 1e-10 where nothing else stands (numbers of order 1 in float64, sums of some hundred), 1e-14 where a term is
taken off and put back.
"""

import json
import math
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

from rsa_megatron.realign.coupling import fit_coupling
from rsa_megatron.realign.decomposition import (
    centroid_gap,
    compute_gap_figures,
    compute_term_moments,
    decompose,
    energy_budget,
)
from rsa_megatron.realign.frame import Frame
from rsa_megatron.realign.realign import normalise_rows
from tests.support import planted_gap as planted

TOLERANCE = 1e-10


def pairs(num_pairs=400, width=24, seed=0):
    """Rows of anything but unit length whose spectrum falls, with a gap and noise of their own."""
    generator = torch.Generator().manual_seed(seed)
    fall_D = torch.arange(1, width + 1) ** -0.7
    shared_ND, x_ND, y_ND = torch.randn(3, num_pairs, width, generator=generator, dtype=torch.float64) * fall_D
    shift_D = 0.3 * torch.randn(width, generator=generator, dtype=torch.float64)
    return shared_ND + 0.4 * x_ND + shift_D, 5 * (shared_ND + 0.4 * y_ND)


def projector(frame):
    return frame.project_onto_u(torch.eye(len(frame.axes_DD), dtype=torch.float64))


def covariance(x_ND):
    return torch.cov(x_ND.T, correction=0)


def close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# The frame


def test_projectors_of_the_frame():
    frame = Frame.of(*pairs(), energy=0.9)
    u_DD, eye_DD = projector(frame), torch.eye(24, dtype=torch.float64)
    close(u_DD @ u_DD, u_DD)
    close(u_DD, u_DD.T)
    close(u_DD + frame.project_onto_v(eye_DD), eye_DD)
    assert u_DD.trace().item() == pytest.approx(frame.rank, abs=TOLERANCE)
    vector_D = pairs()[0][0]
    close(frame.project_onto_u(vector_D), u_DD @ vector_D)


@pytest.mark.parametrize("energy", (0.3, 0.9, 0.99, 1.0))
def test_the_rank_is_the_least_that_holds_the_energy(energy):
    image_ND, text_ND = pairs()
    frame = Frame.of(image_ND, text_ND, energy=energy)
    variance_D = torch.linalg.eigvalsh(covariance(normalise_rows(image_ND)) + covariance(normalise_rows(text_ND))).flip(
        0
    )
    share_D = variance_D.cumsum(0) / variance_D.sum()
    close(frame.eigenvalues_D, variance_D)
    assert share_D[frame.rank - 1] >= energy - 1e-12 and (frame.rank == 1 or share_D[frame.rank - 2] < energy)
    assert frame.energy == pytest.approx(share_D[frame.rank - 1].item(), abs=TOLERANCE)


def test_the_frame_needs_no_pairs_no_order_and_no_signs():
    image_ND, text_ND = pairs()
    frame = Frame.of(image_ND, text_ND, rank=6)
    shuffled_N = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    twice_ND = torch.cat([image_ND, image_ND])  # a covariance divided by N - 1 would change
    same = (image_ND[shuffled_N], text_ND), (image_ND.split(7), text_ND.split(64)), (twice_ND, text_ND)
    for others in same:
        close(projector(Frame.of(*others, rank=6)), projector(frame))
    sign_D = torch.ones(24, dtype=torch.float64)
    sign_D[::3] = -1
    flipped, terms = decompose(replace(frame, axes_DD=frame.axes_DD * sign_D), *pairs()), decompose(frame, *pairs())
    close(flipped.delta_ND, terms.delta_ND)
    close(flipped.beta_D, terms.beta_D)


# The four terms


@pytest.fixture(scope="module")
def terms():
    return decompose(Frame.of(*pairs(), energy=0.9), *pairs())


def test_the_terms_add_up_to_the_difference(terms):
    image_ND, text_ND = pairs()
    difference_ND = normalise_rows(image_ND) - normalise_rows(text_ND)
    close(terms.beta_D + terms.gamma_D + terms.delta_ND + terms.zeta_ND, difference_ND, 1e-14)
    close(terms.mean_D, difference_ND.mean(0), 1e-14)
    for residual_ND in (terms.delta_ND, terms.zeta_ND):
        close(residual_ND.mean(0), torch.zeros(24, dtype=torch.float64), 1e-14)
        assert residual_ND.square().mean() > 1e-3  # neither is zero
    close((terms.delta_ND * terms.zeta_ND).sum(1), torch.zeros(400, dtype=torch.float64), 1e-14)
    assert abs(terms.beta_D @ terms.gamma_D) < 1e-14


def test_the_energy_budget(terms):
    image_ND, text_ND = pairs()
    budget = energy_budget(terms)
    square_N = (normalise_rows(image_ND) - normalise_rows(text_ND)).square().sum(1)
    assert budget.total == pytest.approx(square_N.mean().item(), abs=TOLERANCE)
    assert budget.total == pytest.approx(budget.beta + budget.gamma + budget.delta + budget.zeta, abs=TOLERANCE)
    assert budget.beta + budget.gamma == pytest.approx(terms.mean_D.square().sum().item(), abs=TOLERANCE)
    assert budget.delta == pytest.approx(covariance(terms.delta_ND).trace().item(), abs=TOLERANCE)
    assert min(asdict(budget).values()) > 1e-3


def test_the_second_moment_within_u_holds_beta():
    """Proposition B.4, and the mistake it warns of: a residual covariance from which beta was not taken off."""
    frame = Frame.of(*pairs(), energy=0.9)
    terms = decompose(frame, *pairs())
    in_u_ND = frame.project_onto_u(normalise_rows(pairs()[0]) - normalise_rows(pairs()[1]))
    second_moment_DD = in_u_ND.T @ in_u_ND / len(in_u_ND)
    close(second_moment_DD, torch.outer(terms.beta_D, terms.beta_D) + covariance(terms.delta_ND))
    excess_DD = second_moment_DD - covariance(terms.delta_ND)
    assert excess_DD.norm() == pytest.approx(terms.beta_D.square().sum().item()) and excess_DD.norm() > 0.01


# Planted data


def test_planted_terms_are_found_exactly():
    image_ND, text_ND = planted.planted_pairs(planted.balanced_signs())
    frame = Frame.of(image_ND, text_ND, energy=planted.ENERGY)
    assert frame.rank == planted.RANK and frame.energy == pytest.approx(planted.ENERGY)
    u_DR = planted.axes_DD[:, : planted.RANK]
    close(projector(frame), u_DR @ u_DR.T)
    terms, mean_D = decompose(frame, image_ND, text_ND), planted.planted_mean()
    close(terms.beta_D, u_DR @ mean_D[: planted.RANK])
    close(terms.gamma_D, planted.axes_DD[:, planted.RANK :] @ mean_D[planted.RANK :])
    variance_D = torch.zeros(planted.WIDTH, dtype=torch.float64)
    for direction, square in (planted.IMAGE_VARIANCE | planted.TEXT_VARIANCE).items():
        variance_D[direction] = square
    total_DD = covariance(terms.delta_ND) + covariance(terms.zeta_ND)
    close(planted.axes_DD.T @ total_DD @ planted.axes_DD, torch.diag(variance_D))


def test_planted_figures_are_found_exactly():
    image_ND, text_ND = planted.planted_pairs(planted.balanced_signs())
    found = compute_gap_figures(image_ND, text_ND, energy=planted.ENERGY)
    gamma_D = planted.planted_mean()[planted.RANK :]  # direction 4, the first of V, is zeta's largest
    assert found.gamma_angle == pytest.approx(math.degrees(math.acos(abs(gamma_D[0]) / gamma_D.norm())), abs=1e-6)
    assert found.delta.values == pytest.approx([0.20, 0.15, 0.10, 0.05], abs=TOLERANCE)
    assert found.zeta.values[:4] == pytest.approx([0.016, 0.008, 0.004, 0.002], abs=TOLERANCE)
    assert (found.delta.condition_number, found.zeta.condition_number) == pytest.approx((4.0, 8.0))
    assert (found.image.trace, found.text.trace) == pytest.approx((0.324, 0.206), abs=TOLERANCE)
    assert found.delta.effective_dimension == pytest.approx(0.5**2 / (0.2**2 + 0.15**2 + 0.1**2 + 0.05**2))
    assert (found.delta.anisotropy, found.zeta.anisotropy) == pytest.approx((0.2 / (0.5 / 4), 0.016 / (0.03 / 12)))
    assert found.coupling_norm < 1e-6 and found.coupling_r_squared < TOLERANCE  # signs of U and V have no correlation


def test_the_planted_frame_is_approached_with_the_root_of_the_number_of_pairs():
    truth_DD = planted.axes_DD[:, : planted.RANK] @ planted.axes_DD[:, : planted.RANK].T
    distance = {}
    for num_pairs in (400, 400 * 64):
        draws = [planted.planted_pairs(planted.random_signs(num_pairs, seed)) for seed in range(4)]
        frames = [Frame.of(*draw, rank=planted.RANK) for draw in draws]
        distance[num_pairs] = sum((projector(frame) - truth_DD).norm().item() for frame in frames) / len(frames)
    # 64 times as many pairs: 8 times nearer, give or take the spread of four draws
    assert distance[400] / distance[400 * 64] == pytest.approx(8, rel=0.4) and distance[400 * 64] < 0.02


def test_a_frame_that_was_not_centred_would_be_seen():
    """Second moments in the place of covariances put the means, and with them the gap, into U."""
    image_ND, text_ND = (normalise_rows(x_ND) for x_ND in planted.planted_pairs(planted.balanced_signs()))
    second_moment_DD = (image_ND.T @ image_ND + text_ND.T @ text_ND) / len(image_ND)
    wrong = Frame.of_covariance(second_moment_DD, rank=planted.RANK)
    truth_DD = planted.axes_DD[:, : planted.RANK] @ planted.axes_DD[:, : planted.RANK].T
    assert (projector(wrong) - truth_DD).norm() > 1
    gamma = decompose(wrong, image_ND, text_ND).gamma_D.norm().item()
    assert abs(gamma - planted.planted_mean()[planted.RANK :].norm().item()) > 0.1


# Figures from covariances alone


@pytest.mark.parametrize("pieces", (None, 1, 37, 400))
def test_figures_are_those_of_the_terms(pieces):
    image_ND, text_ND = pairs()
    cut = (lambda x_ND, size: x_ND) if pieces is None else torch.Tensor.split
    found = compute_gap_figures(cut(image_ND, pieces), cut(text_ND, 50), energy=0.9)
    frame = Frame.of(image_ND, text_ND, energy=0.9)
    terms = decompose(frame, image_ND, text_ND)
    assert asdict(found.budget) == pytest.approx(asdict(energy_budget(terms)), abs=TOLERANCE)
    assert (found.num_pairs, found.width, found.rank) == (400, 24, frame.rank)
    norms = [x_D.norm().item() for x_D in (terms.mean_D, terms.beta_D, terms.gamma_D)]
    assert [found.mean_norm, found.beta_norm, found.gamma_norm] == pytest.approx(norms, abs=TOLERANCE)
    coupled = fit_coupling(terms.delta_ND, terms.zeta_ND)
    # the coupling divides by a millionth of Cov delta at most: six digits fewer
    assert (found.coupling_norm, found.coupling_r_squared) == pytest.approx((coupled.norm, coupled.r_squared), rel=1e-6)
    for figures, x_ND in ((found.delta, terms.delta_ND), (found.zeta, terms.zeta_ND)):
        variance_D = torch.linalg.eigvalsh(covariance(x_ND)).flip(0)[: len(figures.values)]
        assert figures.values == pytest.approx(variance_D.tolist(), abs=TOLERANCE)
    assert json.loads(json.dumps(asdict(found)))["budget"] == asdict(found.budget)


def test_moments_in_a_frame_of_another_step_are_those_of_the_terms():
    frame = Frame.of(*pairs(seed=1), rank=7)
    terms, found = decompose(frame, *pairs()), compute_term_moments(frame, *(x_ND.split(90) for x_ND in pairs()))
    u_DR, v_DC = frame.axes_DD[:, :7], frame.axes_DD[:, 7:]
    close(found.beta_D, terms.beta_D)
    close(found.gamma_D, terms.gamma_D)
    close(found.delta_RR, u_DR.T @ covariance(terms.delta_ND) @ u_DR)
    close(found.zeta_CC, v_DC.T @ covariance(terms.zeta_ND) @ v_DC)
    close(found.zeta_delta_CR, v_DC.T @ terms.zeta_ND.T @ terms.delta_ND @ u_DR / 400)
    assert asdict(found.compute_budget()) == pytest.approx(asdict(energy_budget(terms)), abs=TOLERANCE)


def test_figures_that_do_not_exist_are_none():
    whole = compute_gap_figures(*pairs(), rank=24)  # there is no V
    assert (whole.coupling_norm, whole.gamma_angle, whole.zeta.condition_number) == (None, None, None)
    assert whole.zeta.values == []
    assert whole.zeta.trace == 0 and whole.budget.gamma < 1e-20
    image_ND = pairs()[0]
    same = compute_gap_figures(image_ND, image_ND, energy=0.9)
    assert (same.mean_norm, same.delta.trace, same.delta.exponent, same.coupling_r_squared) == (0, 0, None, None)
    planted_ND, _ = planted.planted_pairs(planted.balanced_signs())
    centred = compute_gap_figures(
        planted_ND, planted_ND.roll(1, 0), rank=1
    )  # one mean, and what rounding leaves of gamma has no direction
    assert centred.gamma_angle is None and centred.gamma_norm < 1e-14 and centred.zeta.trace > 0.1
    json.dumps([asdict(figures) for figures in (whole, same, centred)], allow_nan=False)


def test_a_residual_of_zero_has_no_energy_below_zero():
    """Rows in a subspace, all of it in the frame: rounding leaves a trace of zeta of either sign, in half of the draws below zero."""
    for seed in range(8):
        image_ND, text_ND = (x_ND[:, :6] for x_ND in pairs(60, seed=seed))
        axes_DD = torch.linalg.qr(pairs(24, seed=seed)[0]).Q
        budget = compute_gap_figures(image_ND @ axes_DD[:6], text_ND @ axes_DD[:6], energy=1.0).budget
        assert 0 <= budget.zeta < 1e-14 and budget.delta > 0.1


def test_centroid_gap_by_hand():
    image_ND = torch.tensor([[0.0, 3.0], [4.0, 0.0]])
    text_ND = torch.tensor([[-1.0, 0.0], [-2.0, 0.0], [-3.0, 0.0]])
    # means of the unit rows: (0.5, 0.5) and (-1, 0)
    assert centroid_gap(image_ND, text_ND) == pytest.approx(math.hypot(1.5, 0.5), abs=1e-15)
    assert centroid_gap(image_ND.split(1), [text_ND[:1], text_ND[1:]]) == pytest.approx(math.hypot(1.5, 0.5), abs=1e-15)


# Bad input


def with_row(x_ND, row, value):
    x_ND = x_ND.clone()
    x_ND[row] = value
    return x_ND


@pytest.mark.parametrize("name", ("figures", "terms", "moments"))
def test_rows_must_pair_up_and_have_a_direction(name):
    image_ND, text_ND = pairs()
    frame = Frame.of(image_ND, text_ND)
    function = {
        "figures": compute_gap_figures,
        "terms": partial(decompose, frame),
        "moments": partial(compute_term_moments, frame),
    }[name]
    with pytest.raises(ValueError, match="there are 400 image embeddings and 90 text embeddings: they must pair up"):
        function(image_ND.split(64), text_ND[:90])
    with pytest.raises(ValueError, match="there are 1 image embeddings and 1 text embeddings: .* at least two of each"):
        function(image_ND[:1], text_ND[:1])
    with pytest.raises(ValueError, match="there are 0 image embeddings and 400 text embeddings: they must pair up"):
        function(image_ND[:0], text_ND)
    with pytest.raises(ValueError, match=r"image embeddings: of 400 rows 1 are zero \(row 77\)"):
        function(with_row(image_ND, 77, 0.0).split(50), text_ND)
    with pytest.raises(ValueError, match=r"text embeddings: of 400 rows 1 hold NaN \(row 5\)"):
        function(image_ND, with_row(text_ND, 5, math.nan))
    with pytest.raises(ValueError, match="image embeddings have width 24 and text embeddings 20"):
        function(image_ND, text_ND[:, :20])
    with pytest.raises(ValueError, match="text embeddings: embeddings of a set must have one width"):
        function(image_ND, [text_ND[:100], text_ND[100:, :20]])


def test_frames_that_cannot_be():
    image_ND, text_ND = pairs()
    with pytest.raises(ValueError, match="rank=25: a frame in 24 dimensions has a rank of 1 to 24"):
        Frame.of(image_ND, text_ND, rank=25)
    with pytest.raises(ValueError, match="energy=99 must be a share of the variance"):
        Frame.of(image_ND, text_ND, energy=99)
    for rank in (None, 3):
        with pytest.raises(ValueError, match="nothing varies"):
            Frame.of(image_ND[:1].repeat(9, 1), text_ND[:1].repeat(9, 1), rank=rank)
    with pytest.raises(ValueError, match="image embeddings have width 24 and text embeddings 20"):
        Frame.of(image_ND, text_ND[:, :20])


def test_a_frame_of_another_space():
    for function in (decompose, compute_term_moments):
        with pytest.raises(
            ValueError, match="the frame has width 24 and the embeddings 20: use a frame of the same encoder"
        ):
            function(Frame.of(*pairs()), *pairs(width=20))
