"""A kernel K_ij = d(x_i, x_j) in blocks, by matrix multiplication, with the derivative that the loss needs.

No N x N matrix exists anywhere in it. The subtraction in s_ij = |x_i|^2 + |x_j|^2 - 2 x_i.x_j (distances.py) loses digits when rows are
far from the origin and close to each other. A common shift changes no distance, so rows are centred first; what is left is noise of a
few rounding errors of |x|^2 in s. Pairs closer than that noise cannot be distinguished and count as equal: distance and gradient 0.

Shapes: N rows, D width; b rows of one block, c rows of another.
"""

from contextlib import contextmanager

import torch
from torch import Tensor

from rsa_megatron.alignment.distances import all_above, find_distance

# s below this many rounding errors of |x_i|^2 + |x_j|^2 is noise. A dot product of 3584 terms was seen to
# err by up to 3 of them (tests/unit/alignment/test_loss.py, duplicate rows).
NOISE_ROUNDING_ERRORS = 8


@contextmanager
def float32_products(precision: str = "ieee"):
    """Within it, float32 matrix products keep all their digits, whatever the process allows elsewhere.

    TF32 on GPUs and bf16 on CPUs (torch.set_float32_matmul_precision, or a container's environment) would keep 10 and
    7 bits, and s_ij is a difference of large numbers. With precision "tf32" tensor cores may be used, for factors that
    have no more digits than those.
    """
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    backends = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    if not backends:  # torch before 2.9 has one switch for all
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision({"ieee": "highest", "tf32": "high"}[precision])
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = precision
        yield
    finally:
        for backend, precision_before in zip(backends, before):
            backend.fp32_precision = precision_before


class PairwiseKernel:
    """One modality's kernel K_ij = d(x_i, x_j), block by block.

    Args:
        x_ND: the rows, float32 or float64, without gradient; unit rows for `cosine`.
        distance: the name of one of DISTANCES.
        scale: K and the derivative are those of the rows times this, a power of two in a tensor; None for 1.
    """

    def __init__(self, x_ND: Tensor, distance: str, scale: Tensor | None = None):
        self.distance = find_distance(distance)
        self.offset_N = self.distance.offsets(x_ND)
        if scale is None:
            self.x_ND = x_ND - x_ND.mean(0)
        else:
            # The mean's sum takes the rows times the scale, too: theirs could leave float's range. (With `out`, which a
            # script's autocast leaves alone.)
            minus_mean_D = x_ND.new_empty(x_ND.shape[1])
            torch.mv(x_ND.T, (scale / -len(x_ND)).repeat(len(x_ND)), out=minus_mean_D)
            self.x_ND = torch.addcmul(minus_mean_D, x_ND, scale)
        self.square_N = torch.linalg.vector_norm(self.x_ND, dim=1).square_()  # no copy of all rows
        self._memory = [x_ND.new_empty(0), x_ND.new_empty(0)]

    def block(self, i: slice, j: slice) -> Tensor:
        """K of rows i against rows j, [b, c]; exactly 0 on the diagonal of K. The next block takes its memory."""
        if not self.distance.is_product:
            return self.distance.block(self.x_ND[i], self.x_ND[j])
        s_bc = torch.add(self.square_N[i, None], self.square_N[None, j], out=self.scratch(i, j, 1))
        s_bc.addmm_(self.x_ND[i], self.x_ND[j].T, alpha=-2)
        # Rows so near each other are equally long: 2 |x_i|^2 stands for |x_i|^2 + |x_j|^2.
        noise_b = 2 * NOISE_ROUNDING_ERRORS * torch.finfo(s_bc.dtype).eps * self.square_N[i]
        if not all_above(s_bc, noise_b):
            s_bc.masked_fill_(s_bc <= noise_b[:, None], 0.0)
        offset_b, offset_c = (None, None) if self.offset_N is None else (self.offset_N[i], self.offset_N[j])
        k_bc = self.distance.from_squares(s_bc, offset_b, offset_c)
        if i == j:
            k_bc.fill_diagonal_(0.0)
        return k_bc

    def scratch(self, i: slice, j: slice, index: int = 0) -> Tensor:
        """Memory for a block, [b, c], used over and over: on the CPU new memory costs as much as the arithmetic.

        Number 1 holds what `block` has returned last, number 0 is free after it.
        """
        b, c = i.stop - i.start, j.stop - j.start
        if self._memory[index].numel() < b * c:
            self._memory[index] = self.x_ND.new_empty(b * c)
        return self._memory[index][: b * c].view(b, c)

    def gradient(self, rows: slice) -> "KernelGradient":
        """An accumulator for the derivative of sum_ij g_ij K_ij with respect to `rows`."""
        return KernelGradient(self, rows)


