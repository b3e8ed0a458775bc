"""How far projection onto the sphere moves a mean: Theorem B.14 against sampling and against a case that is exact."""

import math

import pytest
import torch

from rsa_megatron.realign.decomposition import second_order_drift
from rsa_megatron.realign.realign import normalise_rows


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def drift_by_sampling(mean_D, root_DD, num_samples=400_000):
    """Of z = mean +- root n: the two signs cancel odd powers, and with them the largest part of the sampling error."""
    generator = torch.Generator().manual_seed(0)
    noise_ND = torch.randn(num_samples, len(mean_D), generator=generator, dtype=torch.float64) @ root_DD.T
    both_D = (normalise_rows(mean_D + noise_ND) + normalise_rows(mean_D - noise_ND)).mean(0) / 2
    return both_D - mean_D / mean_D.norm()


def spread(size, width=6):
    """mu, and a root of Sigma with unequal axes that are not mu's: sqrt(tr Sigma) = size |mu|."""
    generator = torch.Generator().manual_seed(5)
    mean_D = torch.randn(width, generator=generator, dtype=torch.float64)
    root_DD = torch.randn(width, width, generator=generator, dtype=torch.float64) * torch.arange(1, width + 1) ** -1.0
    return mean_D, root_DD * (size * mean_D.norm() / root_DD.norm())


def test_second_order_drift_against_sampling():
    """Theorem B.14. What it neglects is smaller by about tr Sigma / r^2, 1 % at a size of 0.1; sampling adds 0.3 %."""
    mean_D, root_DD = spread(0.1)
    expected_D, sampled_D = second_order_drift(mean_D, root_DD @ root_DD.T), drift_by_sampling(mean_D, root_DD)
    assert (sampled_D - expected_D).norm() < 0.03 * expected_D.norm()
    # a last term with the factor 1/2 of its neighbour in the place of 3/2 would be seen
    a_D = mean_D / mean_D.norm()
    last_D = 1.5 * a_D * (a_D @ root_DD).square().sum() / mean_D.square().sum()
    assert (sampled_D - (expected_D - last_D * 2 / 3)).norm() > 0.1 * expected_D.norm()


def test_drift_of_the_toy_case():
    """mu = (1, 0) and z = (1, +-a): the mean direction is (1 / sqrt(1 + a^2), 0); the expansion gives -a^2 / 2."""
    mean_D = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for a in (0.1, 0.01):
        exact = normalise_rows(torch.tensor([[1.0, a], [1.0, -a]], dtype=torch.float64)).mean(0)
        close(exact, torch.tensor([1 / math.sqrt(1 + a**2), 0.0], dtype=torch.float64), 1e-15)
        drift_D = second_order_drift(mean_D, torch.diag(torch.tensor([0.0, a**2], dtype=torch.float64)))
        close(drift_D, torch.tensor([-(a**2) / 2, 0.0], dtype=torch.float64), 1e-15)
        close(drift_D, exact - mean_D, 3 / 8 * a**4)  # the next term of an alternating series


def test_isotropic_noise_shortens_and_does_not_turn():
    mean_D, _ = spread(0.1)
    drift_D = second_order_drift(mean_D, 0.01 * torch.eye(6, dtype=torch.float64))
    along = drift_D @ mean_D / mean_D.norm()
    assert (drift_D - along * mean_D / mean_D.norm()).norm() < 1e-15  # Corollary B.15
    assert along.item() == pytest.approx(-0.01 * (6 - 1) / 2 / mean_D.square().sum().item())


def test_a_mean_of_zero_has_no_direction_to_drift_from():
    for mean_D, length in ((torch.zeros(6), 0.0), (torch.full((6,), math.nan), math.nan)):
        with pytest.raises(ValueError, match=f"the mean's length is {length}: it has no direction"):
            second_order_drift(mean_D, torch.eye(6))
