"""The modality gap in a fixed frame: what of it is a shift, and what a residual (arXiv 2602.07026, section 3, app. A to C).

The frame is the span U of the directions in which images and texts vary most, taken once at a reference step and fixed; V is
its complement. The difference of a pair's embeddings splits into four terms without a remainder (eq. 1):

    Delta = e_x - e_y = beta + gamma + delta + zeta,        m = E[Delta]
    beta = P_U m      gamma = P_V m      delta = P_U (Delta - m)      zeta = P_V (Delta - m)

beta and gamma are first order, and a translation removes them; delta and zeta are what it leaves. As U and V are
orthogonal, and delta and zeta have mean zero, E|Delta|^2 = |beta|^2 + |gamma|^2 + tr Cov delta + tr Cov zeta: the energy budget.

Embeddings are one tensor [N, D] or its pieces in order; rows are brought to length 1 and to float64. Pairs are needed only
for Delta: row i of both is the same sample there. `decompose` holds delta and zeta of every pair; `compute_term_moments` and
`compute_gap_figures` need only their covariances, and go over the pieces once. How the gap moves over training steps is in
trajectory.py.

Shapes: N pairs, D width, R rank of the frame, C = D - R; b rows of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rsa_megatron.realign.coupling import fit_ridge_coupling
from rsa_megatron.realign.frame import Frame
from rsa_megatron.realign.moments import Moments, compute_moments
from rsa_megatron.realign.paired_rows import NAMES, check_widths, iterate_unit_pairs
from rsa_megatron.realign.spectra import SHORTEST_MEAN, SpectrumFigures, eigenvalues, principal_angle, varies
from rsa_megatron.realign.unit_rows import Embeddings


@dataclass(frozen=True)
class Terms:
    """Delta_i = beta + gamma + delta_i + zeta_i of each pair, in float64."""

    beta_D: Tensor
    gamma_D: Tensor
    #: zero mean; in U and in V, so that delta_i . zeta_i = 0
    delta_ND: Tensor
    zeta_ND: Tensor

    @property
    def mean_D(self) -> Tensor:
        return self.beta_D + self.gamma_D


@dataclass(frozen=True)
class EnergyBudget:
    """Mean squares: `total` is E|Delta|^2, and the sum of the others up to rounding."""

    total: float
    beta: float
    gamma: float
    delta: float
    zeta: float


@torch.no_grad()
def decompose(frame: Frame, image_ND: Embeddings, text_ND: Embeddings) -> Terms:
    """Split paired embeddings into the four terms (eq. 1, Lemma B.3), two float64 matrices of N rows among them.

    Raises:
        ValueError: when rows do not pair up, one of them has no direction, or the frame has another width.
    """
    difference_ND = torch.cat([x_bD - y_bD for x_bD, y_bD in iterate_unit_pairs(image_ND, text_ND)])
    mean_D = difference_ND.mean(0)
    frame.check_width(mean_D)
    residual_ND = difference_ND.sub_(mean_D)
    delta_ND = frame.project_onto_u(residual_ND)
    return Terms(frame.project_onto_u(mean_D), frame.project_onto_v(mean_D), delta_ND, residual_ND.sub_(delta_ND))


@torch.no_grad()
def energy_budget(terms: Terms) -> EnergyBudget:
    """Compute squared lengths of beta and gamma, traces of Cov delta and Cov zeta, and independently E|Delta|^2."""
    difference_ND = terms.delta_ND + terms.zeta_ND + terms.mean_D
    means = (x_ND.square().sum(1).mean().item() for x_ND in (terms.delta_ND, terms.zeta_ND))
    total = difference_ND.square().sum(1).mean().item()
    return EnergyBudget(total, terms.beta_D.square().sum().item(), terms.gamma_D.square().sum().item(), *means)


@dataclass(frozen=True)
class TermMoments:
    """The terms' means and covariances, without a row of them: the residuals' along the frame's axes."""

    num_pairs: int
    #: E|Delta|^2
    total: float
    beta_D: Tensor
    gamma_D: Tensor
    #: Cov delta, Cov zeta and E[zeta delta^T]
    delta_RR: Tensor
    zeta_CC: Tensor
    zeta_delta_CR: Tensor

    @classmethod
    def of(cls, frame: Frame, difference: Moments) -> "TermMoments":
        """Rotate Delta's covariance into the frame's axes: that of delta is one corner, that of zeta the other."""
        frame.check_width(difference.mean_D)
        turned_DD = frame.axes_DD.T @ difference.covariance_DD @ frame.axes_DD
        u, v = slice(frame.rank), slice(frame.rank, None)
        mean_D = difference.mean_D
        total = (mean_D.square().sum() + difference.square_sum / difference.num_rows).item()
        biases = frame.project_onto_u(mean_D), frame.project_onto_v(mean_D)
        return cls(difference.num_rows, total, *biases, turned_DD[u, u], turned_DD[v, v], turned_DD[v, u])

    def compute_budget(self) -> EnergyBudget:
        squares = (x_D.square().sum().item() for x_D in (self.beta_D, self.gamma_D))
        # Of a residual that is zero, rounding may leave a trace of -1e-17.
        traces = (max(x_DD.trace().item(), 0.0) for x_DD in (self.delta_RR, self.zeta_CC))
        return EnergyBudget(self.total, *squares, *traces)


