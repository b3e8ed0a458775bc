"""How the modality gap moves while two encoders are trained, seen from the frame of one step (arXiv 2602.07026, figure 1, app. B).

All of it is measured on the same probe pairs at every step. What the paper leaves open is decided here: leakage is a ratio
of lengths, as is the bound it is compared with; correlations are Pearson's. Its "vMF concentration" is not defined there
and is omitted.

Shapes: N pairs or gradients, D width, R rank of the frame.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from rsa_megatron.realign.decomposition import Terms
from rsa_megatron.realign.frame import Frame
from rsa_megatron.realign.spectra import SHORTEST_MEAN, eigenvalues


@torch.no_grad()
def window_covariances(steps: Iterable[Terms]) -> tuple[Tensor, Tensor]:
    """Average Cov delta and Cov zeta, [D, D] each, over the steps of a window.

    Samples pooled over the steps would give more: by the law of total covariance (Lemma B.9), that of the moving mean comes
    on top, Cov over steps of beta(t) in U and of gamma(t) in V.

    Raises:
        ValueError: when there is no step.
    """
    delta_DD, zeta_DD, num_steps = 0.0, 0.0, 0
    for terms in steps:  # the means of their residuals are zero
        delta_DD = delta_DD + terms.delta_ND.T @ terms.delta_ND / len(terms.delta_ND)
        zeta_DD = zeta_DD + terms.zeta_ND.T @ terms.zeta_ND / len(terms.zeta_ND)
        num_steps += 1
    if num_steps == 0:
        raise ValueError("a window without steps has no covariance")
    return delta_DD / num_steps, zeta_DD / num_steps


def rotation_sine(frame_t: Frame, frame: Frame) -> float:
    """Return sin of the largest principal angle between U_t and U: the operator norm of P_V P_{U_t}, 0 to 1.

    The residual itself has all its digits where the angle is small; sqrt(1 - sigma_min(Q^T Q_t)^2) loses half of them. The
    sine is 1 where U_t has more dimensions than U: one of them then lies in V.
    """
    residual_DR = frame.project_onto_v(frame_t.basis_DR.T)
    return min(torch.linalg.matrix_norm(residual_DR, 2).item(), 1.0)


def leakage(gradient_ND: Tensor, frame: Frame) -> float:
    """Return RMS |P_V g| / RMS |g|: the share of the embeddings' gradients outside the frame, 0 to 1.

    Raises:
        ValueError: when all gradients are zero, or some are not finite.
    """
    gradient_ND = gradient_ND.double()
    length = gradient_ND.norm().item()
    if not 0 < length < float("inf"):
        raise ValueError(f"the gradients' length is {length}: they have no share outside the frame")
    return frame.project_onto_v(gradient_ND).norm().item() / length


def leakage_bound(sine: float, coupling_norm: float = 0.0, remainder: float = 0.0) -> float:
    """Bound `leakage` from above: sin theta + |L| + rho (appendix C), at most 1.

    Lemma B.7 is the first term: a gradient in U_t leaks at most sin theta.

    Args:
        sine: `rotation_sine` of U_t.
        coupling_norm: |L| of `coupling`, for gradients that follow residuals in V.
        remainder: rho, the share of the gradients' length that neither explains.
    """
    return min(sine + coupling_norm + remainder, 1.0)


def stability(gamma_D: Tensor, previous_D: Tensor) -> float:
    """Return the cosine of gamma at one step with that of the step before: 1 where it keeps its direction.

    Raises:
        ValueError: when either is zero.
    """
    lengths = gamma_D.norm(), previous_D.norm()
    if min(lengths) < SHORTEST_MEAN:
        raise ValueError("gamma is zero at one of the two steps: it has no direction")
    return (gamma_D @ previous_D / (lengths[0] * lengths[1])).item()


def drift(gamma_D: Tensor, reference_D: Tensor) -> float:
    """Return |gamma(t) - gamma(t0)| / |gamma(t0)|, 0 where it has not moved; the denominator is at least 1e-12."""
    return ((gamma_D - reference_D).norm() / reference_D.norm().clamp_min(SHORTEST_MEAN)).item()


def covariance_correlations(residual_DD: Tensor, gradient_DD: Tensor, frame: Frame) -> tuple[float, float]:
    """Correlate covariances of residuals and of gradients within U: their eigenvalues, and their diagonals.

    The first compares sorted spectra, and is high for any two that fall as fast. The second compares variances along the
    frame's own axes, which is what the gradients would have to follow. nan where those of either are all equal.
    """
    within = [frame.basis_DR.T @ x_DD.double() @ frame.basis_DR for x_DD in (residual_DD, gradient_DD)]
    spectra_2R = torch.stack([eigenvalues(x_RR) for x_RR in within])
    diagonals_2R = torch.stack([x_RR.diagonal() for x_RR in within])
    return torch.corrcoef(spectra_2R)[0, 1].item(), torch.corrcoef(diagonals_2R)[0, 1].item()
