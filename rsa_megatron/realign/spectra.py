"""What the eigenvalues of a covariance say: how many directions, and how unequal.

Covariances are of unit rows in float64, and divide by N as the paper's traces do (arXiv 2602.07026). The paper plots an
effective condition number that it does not define, and names no range for its power-law exponents. Both are taken here over
the leading eigenvalues, those that hold 99 % of the variance: the others are noise of the sample, or zero where rows lie in a
subspace.

Shapes: N rows, D width, k leading eigenvalues.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rsa_megatron.realign.moments import compute_moments
from rsa_megatron.realign.unit_rows import Embeddings

# Share of the variance that condition numbers and exponents look at.
LEADING_ENERGY = 0.99
# Eigenvalues that SpectrumFigures holds.
MOST_VALUES = 256
# Unit rows are rounded by 1e-16, their variance thus to 1e-32 or less: below this total variance nothing varies.
_NO_VARIANCE = 1e-28
# A mean of unit rows shorter than this is what rounding leaves of zero.
SHORTEST_MEAN = 1e-12
# Shares of variance are compared to that many digits: sums of a spectrum that is exactly .5, .3, .2 err in the last one.
_SHARE_ROUNDING = 1e-12


def eigenvalues(covariance_DD: Tensor) -> Tensor:
    """Compute them, falling, [D]; a covariance has none below zero, so rounding errors below zero are set to zero."""
    return torch.linalg.eigvalsh(covariance_DD).flip(0).clamp_min(0.0)


@torch.no_grad()
def spectrum(x_ND: Embeddings) -> Tensor:
    """Compute the eigenvalues of the covariance of the unit rows, falling, [D]; their sum is the trace T.

    Raises:
        ValueError: a row is zero or not finite, or there are fewer than two.
    """
    return eigenvalues(compute_moments(x_ND, "embeddings", with_scatter=True).covariance_DD)


def leading_rank(spectrum_D: Tensor, energy: float = LEADING_ENERGY) -> int:
    """Count the fewest leading eigenvalues that hold this share of the sum."""
    _check_varies(spectrum_D)
    held_D = spectrum_D.cumsum(0) / spectrum_D.sum()
    return int((held_D < energy - _SHARE_ROUNDING).sum()) + 1


def condition_number(spectrum_D: Tensor) -> float:
    """Return lambda_1 / lambda_k, with the k leading eigenvalues that hold 99 % of the variance; 1 where all are equal."""
    return (spectrum_D[0] / spectrum_D[leading_rank(spectrum_D) - 1]).item()


def effective_dimension(spectrum_D: Tensor) -> float:
    """Return tr(S)^2 / tr(S^2): the number of equal eigenvalues that would give the same."""
    _check_varies(spectrum_D)
    return (spectrum_D.sum().square() / spectrum_D.square().sum()).item()


def anisotropy(spectrum_D: Tensor) -> float:
    """Return lambda_1 / (tr(S) / D): the largest variance over the mean one; 1 where all are equal, at most D."""
    _check_varies(spectrum_D)
    return (spectrum_D[0] / spectrum_D.mean()).item()


def power_law_exponent(spectrum_D: Tensor) -> float:
    """Fit alpha of lambda_k ~ k^-alpha: the slope of log lambda over log k, by least squares over leading eigenvalues.

    Each rank weighs the same, so that the many small ones of the range decide.

    Raises:
        ValueError: with fewer than three leading eigenvalues: any two lie on a line.
    """
    rank = leading_rank(spectrum_D)
    if rank < 3:
        raise ValueError(f"a power law needs three eigenvalues; {rank} of {len(spectrum_D)} hold 99 % of the variance")
    log_k = torch.arange(1, rank + 1, dtype=torch.float64, device=spectrum_D.device).log()
    log_k -= log_k.mean()
    return (-(log_k @ spectrum_D[:rank].log()) / log_k.square().sum()).item()


def principal_angle(vector_D: Tensor, covariance_DD: Tensor) -> float:
    """Measure the angle to the first principal direction, in degrees of 0 to 90: an eigenvector has no sign."""
    direction_D = torch.linalg.eigh(covariance_DD).eigenvectors[:, -1]
    cosine = (vector_D @ direction_D).abs() / vector_D.norm()
    return torch.rad2deg(cosine.clamp(max=1.0).acos()).item()


def varies(spectrum_D: Tensor) -> bool:
    """Return whether there is any variance beyond the rounding of unit rows."""
    return bool(spectrum_D.sum() > _NO_VARIANCE)


def _check_varies(spectrum_D: Tensor) -> None:
    if not varies(spectrum_D):
        raise ValueError("nothing varies: all rows are equal, and a spectrum of zeros has no shape")


@dataclass(frozen=True)
class SpectrumFigures:
    """Plain numbers of a spectrum; those that do not exist are None, as where nothing varies."""

    trace: float
    condition_number: float | None
    effective_dimension: float | None
    anisotropy: float | None
    exponent: float | None
    #: the largest eigenvalues, falling, at most 256
    values: list[float]

    @classmethod
    def of(cls, spectrum_D: Tensor) -> "SpectrumFigures":
        trace, values = spectrum_D.sum().item(), spectrum_D[:MOST_VALUES].tolist()
        if not varies(spectrum_D):
            return cls(trace, None, None, None, None, values)
        exponent = power_law_exponent(spectrum_D) if leading_rank(spectrum_D) >= 3 else None
        shape = condition_number(spectrum_D), effective_dimension(spectrum_D), anisotropy(spectrum_D)
        return cls(trace, *shape, exponent, values)
