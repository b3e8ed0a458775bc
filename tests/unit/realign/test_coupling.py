"""The residual outside the frame from the one inside: planted maps, chance, and the formula by hand."""

import math

import pytest
import torch

from rsa_megatron.realign.coupling import fit_coupling


def residuals(num_samples=2000, rank=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    delta_NR = torch.randn(num_samples, rank, generator=generator, dtype=torch.float64)
    rest_NC = torch.randn(num_samples, 10, generator=generator, dtype=torch.float64)
    map_CR = 0.5 * torch.randn(10, rank, generator=generator, dtype=torch.float64)
    return delta_NR, rest_NC, map_CR


def test_a_planted_coupling_is_found():
    delta_NR, rest_NC, map_CR = residuals()
    found = fit_coupling(delta_NR, delta_NR @ map_CR.T)
    # the ridge takes off 1e-6 of it, as the eigenvalues of D D^T are nearly equal
    torch.testing.assert_close(found.map_CR, map_CR, rtol=0, atol=1e-5)
    assert found.norm == pytest.approx(torch.linalg.svdvals(map_CR)[0].item(), rel=1e-5)
    assert found.r_squared == pytest.approx(1, abs=1e-9)
    noisy = fit_coupling(delta_NR, delta_NR @ map_CR.T + rest_NC)
    # five standard errors of a coefficient, noise and delta of variance 1
    torch.testing.assert_close(noisy.map_CR, map_CR, rtol=0, atol=5 / math.sqrt(2000))
    explained = map_CR.square().sum().item()
    assert noisy.r_squared == pytest.approx(explained / (explained + 10), abs=0.02)


def test_no_coupling_explains_as_much_as_chance():
    delta_NR, rest_NC, _ = residuals()
    expected = 6 / 2000  # R of N dimensions; ten columns make its standard deviation sqrt(2 R / 10) / N, 0.00055
    assert fit_coupling(delta_NR, rest_NC).r_squared == pytest.approx(expected, abs=3 * math.sqrt(2 * 6 / 10) / 2000)


def test_the_coupling_is_the_formula():
    delta_NR, rest_NC, map_CR = residuals(300)
    zeta_NC = delta_NR @ map_CR.T + rest_NC
    found = fit_coupling(delta_NR, zeta_NC, ridge=0.1)
    square_RR = delta_NR.T @ delta_NR
    penalty = 0.1 * torch.linalg.eigvalsh(square_RR)[-1]
    plain_CR = zeta_NC.T @ delta_NR @ torch.linalg.inv(square_RR + penalty * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(found.map_CR, plain_CR, rtol=0, atol=1e-10)
    rest = (zeta_NC - delta_NR @ plain_CR.T).square().sum() / zeta_NC.square().sum()
    assert found.r_squared == pytest.approx(1 - rest.item(), abs=1e-10)


def test_couplings_that_cannot_be():
    delta_NR, rest_NC, _ = residuals(50)
    with pytest.raises(ValueError, match="rows of delta and zeta must pair up, not 50 and 49"):
        fit_coupling(delta_NR, rest_NC[:49])
    with pytest.raises(ValueError, match="delta or zeta is zero in every row"):
        fit_coupling(delta_NR, rest_NC * 0)
    with pytest.raises(ValueError, match="ridge=0 must be above 0"):
        fit_coupling(delta_NR, rest_NC, ridge=0)
