"""How far the gap's residual outside the frame follows the one inside: zeta = L delta + rest (arXiv 2602.07026, appendix C).

L is found by ridge regression, L = Z D^T (D D^T + lambda)^-1 with the samples as columns of D and Z. The paper names no
lambda; here it is a share of the largest eigenvalue of D D^T, and means the same for any number of samples and any scale.

Shapes: N samples, R coordinates of delta, C of zeta.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Enough for a solution where Cov delta has no inverse: its error, a millionth of L along the largest direction, is 1 % of
# L along directions of 1e-4 of that variance.
RIDGE = 1e-6


@dataclass(frozen=True)
class Coupling:
    #: L: coordinates of zeta from those of delta
    map_CR: Tensor
    #: its operator norm, the most that it lengthens any vector
    norm: float
    #: share of zeta's energy that L delta explains, in the same sample: about R / N where there is nothing to explain
    r_squared: float


@torch.no_grad()
def fit_coupling(delta_NR: Tensor, zeta_NC: Tensor, ridge: float = RIDGE) -> Coupling:
    """Fit L on residuals of the same samples, rows in any coordinates, in float64.

    Args:
        ridge: lambda as a share of the largest eigenvalue of D D^T.

    Raises:
        ValueError: when rows do not pair up, either is zero throughout, or ridge is not above 0.
    """
    if len(delta_NR) != len(zeta_NC):
        raise ValueError(f"rows of delta and zeta must pair up, not {len(delta_NR)} and {len(zeta_NC)}")
    delta_NR, zeta_NC = delta_NR.double(), zeta_NC.double()
    if not delta_NR.any() or not zeta_NC.any():
        raise ValueError("delta or zeta is zero in every row: there is nothing to couple")
    return fit_ridge_coupling(zeta_NC.T @ delta_NR, delta_NR.T @ delta_NR, zeta_NC.square().sum(), ridge)


def fit_ridge_coupling(zeta_delta_CR: Tensor, delta_RR: Tensor, zeta_energy: Tensor, ridge: float = RIDGE) -> Coupling:
    """Fit L from Z D^T, D D^T and |Z|^2, or from all three divided by N."""
    if not ridge > 0:
        raise ValueError(f"ridge={ridge} must be above 0: Cov delta may have no inverse")
    penalty = ridge * torch.linalg.matrix_norm(delta_RR, 2)
    regular_RR = delta_RR + penalty * torch.eye(len(delta_RR)).to(delta_RR)
    map_CR = torch.linalg.solve(regular_RR, zeta_delta_CR.T).T
    # |Z - L D|^2 = |Z|^2 - 2 <L, Z D^T> + <L D D^T, L>
    explained = (map_CR * (2 * zeta_delta_CR - map_CR @ delta_RR)).sum()
    return Coupling(map_CR, torch.linalg.matrix_norm(map_CR, 2).item(), (explained / zeta_energy).item())
