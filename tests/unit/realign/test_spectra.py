"""Figures of spectra: by hand, on planted spectra, and what is refused."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from rsa_megatron.realign.realign import normalise_rows
from rsa_megatron.realign.spectra import (
    SpectrumFigures,
    anisotropy,
    condition_number,
    effective_dimension,
    eigenvalues,
    leading_rank,
    power_law_exponent,
    principal_angle,
    spectrum,
)


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def power_law(exponent, num_values=200):
    return 0.1 * torch.arange(1, num_values + 1, dtype=torch.float64) ** -exponent


def test_by_hand():
    spectrum_D = values(0.4, 0.2, 0.2, 0.0)
    assert effective_dimension(spectrum_D) == pytest.approx(0.8**2 / 0.24)
    assert anisotropy(spectrum_D) == pytest.approx(2.0)
    assert condition_number(spectrum_D) == pytest.approx(2.0)  # over all four it would be infinite
    assert [leading_rank(spectrum_D, energy) for energy in (0.4, 0.5, 0.75, 0.76, 1.0)] == [1, 1, 2, 3, 3]


def test_a_share_that_is_met_exactly_needs_no_further_direction():
    tenth_D = torch.full((10,), 0.1, dtype=torch.float64)
    shares_D = tenth_D.cumsum(0) / tenth_D.sum()
    assert shares_D[7] < 0.8 and shares_D[9] < 1.0  # by rounding: compared as they are they would ask for one more
    assert [leading_rank(tenth_D, share / 10) for share in range(1, 11)] == list(range(1, 11))


def test_equal_variances():
    flat_D = torch.full((300,), 0.002, dtype=torch.float64)
    found = SpectrumFigures.of(flat_D)
    assert (found.condition_number, found.anisotropy, found.effective_dimension) == pytest.approx((1, 1, 300))
    assert (
        found.exponent == pytest.approx(0, abs=1e-12) and len(found.values) == 256 and found.trace == pytest.approx(0.6)
    )


@pytest.mark.parametrize("exponent", (0.5, 1.33, 1.83))
def test_a_planted_power_law_is_found(exponent):
    spectrum_D = power_law(exponent)
    assert power_law_exponent(spectrum_D) == pytest.approx(exponent, abs=1e-12)
    # What lies beyond 99 % of the variance does not count: zeros, whose logarithm is infinite, least of all.
    with_zeros_D = torch.cat([spectrum_D, torch.zeros(100, dtype=torch.float64)])
    assert power_law_exponent(with_zeros_D) == pytest.approx(exponent, abs=1e-12)
    rank = leading_rank(spectrum_D)
    assert condition_number(with_zeros_D) == pytest.approx(rank**exponent)


def test_the_spectrum_is_that_of_unit_rows():
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(500, 12, generator=generator, dtype=torch.float64) * torch.arange(1, 13) ** -1.0 + 0.5
    expected_D = torch.linalg.svdvals(normalise_rows(x_ND) - normalise_rows(x_ND).mean(0)).square() / 500
    torch.testing.assert_close(spectrum(x_ND), expected_D, rtol=0, atol=1e-12)
    torch.testing.assert_close(spectrum((3 * x_ND).split(70)), expected_D, rtol=0, atol=1e-12)
    assert spectrum(x_ND).sum().item() == pytest.approx(
        1 - normalise_rows(x_ND).mean(0).square().sum().item(), abs=1e-12
    )
    assert (eigenvalues(torch.outer(x_ND[0], x_ND[0])) >= 0).all()  # rounding would give some of them below zero


def test_the_angle_to_the_first_principal_direction_has_no_sign():
    covariance_DD = torch.diag(values(0.1, 0.4, 0.2))
    slanted_D = values(0.0, math.cos(0.5), math.sin(0.5))
    assert principal_angle(slanted_D, covariance_DD) == pytest.approx(math.degrees(0.5))
    assert principal_angle(-7 * slanted_D, covariance_DD) == pytest.approx(math.degrees(0.5))
    assert principal_angle(values(1.0, 0.0, 0.0), covariance_DD) == pytest.approx(90)


def test_what_has_no_shape():
    nothing_D = torch.zeros(5, dtype=torch.float64)
    for function in (condition_number, effective_dimension, anisotropy, power_law_exponent, leading_rank):
        with pytest.raises(ValueError, match="nothing varies"):
            function(nothing_D)
    with pytest.raises(ValueError, match="a power law needs three eigenvalues; 2 of 3 hold 99 % of the variance"):
        power_law_exponent(values(0.6, 0.399, 0.001))
    few = SpectrumFigures.of(values(0.6, 0.399, 0.001))
    assert few.exponent is None and few.condition_number == pytest.approx(0.6 / 0.399)
    json.dumps([asdict(SpectrumFigures.of(nothing_D)), asdict(few)], allow_nan=False)
    assert SpectrumFigures.of(spectrum(torch.ones(9, 5))).condition_number is None  # equal rows: nothing but rounding
