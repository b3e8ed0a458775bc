"""Where two spaces lie: the modality gap and the cones that features fill (Liang et al. 2022), beside the metrics.

Shapes: N samples; widths D and E.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rsa_megatron.alignment.nearest_neighbours import check_features
from rsa_megatron.alignment.neighbour_candidates import rows_at_a_time


@dataclass(frozen=True)
class Cone:
    """How one space's rows lie around their mean direction, that of the mean of their unit rows."""

    #: mean length of a row
    mean_norm: float
    #: length of the mean unit row: 1 where all point one way, about 1 / sqrt(N) for directions that fall by chance
    concentration: float
    #: angles of the rows to the mean direction in degrees; the largest is the half-angle of the cone that holds all
    mean_angle: float
    largest_angle: float
    #: exp of the entropy of the shares of variance: along how many directions the rows vary (Roy and Vetterli 2007)
    effective_rank: float


@dataclass(frozen=True)
class ModalityGap:
    #: distance of the two means; None where widths differ, as there is then no space that holds both
    distance: float | None
    #: the same of the unit rows, between 0 and 2
    unit_distance: float | None
    first: Cone
    second: Cone


@torch.no_grad()
def modality_gap(a_ND: Tensor, b_NE: Tensor) -> ModalityGap:
    """Figures of two sets of features, in float64; their rows need not pair up.

    Raises:
        ValueError: when features hold NaN or infinity, or no row that is not zero.
    """
    first, mean_a_D, unit_a_D = _cone(a_ND, "the first features")
    second, mean_b_E, unit_b_E = _cone(b_NE, "the second features")
    if a_ND.shape[1] != b_NE.shape[1]:
        return ModalityGap(None, None, first, second)
    return ModalityGap((mean_a_D - mean_b_E).norm().item(), (unit_a_D - unit_b_E).norm().item(), first, second)


def _cone(x_ND: Tensor, name: str) -> tuple[Cone, Tensor, Tensor]:
    check_features(x_ND, name)
    pieces = x_ND.split(rows_at_a_time(x_ND))
    norm_N = torch.cat([x_bD.double().norm(dim=1) for x_bD in pieces])
    present_N = norm_N > 0  # a zero row has no direction
    if not present_N.any():
        raise ValueError(f"{name}: none of {len(x_ND)} rows has a direction, all are zero")
    inverse_N = torch.where(present_N, 1 / norm_N, 0.0)
    inverses = inverse_N.split(len(pieces[0]))
    mean_D = sum(x_bD.double().sum(0) for x_bD in pieces) / len(x_ND)
    unit_mean_D = sum(f_b @ x_bD.double() for f_b, x_bD in zip(inverses, pieces)) / present_N.sum()
    direction_D = torch.nn.functional.normalize(unit_mean_D, dim=0)
    cosine_N = torch.cat([x_bD.double() @ direction_D for x_bD in pieces]) * inverse_N
    angle_n = cosine_N[present_N].clamp(-1, 1).acos() * (180 / math.pi)
    cone = Cone(
        mean_norm=norm_N.mean().item(),
        concentration=unit_mean_D.norm().item(),
        mean_angle=angle_n.mean().item(),
        largest_angle=angle_n.max().item(),
        effective_rank=_effective_rank(pieces, mean_D, len(x_ND)),
    )
    return cone, mean_D, unit_mean_D


def _effective_rank(pieces: tuple[Tensor, ...], mean_D: Tensor, num_rows: int) -> float:
    # Variances along principal directions from the smaller of N x N and D x D; 0 where all rows are equal.
    if num_rows <= len(mean_D):
        c_ND = torch.cat(pieces).double() - mean_D
        square = c_ND @ c_ND.T
    else:
        square = sum((c_bD := x_bD.double() - mean_D).T @ c_bD for x_bD in pieces)
    variance = torch.linalg.eigvalsh(square).clamp_min(0.0)
    if variance.sum() == 0:
        return 0.0
    share = variance / variance.sum()
    return torch.special.entr(share).sum().exp().item()
