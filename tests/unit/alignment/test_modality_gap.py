"""modality_gap: by hand, against plain formulas, and what must hold of it."""

import math

import pytest
import torch

from rsa_megatron.alignment.modality_gap import modality_gap


def rows(num_samples=60, width=12, seed=0):
    return torch.randn(num_samples, width, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    a_ND = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    b_ND = torch.tensor([[-1.0, 0.0], [-3.0, 0.0]])
    gap = modality_gap(a_ND, b_ND)
    # means (1, 2) and (-2, 0); of the unit rows (0.5, 0.5) and (-1, 0)
    assert gap.distance == pytest.approx(math.hypot(3, 2)) and gap.unit_distance == pytest.approx(math.hypot(1.5, 0.5))
    assert (gap.first.mean_norm, gap.second.mean_norm) == (3.0, 2.0)
    assert gap.first.concentration == pytest.approx(math.sqrt(0.5)) and gap.second.concentration == pytest.approx(1.0)
    assert (gap.first.mean_angle, gap.first.largest_angle) == pytest.approx((45, 45))
    assert (gap.second.mean_angle, gap.second.largest_angle) == pytest.approx((0, 0), abs=1e-5)
    assert gap.first.effective_rank == pytest.approx(1.0)  # two points lie on a line


@pytest.mark.parametrize("num_samples, width", ((60, 12), (12, 60)))
def test_against_plain_formulas(num_samples, width):
    x_ND = rows(num_samples, width).double() + 0.5
    cone = modality_gap(x_ND.float(), x_ND.float()).first
    unit_ND = torch.nn.functional.normalize(x_ND)
    direction_D = torch.nn.functional.normalize(unit_ND.mean(0), dim=0)
    angle_N = torch.rad2deg(torch.arccos(unit_ND @ direction_D))
    share = torch.linalg.svdvals(x_ND - x_ND.mean(0)).square()
    share = share[share > 1e-20] / share.sum()
    rank = math.exp(-(share * share.log()).sum())
    expected = x_ND.norm(dim=1).mean(), unit_ND.mean(0).norm(), angle_N.mean(), angle_N.max(), rank
    actual = cone.mean_norm, cone.concentration, cone.mean_angle, cone.largest_angle, cone.effective_rank
    assert actual == pytest.approx([float(x) for x in expected], rel=1e-6)  # of features rounded to float32, 6e-8


def test_a_shift_opens_the_gap_and_closes_the_cones():
    a_ND, b_ND = rows(), rows(seed=1)
    before, after = modality_gap(a_ND, b_ND), modality_gap(a_ND + 10, b_ND - 10)
    assert after.distance > 10 * before.distance and 1.9 < after.unit_distance <= 2.0
    assert after.first.mean_angle < 10 < 70 < before.first.mean_angle
    assert after.first.effective_rank == pytest.approx(
        before.first.effective_rank, rel=1e-5
    )  # shifts change no variance


def test_spaces_of_two_widths_have_no_distance():
    gap = modality_gap(rows(), rows(width=16))
    assert gap.distance is None and gap.unit_distance is None and gap.second.effective_rank > 10


def test_equal_rows_and_zero_rows():
    gap = modality_gap(torch.ones(5, 8), rows(5, 8))
    assert (gap.first.concentration, gap.first.effective_rank) == (pytest.approx(1.0), 0.0)
    some_zero = torch.cat([torch.ones(4, 8), torch.zeros(4, 8)])  # zero rows count in the mean, and have no angle
    cone = modality_gap(some_zero, some_zero).first
    assert cone.largest_angle == pytest.approx(0, abs=1e-5) and cone.mean_norm == pytest.approx(math.sqrt(8) / 2)
    with pytest.raises(ValueError, match="the second features: none of 5 rows has a direction, all are zero"):
        modality_gap(rows(5), torch.zeros(5, 8))
    with pytest.raises(ValueError, match="the first features: 1 of 5 rows hold NaN or infinity"):
        modality_gap(torch.cat([rows(4), torch.full((1, 12), float("nan"))]), rows())