@torch.no_grad()
def compute_term_moments(frame: Frame, image_ND: Embeddings, text_ND: Embeddings) -> TermMoments:
    """Decompose any number of pairs in one pass, with memory for three D x D matrices.

    Raises:
        ValueError: when rows do not pair up, one of them has no direction, or the frame has another width.
    """
    difference = Moments.empty()
    for x_bD, y_bD in iterate_unit_pairs(image_ND, text_ND):
        _merge(difference, x_bD - y_bD)
    return TermMoments.of(frame, difference)


@dataclass(frozen=True)
class GapFigures:
    """All figures of a pair of encoders on paired samples; `dataclasses.asdict` of it fits a JSON line."""

    num_pairs: int
    width: int
    #: the frame's rank, and the share of both modalities' variance that it holds
    rank: int
    energy: float
    #: lengths of m, beta and gamma
    mean_norm: float
    beta_norm: float
    gamma_norm: float
    budget: EnergyBudget
    image: SpectrumFigures
    text: SpectrumFigures
    #: of the residuals within U, R values, and within V, D - R values
    delta: SpectrumFigures
    zeta: SpectrumFigures
    #: of zeta = L delta + rest; None where delta or zeta does not vary
    coupling_norm: float | None
    coupling_r_squared: float | None
    #: between gamma and the first principal direction of zeta, in degrees of 0 to 90; None where there is no V or no zeta
    gamma_angle: float | None


@torch.no_grad()
def compute_gap_figures(
    image_ND: Embeddings, text_ND: Embeddings, *, energy: float = 0.99, rank: int | None = None
) -> GapFigures:
    """Compute frame, terms, spectra and coupling of paired embeddings: one pass over both, and a few D x D matrices.

    Raises:
        ValueError: when rows do not pair up, one of them has no direction, or nothing varies.
    """
    image, text, difference = _compute_pair_moments(image_ND, text_ND)
    frame = Frame.of_covariance(image.covariance_DD + text.covariance_DD, energy=energy, rank=rank)
    terms = TermMoments.of(frame, difference)
    delta_R, zeta_C = eigenvalues(terms.delta_RR), eigenvalues(terms.zeta_CC)
    coupled, gamma_angle = None, None
    if varies(delta_R) and varies(zeta_C):
        coupled = fit_ridge_coupling(terms.zeta_delta_CR, terms.delta_RR, terms.zeta_CC.trace())
    if terms.gamma_D.norm() > SHORTEST_MEAN and varies(zeta_C):
        gamma_angle = principal_angle(terms.gamma_D @ frame.axes_DD[:, frame.rank :], terms.zeta_CC)
    return GapFigures(
        num_pairs=terms.num_pairs,
        width=len(frame.axes_DD),
        rank=frame.rank,
        energy=frame.energy,
        mean_norm=difference.mean_D.norm().item(),
        beta_norm=terms.beta_D.norm().item(),
        gamma_norm=terms.gamma_D.norm().item(),
        budget=terms.compute_budget(),
        image=SpectrumFigures.of(eigenvalues(image.covariance_DD)),
        text=SpectrumFigures.of(eigenvalues(text.covariance_DD)),
        delta=SpectrumFigures.of(delta_R),
        zeta=SpectrumFigures.of(zeta_C),
        coupling_norm=coupled and coupled.norm,
        coupling_r_squared=coupled and coupled.r_squared,
        gamma_angle=gamma_angle,
    )


@torch.no_grad()
def centroid_gap(image_ND: Embeddings, text_ND: Embeddings) -> float:
    """Measure the distance between the means of the unit rows, 0 to 2; rows need not pair up."""
    image, text = (compute_moments(x, name) for x, name in zip((image_ND, text_ND), NAMES))
    check_widths(image.mean_D, text.mean_D)
    return (image.mean_D - text.mean_D).norm().item()


def second_order_drift(mean_D: Tensor, covariance_DD: Tensor) -> Tensor:
    """Expand E[pi(z)] - pi(mu), [D], to second order in z - mu, z of this mean and covariance, pi(z) = z / |z| (Thm B.14).

    With r = |mu| and a = mu / r:   -S a / r^2 - a tr S / (2 r^2) + (3 / (2 r^2)) a (a^T S a).
    Third and fourth moments enter with (|z - mu| / r)^3 and ^4; for CLIP's embeddings, where tr S / r^2 is about 1 or
    more, the expansion does not hold.

    Raises:
        ValueError: the mean is zero, or not finite.
    """
    mean_D, covariance_DD = mean_D.double(), covariance_DD.double()
    square = mean_D @ mean_D
    if not 0 < square < float("inf"):
        raise ValueError(f"the mean's length is {square.sqrt().item()}: it has no direction to drift from")
    a_D = mean_D / square.sqrt()
    pulled_D = covariance_DD @ a_D
    return (a_D * (1.5 * (a_D @ pulled_D) - 0.5 * covariance_DD.trace()) - pulled_D) / square


def _compute_pair_moments(image_ND: Embeddings, text_ND: Embeddings) -> tuple[Moments, Moments, Moments]:
    """Compute the moments of images, texts and their differences."""
    sums = Moments.empty(), Moments.empty(), Moments.empty()
    for x_bD, y_bD in iterate_unit_pairs(image_ND, text_ND):
        for found, rows_bD in zip(sums, (x_bD, y_bD, x_bD - y_bD)):
            _merge(found, rows_bD)
    return sums


def _merge(found: Moments, x_bD: Tensor) -> None:
    found.merge(Moments.of_block(x_bD, with_scatter=True))
