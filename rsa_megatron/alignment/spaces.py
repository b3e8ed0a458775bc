"""The kernels of two spaces from rows near 1, and the way back from what is computed of them to the rows as they are.

Squares of numbers from 2e19 on, and below 1e-19, are no float32; distances need them. So rows are multiplied by powers of two, which
costs no digit. With c_V, c_T the powers, c that of the larger space, and p the degree of the distance (a power of two times
rows gives its p-th power times K), K' = c_V^p K^V, and for K^T likewise.

Without normalisation distances are compared as they are: c_V = c_T = c, r' = c^p r,
    L = c^-2p 1/N^2 sum r'^2,        dL/dx_i = 2/N^2 c^-p c_V^(1-p) 2 sum_j r'_ij slope'_ij (x'_i - x'_j).
A space that is so much smaller than the other that its squares would still be none is taken larger than it is (_MOST_BELOW): its
distances are nothing beside the other's, and its own gradient is one of directions, and of c_T.
With normalisation r has no scale: each space has its own c, and dL/dx_i = 2/N^2 c_V 1/m'_V 2 sum_j (..)_ij slope'_ij (x'_i - x'_j).
Cosine (p = 0) has unit rows u = x / |x|: dL/dx_i is the part of dL/du_i that is across u_i, over |x_i|.

Shapes: N pairs, n of them this rank's own; D and E widths.
"""

import torch
from torch import Tensor

from rsa_megatron.alignment.distances import (
    find_distance,
    largest_number,
    scale_near_one,
    unit_rows_and_inverse_lengths,
)
from rsa_megatron.alignment.pairwise_kernel import PairwiseKernel

_MOST_BELOW = {torch.float32: 2.0**-40, torch.float64: 2.0**-300}


class Spaces:
    """Two kernels of the same pairs.

    Args:
        v_ND, t_NE: the rows, float32 or both float64, without gradient.
        normalizes: each kernel is divided by its own mean.
    """

    def __init__(self, v_ND: Tensor, t_NE: Tensor, distance: str, *, normalizes: bool):
        self._normalizes, self._degree = normalizes, find_distance(distance).degree
        #: of cosine, u and 1 / |x|
        self._unit = None
        if find_distance(distance).uses_unit_rows:
            self._unit = [unit_rows_and_inverse_lengths(x) for x in (v_ND, t_NE)]
            self.kernels = tuple(PairwiseKernel(u_ND, distance) for u_ND, _ in self._unit)
            return
        own_2 = scale_near_one(torch.stack([largest_number(v_ND), largest_number(t_NE)]))
        scale_1 = own_2.amin(dim=0, keepdim=True)
        self._scale_2 = own_2 if normalizes else torch.maximum(scale_1, own_2 * _MOST_BELOW[own_2.dtype])
        self.kernels = tuple(PairwiseKernel(x, distance, c) for x, c in zip((v_ND, t_NE), self._scale_2))
        #: 1/c, 1/c_V, 1/c_T. (In float64, which holds their products too.)
        self._back_3 = torch.cat([scale_1, self._scale_2]).double().reciprocal_()

    def sums(self, sums_3: Tensor) -> Tensor:
        """Sums of r^2, K^V and K^T of the rows as they are, float64; those of r'^2, K'^V and K'^T are used up."""
        if self._unit is None:
            for _ in range(self._degree):
                sums_3[1:] *= self._back_3[1:]
                if not self._normalizes:  # r^2 has the degree twice
                    sums_3[0] *= self._back_3[0]
                    sums_3[0] *= self._back_3[0]
        return sums_3

    def gradients(self, of_kernels: list[Tensor | None], rows: slice) -> list[Tensor | None]:
        """dL/dx of the own rows but for `gradient_factors`, from the sums over j; these are used up."""
        if self._unit is None:
            return of_kernels
        return [
            g if g is None else _across(u[rows], g).mul_(over[rows]) for g, (u, over) in zip(of_kernels, self._unit)
        ]

    def gradient_factors(self) -> tuple[Tensor | float, Tensor | float]:
        """What the gradients are still to be multiplied by, beside 2/N^2 and what the normalisation has."""
        if self._unit is not None:
            return 1.0, 1.0
        if self._normalizes:
            return tuple(self._scale_2)
        back = self._back_3[0] ** self._degree
        return (back, back) if self._degree == 1 else tuple(back * self._back_3[1:])


def _across(u_nD: Tensor, g_nD: Tensor) -> Tensor:
    """The part of each row of g that is across that of u, in place."""
    along_n = torch.linalg.vecdot(u_nD, g_nD, out=g_nD.new_empty(len(g_nD)))  # (`out`: not for autocast)
    return g_nD.addcmul_(u_nD, along_n[:, None], value=-1)
