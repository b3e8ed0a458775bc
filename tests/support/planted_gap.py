"""Paired embeddings whose frame, biases and residuals are known exactly, although all rows have unit length.

A row is a constant vector plus amplitudes along orthonormal directions, each with a sign. A modality's constant has no part
along the directions it varies on, so that |row|^2 = |constant|^2 + sum of squared amplitudes for any signs. A constant of
the one along a direction of the other is how beta comes into U, and gamma onto a principal direction of zeta.

Shapes: N pairs, D = 16 width, S = 8 signs.
"""

import torch
from torch import Tensor

WIDTH, RANK = 16, 4
# Squared amplitudes by direction. Directions 0 to 3 are U: 0.5 of a variance of 0.53.
IMAGE_VARIANCE = {0: 0.20, 1: 0.10, 4: 0.016, 5: 0.008}
TEXT_VARIANCE = {2: 0.15, 3: 0.05, 6: 0.004, 7: 0.002}
ENERGY = 0.50 / 0.53
# Constants by direction; what is left to a length of 1 goes along direction 8.
IMAGE_CONSTANT = {2: 0.3}
TEXT_CONSTANT = {0: -0.2, 4: 0.3, 9: 0.25}
FILL = 8

axes_DD = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q


def balanced_signs(num_rows: int = 64) -> Tensor:
    """Columns of a Hadamard matrix, [N, S]: they sum to 0 and are orthogonal, so that sample covariances are exact."""
    h_NN = torch.ones(1, 1, dtype=torch.float64)
    while len(h_NN) < num_rows:
        h_NN = torch.cat([torch.cat([h_NN, h_NN], 1), torch.cat([h_NN, -h_NN], 1)])
    return h_NN[:, 1:9]


def random_signs(num_rows: int, seed: int = 0) -> Tensor:
    return torch.randint(2, (num_rows, 8), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def planted_pairs(sign_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Images and texts, rows of lengths between 1 and 3: only their direction is planted."""
    length_N1 = 1 + 2 * torch.rand(len(sign_NS), 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    image = _rows(sign_NS, IMAGE_VARIANCE, constant(IMAGE_CONSTANT, IMAGE_VARIANCE))
    text = _rows(sign_NS, TEXT_VARIANCE, constant(TEXT_CONSTANT, TEXT_VARIANCE))
    return image * length_N1, text * length_N1.flip(0)


def constant(parts: dict[int, float], variance: dict[int, float]) -> Tensor:
    """A modality's mean in coordinates, [D]."""
    mean_D = torch.zeros(WIDTH, dtype=torch.float64)
    mean_D[list(parts)] = torch.tensor(list(parts.values()), dtype=torch.float64)
    mean_D[FILL] = (1 - sum(variance.values()) - mean_D.square().sum()).sqrt()
    return mean_D


def _rows(sign_NS: Tensor, variance: dict[int, float], mean_D: Tensor) -> Tensor:
    coordinate_ND = mean_D.repeat(len(sign_NS), 1)
    for direction, square in variance.items():
        coordinate_ND[:, direction] += square**0.5 * sign_NS[:, direction]
    return coordinate_ND @ axes_DD.T


def planted_mean() -> Tensor:
    """m = beta + gamma in coordinates, [D]: the first RANK are beta."""
    return constant(IMAGE_CONSTANT, IMAGE_VARIANCE) - constant(TEXT_CONSTANT, TEXT_VARIANCE)
