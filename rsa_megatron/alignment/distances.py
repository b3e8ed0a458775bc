"""Distances between rows: each is one object, which holds all that is its own.

`between` is what eq. 3 and 4 of the RSA paper say, written for reading and for checking. The rest is what a kernel in blocks
(pairwise_kernel.py) needs. Another distance is another class and its name in rsa_megatron/config.py.

Three of the four come from one product of rows. With s_ij = |x_i - x_j|^2
= |x_i|^2 + |x_j|^2 - 2 x_i.x_j:
    euclidean    K = sqrt(s)
    sqeuclidean  K = s
    cosine       K = 1 - u_i.u_j = s/2 of the unit rows u = x / |x|
and in all three dK_ij/dx_i = slope_ij (x_i - x_j), the slope being 1/K, 2 and 1 (for u).

Shapes: N rows, D width; b rows of one block, c rows of another.
"""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """float64 stays; all else becomes float32. Distances of nearby bf16 rows need the digits."""
    return x if x.dtype == torch.float64 else x.float()


def unit_rows(x_ND: Tensor) -> Tensor:
    """Rows divided by their length, however long or short. A zero row has no direction: it stays zero and gets gradient zero."""
    return _scaled_rows(x_ND)[0]


def unit_rows_and_inverse_lengths(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and 1 / |x| of each row, [N, 1]; 0 of a zero row."""
    u_ND, scale_N1, inverse_N1 = _scaled_rows(x_ND)
    # Of a row below the least normal number it could be infinite, and times a gradient of 0 no number.
    return u_ND, (scale_N1 * inverse_N1).clamp(max=torch.finfo(x_ND.dtype).max)


def largest_number(x_ND: Tensor, dim: tuple[int, ...] = (0, 1)) -> Tensor:
    """The largest absolute value along these dimensions, which stay with size 1 unless they are all; 0 of none."""
    keepdim = len(dim) < 2
    if 0 in x_ND.shape:
        return x_ND.new_zeros([1 if d in dim else size for d, size in enumerate(x_ND.shape)] if keepdim else ())
    if x_ND.is_cuda:
        return torch.linalg.vector_norm(x_ND, torch.inf, dim=dim, keepdim=keepdim)
    # On the CPU that norm takes as long as a matrix product.
    return torch.maximum(x_ND.amax(dim=dim, keepdim=keepdim), -x_ND.amin(dim=dim, keepdim=keepdim))


def scale_near_one(largest: Tensor) -> Tensor:
    """A power of two, so that no digit is lost, which brings numbers of this size to between 1 and 4: their squares are floats.

    (Of 0, infinity and what is no number, some finite one.) The exponent's bits are turned round: 2^e becomes 2^-e.
    """
    integer, shift, bias = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}[
        largest.dtype
    ]
    exponent = largest.detach().view(integer).bitwise_and((2 * bias + 1) << shift)
    return torch.rsub(exponent, 2 * bias << shift).clamp(min=1 << shift).view(largest.dtype)


def _scaled_rows(x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u = x / |x|, a power of two for each row and the inverse length of the row times that."""
    scale_N1 = scale_near_one(largest_number(x_ND.detach(), dim=(1,)))
    y_ND = x_ND * scale_N1
    norm_N1 = y_ND.norm(dim=-1, keepdim=True)
    is_zero_N1 = norm_N1 == 0
    inverse_N1 = (1 / norm_N1.masked_fill(is_zero_N1, 1.0)).masked_fill(is_zero_N1, 0.0)
    return y_ND * inverse_N1, scale_N1, inverse_N1


class ProductDistance:
    """A distance that comes from a product of rows."""

    name: str
    #: K of rows times c is c^degree K
    degree = 1
    is_product = True
    #: whether it is one of unit rows
    uses_unit_rows = False
    #: whether fused_kernel.py has it
    is_fused = True
    #: rows and columns of a block, where it needs smaller ones than others do
    block_shape: tuple[int, int] | None = None

    def between(self, x_ND: Tensor) -> Tensor:
        """K of all rows, [N, N], from differences of rows."""
        raise NotImplementedError

    def from_squares(self, s_bc: Tensor, offset_b: Tensor | None, offset_c: Tensor | None) -> Tensor:
        """K from s, in place. `offset`: `offsets` of the block's rows and columns."""
        raise NotImplementedError

    def offsets(self, x_ND: Tensor) -> Tensor | None:
        """What is added to K_ij for i and for j, [N]; None for nothing."""
        return None

    def times_slope(self, g_bc: Tensor, k_bc: Tensor, out: Tensor) -> Tensor:
        """g_ij slope_ij, where K_ij is above 0."""
        raise NotImplementedError


class Euclidean(ProductDistance):
    name = "euclidean"

    def between(self, x_ND: Tensor) -> Tensor:
        s_NN = _squares(x_ND)
        # The square root has no derivative at 0: take it where s > 0 only, so that no NaN is multiplied by 0.
        positive_NN = s_NN > 0
        return torch.where(positive_NN, s_NN.where(positive_NN, torch.ones_like(s_NN)).sqrt(), 0.0)

    def from_squares(self, s_bc, offset_b, offset_c):
        return s_bc.sqrt_()

    def times_slope(self, g_bc, k_bc, out):
        torch.div(g_bc, k_bc, out=out)
        return out if all_above(k_bc) else out.masked_fill_(k_bc == 0, 0.0)


class SquaredEuclidean(ProductDistance):
    name = "sqeuclidean"
    degree = 2

    def between(self, x_ND: Tensor) -> Tensor:
        return _squares(x_ND)

    def from_squares(self, s_bc, offset_b, offset_c):
        return s_bc

    def times_slope(self, g_bc, k_bc, out):
        return torch.mul(g_bc, 2, out=out)


class Cosine(ProductDistance):
    """A zero row has cosine distance 1 to all others, and every row has distance 0 to itself."""

    name = "cosine"
    degree = 0
    uses_unit_rows = True

    def between(self, x_ND: Tensor) -> Tensor:
        u_ND = unit_rows(x_ND)
        k_NN = 1 - u_ND @ u_ND.T
        return k_NN - torch.diag_embed(k_NN.diagonal())

    def offsets(self, x_ND: Tensor) -> Tensor:
        # The cosine of a zero row is taken as 0, so its distances are 1: s/2 gives 1/2 there, the offset adds the rest.
        return 0.5 * (1 - x_ND.square().sum(-1).round())

    def from_squares(self, s_bc, offset_b, offset_c):
        return s_bc.mul_(0.5).add_(offset_b[:, None]).add_(offset_c)

    def times_slope(self, g_bc, k_bc, out):
        return torch.mul(g_bc, 1, out=out)


class Manhattan:
    """sum_d |x_id - x_jd|: no product of rows, and a gradient that is a sum over [b, c, D]."""

    name = "manhattan"
    degree = 1
    is_product = False
    uses_unit_rows = False
    is_fused = False
    # 128 x 128 x 3584 floats are 235 MB: torch's own backward holds them on a GPU, not on the CPU.
    block_shape = (128, 128)

    def between(self, x_ND: Tensor) -> Tensor:
        return (x_ND[:, None, :] - x_ND[None, :, :]).abs().sum(-1)

    def offsets(self, x_ND: Tensor) -> None:
        return None

    def block(self, x_bD: Tensor, x_cD: Tensor) -> Tensor:
        """K of a block, [b, c]."""
        return torch.cdist(x_bD, x_cD, p=1.0)

    def gradients(self, g_bc: Tensor, x_bD: Tensor, x_cD: Tensor, mirrored: bool) -> tuple[Tensor, ...]:
        """sum_j g_ij dK_ij/dx_i, [b, D], and if mirrored the same for the columns' rows, [c, D]: dK_ij/dx_i = sign(x_i - x_j)."""
        with torch.enable_grad():
            x_bD, x_cD = (x.detach().requires_grad_() for x in (x_bD, x_cD))
            return torch.autograd.grad(self.block(x_bD, x_cD), (x_bD, x_cD) if mirrored else (x_bD,), g_bc)


Distance = ProductDistance | Manhattan
DISTANCES: dict[str, Distance] = {one.name: one for one in (Euclidean(), SquaredEuclidean(), Cosine(), Manhattan())}


def find_distance(name: str) -> Distance:
    """Return a distance by its name.

    Raises:
        ValueError: there is none of that name; the message has the choices.
    """
    if name not in DISTANCES:
        raise ValueError(f"unknown distance {name!r}; choose one of {', '.join(DISTANCES)}")
    return DISTANCES[name]


def pairwise_distance(x_ND: Tensor, *, distance: str = "euclidean") -> Tensor:
    """K_ij = d(x_i, x_j) from differences of rows, [N, N] (paper, eq. 3 and 4).

    Needs N*N*D memory: a definition to check against. Every row has distance 0 to itself.
    """
    return find_distance(distance).between(at_least_fp32(x_ND))


def all_above(x_bc: Tensor, least_b: Tensor | None = None) -> bool:
    """Whether all are known to be above these, or above 0: one read of the block, a tenth of making and applying a mask.

    Only for the CPU: on a GPU one would wait for the answer.
    """
    return x_bc.device.type == "cpu" and bool(x_bc.amin() > (0.0 if least_b is None else least_b.max()))


def _squares(x_ND: Tensor) -> Tensor:
    return (x_ND[:, None, :] - x_ND[None, :, :]).square().sum(-1)
