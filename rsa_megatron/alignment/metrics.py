"""How well two spaces agree on which samples are alike: numbers to report, without gradient.

Shapes: N samples, the rows of both inputs in the same order; widths D and E.
"""

import torch
from torch import Tensor

from rsa_megatron.alignment.similarity import at_least_fp32, float32_products, unit_rows


@torch.no_grad()
def mutual_knn(a_ND: Tensor, b_NE: Tensor, k: int = 10) -> float:
    """Mean share of a sample's k nearest neighbours that the two spaces have in common (paper, eq. 9).

    Neighbours are those of largest cosine similarity, the sample itself left out, as in Huh et al. 2024
    (platonic-rep's mutual_knn without its clipping of outliers). 1 for a space against itself; about
    k / (N - 1) for spaces that have nothing to do with each other, which belongs beside every figure reported.

    Raises:
        ValueError: when there are no k other samples, or the inputs do not pair up.
    """
    num_samples = a_ND.shape[0]
    if b_NE.shape[0] != num_samples:
        raise ValueError(f"mutual_knn compares the same samples: got {num_samples} and {b_NE.shape[0]} rows")
    if not 0 < k < num_samples:
        raise ValueError(f"k={k} neighbours need at least k + 1 samples; there are {num_samples}")
    # Which of N samples are neighbours, a row of them for each sample.
    member_a_NN, member_b_NN = (_neighbours(x, k) for x in (a_ND, b_NE))
    return (member_a_NN & member_b_NN).sum().item() / (k * num_samples)


@float32_products()
def _neighbours(x_ND: Tensor, k: int) -> Tensor:
    u_ND = unit_rows(at_least_fp32(x_ND))
    similarity_NN = (u_ND @ u_ND.T).fill_diagonal_(float("-inf"))
    index_Nk = similarity_NN.topk(k, dim=1).indices
    return torch.zeros_like(similarity_NN, dtype=torch.bool).scatter_(1, index_Nk, True)