class KernelGradient:
    """Adds up, block by block, dF/dx_i = 2 sum_j g_ij dK_ij/dx_i for the rows it was made for.

    The factor 2 is the symmetry of K: x_i moves K_ij and K_ji. With w_ij = g_ij slope_ij,
        dF/dx_i = 2 sum_j w_ij (x_i - x_j) = 2 ((sum_j w_ij) x_i - (w x)_i) :
    a row sum and one matrix product a block.
    """

    def __init__(self, kernel: PairwiseKernel, rows: slice):
        self.kernel, self.rows = kernel, rows
        num_rows = rows.stop - rows.start
        self.product_nD = kernel.x_ND.new_zeros(num_rows, kernel.x_ND.shape[1])
        self.row_sum_n = kernel.x_ND.new_zeros(num_rows)

    def add(self, g_bc: Tensor, k_bc: Tensor, i: slice, j: slice, mirrored: bool) -> None:
        """Add a block of g = dF/dK. `mirrored`: block (j, i) is this one transposed; take it along."""
        distance, x_ND = self.kernel.distance, self.kernel.x_ND
        if not distance.is_product:
            gradients = distance.gradients(2 * g_bc, x_ND[i], x_ND[j], mirrored)
            for rows, gradient in zip((i, j), gradients):
                self.product_nD[self._own(rows)] += gradient
            return
        w_bc = distance.times_slope(g_bc, k_bc, out=self.kernel.scratch(i, j))
        self.row_sum_n[self._own(i)] += w_bc.sum(1)
        if mirrored:
            self.row_sum_n[self._own(j)] += w_bc.sum(0)
        self.add_product(w_bc, i, j, mirrored)

    def add_product(self, w_bc: Tensor, i: slice, j: slice, mirrored: bool) -> None:
        """Add w x of a block, all of `add` but the row sums. w and x may be bfloat16: their product is float32."""
        x_ND = self.kernel.x_ND
        _add_product(self.product_nD[self._own(i)], w_bc, x_ND[j])
        if mirrored:
            _add_product(self.product_nD[self._own(j)], w_bc.T, x_ND[i])

    def result(self) -> tuple[Tensor, float]:
        """dF/dx of the rows as a tensor, [n, D], and a factor that it is still to be multiplied by. The accumulator is used up."""
        if not self.kernel.distance.is_product:
            return self.product_nD, 1.0
        return self.product_nD.addcmul_(self.row_sum_n[:, None], self.kernel.x_ND[self.rows], value=-1), -2.0

    def _own(self, i: slice) -> slice:
        return slice(i.start - self.rows.start, i.stop - self.rows.start)


def _add_product(to_bD: Tensor, w_bc: Tensor, x_cD: Tensor) -> None:
    if w_bc.dtype == to_bD.dtype:
        to_bD.addmm_(w_bc, x_cD)
    elif to_bD.is_cuda:
        torch.addmm(to_bD, w_bc, x_cD, out_dtype=to_bD.dtype, out=to_bD)
    else:  # only GPUs have that product
        to_bD.addmm_(w_bc.to(to_bD.dtype), x_cD.to(to_bD.dtype))
