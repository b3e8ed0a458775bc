"""RSA over a batch whose rows come in parts, one after another: each part against itself and against all before it.

An optimizer step works on M micro-batches in turn. The kernel of the global batch, N = sum_m N_m pairs,

    L = 1/N^2 sum_ij r_ij^2,    r_ij = K^V_ij - K^T_ij                                  (paper, eq. 5)

falls into blocks R(m, m') = sum_{i in m, j in m'} r_ij^2, and R(m, m') = R(m', m). When micro-batch m has gone forward, its
own vectors have a gradient, those of the micro-batches before it are known as numbers (the parameters are the same within a
step), those of later ones are not known. So each block is taken once, at its later micro-batch, for itself and for its mirror
image:

    S_m = R(m, m) + 2 sum_{m' < m} R(m, m')         sum_m S_m = N^2 L: the value is the full batch's, exactly.

The gradient. R(m, m) is differentiated through both of its sides. Of a block between m' < m, which stands in N^2 L as
2 R(m, m') and depends on both parts' vectors,
    d(2 R(m, m')) = d_m(2 R) + d_m'(2 R),
the part d_m' cannot be had any more: the backward pass of m' is over. Taking 2 d_m(2 R) in its place gives twice the one
and nothing of the other. Which of two micro-batches comes later is chance, each with probability 1/2 (the data are
shuffled), so that the expectation over orders is 1/2 (2 d_m) + 1/2 (2 d_m') applied to 2 R: the full batch's gradient, exactly.
What is paid for it is variance: micro-batch m stands against (m - 1) N_m rows instead of (M - 1) N_m. (The first
micro-batch of a step has its own kernel alone, the last has everyone's, with doubled weight.)

`rsa_sums` gives S_m this way from two calls of `rsa_loss_of_rows`, whose gradient of a row's terms is that of the whole loss
(r_ij and r_ji at once): own rows against all rows so far, A = N_a^2 L_a = R(m, m) + sum_{m'} R(m, m'), with gradients
d R(m, m) + d_m (2 sum R), and own rows against their own micro-batch, B = R(m, m): S_m = 2 A - B, and so the gradient
2 d R(m, m) + 2 d_m (2 sum R) - d R(m, m), as derived.

Shapes: n own rows of this rank, N_m of the micro-batch on all ranks, M_e of those before it; D and E widths.
"""

import torch
from torch import Tensor

from rsa_megatron.alignment.loss import RSALossOfRows, rsa_loss_of_rows


def rsa_sums(
    v_nD: Tensor,
    t_nE: Tensor,
    v_ND: Tensor,
    t_NE: Tensor,
    first_row: int,
    earlier_v_MD: Tensor,
    earlier_t_ME: Tensor,
    *,
    distance: str = "euclidean",
) -> RSALossOfRows:
    """One rank's rows of S_m, a sum and not a mean: over all micro-batches and ranks it adds up to N^2 L_RSA.

    Args:
        v_nD, t_nE, v_ND, t_NE, first_row, distance: of this micro-batch, as `rsa_loss_of_rows` takes them.
        earlier_v_MD, earlier_t_ME: rows of all ranks in the step's micro-batches before this one, without gradient.

    Returns:
        Sums over own rows i and all rows j, a pair with an earlier row counted for both of its orders: of r_ij^2, of
        K^V_ij and of K^T_ij.
    """
    own = rsa_loss_of_rows(v_nD, t_nE, v_ND, t_NE, first_row, distance=distance)
    own_loss_sum = own.loss * len(v_ND) ** 2
    if not len(earlier_v_MD):
        return own._replace(loss=own_loss_sum)
    v_all, t_all = torch.cat([earlier_v_MD, v_ND]), torch.cat([earlier_t_ME, t_NE])
    both = rsa_loss_of_rows(v_nD, t_nE, v_all, t_all, len(earlier_v_MD) + first_row, distance=distance)
    return RSALossOfRows(
        2 * both.loss * len(v_all) ** 2 - own_loss_sum,
        2 * both.distance_sum_v - own.distance_sum_v,
        2 * both.distance_sum_t - own.distance_sum_t,
    )
