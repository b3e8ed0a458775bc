"""Distances between rows, in two forms: the definition, and blocks by matrix multiplication.

`pairwise_distance` is what eq. 3 and 4 of the RSA paper say, written for reading and for checking.
`PairwiseKernel` gives the same numbers a block at a time, with the derivative that the loss needs; no
N x N matrix exists anywhere in it.

Three of the four distances come from one product of rows. With s_ij = |x_i - x_j|^2
= |x_i|^2 + |x_j|^2 - 2 x_i.x_j:
    euclidean    K = sqrt(s)
    sqeuclidean  K = s
    cosine       K = 1 - u_i.u_j = s/2 of the unit rows u = x / |x|
and in all three dK_ij/dx_i = slope_ij (x_i - x_j), the slope being 1/K, 2 and 1 (for u).
The subtraction in s loses digits when rows are far from the origin and close to each other. A common
shift changes no distance, so rows are centred first; what is left is noise of a few rounding errors of
|x|^2 in s. Pairs closer than that noise cannot be told apart and count as equal: distance and gradient 0.

Shapes: N rows, D width; b rows of one block, c rows of another.
"""

from contextlib import contextmanager

import torch
from torch import Tensor

DISTANCES = ("euclidean", "sqeuclidean", "cosine", "manhattan")

# s below this many rounding errors of |x_i|^2 + |x_j|^2 is noise. A dot product of 3584 terms was seen to
# err by up to 3 of them (tests/unit/alignment/test_loss.py, duplicate rows).
NOISE_ROUNDING_ERRORS = 8


def check_distance(distance: str) -> None:
    """Raise ValueError, naming the choices, for an unknown distance."""
    if distance not in DISTANCES:
        raise ValueError(f"unknown distance {distance!r}; choose one of {', '.join(DISTANCES)}")


def at_least_fp32(x: Tensor) -> Tensor:
    """float64 stays; all else becomes float32. Distances of nearby bf16 rows need the digits."""
    return x if x.dtype == torch.float64 else x.float()


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


def unit_rows(x_ND: Tensor) -> Tensor:
    """Rows divided by their length. A zero row has no direction: it stays zero and gets gradient zero."""
    norm_N1 = x_ND.norm(dim=-1, keepdim=True)
    is_zero_N1 = norm_N1 == 0
    return x_ND * (1 / norm_N1.masked_fill(is_zero_N1, 1.0)).masked_fill(is_zero_N1, 0.0)


def pairwise_distance(x_ND: Tensor, *, distance: str = "euclidean") -> Tensor:
    """K_ij = d(x_i, x_j) from differences of rows, [N, N] (paper, eq. 3 and 4).

    Needs N*N*D memory: a definition to check against. A zero row has cosine distance 1 to all others,
    and every row has distance 0 to itself.
    """
    check_distance(distance)
    x_ND = at_least_fp32(x_ND)
    if distance == "cosine":
        u_ND = unit_rows(x_ND)
        k_NN = 1 - u_ND @ u_ND.T
        return k_NN - torch.diag_embed(k_NN.diagonal())
    difference_NND = x_ND[:, None, :] - x_ND[None, :, :]
    if distance == "manhattan":
        return difference_NND.abs().sum(-1)
    s_NN = difference_NND.square().sum(-1)
    if distance == "sqeuclidean":
        return s_NN
    # The square root has no derivative at 0: take it where s > 0 only, so that no NaN is multiplied by 0.
    positive_NN = s_NN > 0
    return torch.where(positive_NN, s_NN.where(positive_NN, torch.ones_like(s_NN)).sqrt(), 0.0)


class PairwiseKernel:
    """One modality's kernel K_ij = d(x_i, x_j), block by block.

    Args:
        x_ND: the rows, float32 or float64, without gradient; unit rows for `cosine`.
        distance: one of DISTANCES.
    """

    def __init__(self, x_ND: Tensor, distance: str):
        check_distance(distance)
        self.distance = distance
        # The cosine of a zero row is taken as 0, so its distances are 1: s/2 gives 1/2 there, the offset adds the rest.
        self.offset_N = 0.5 * (1 - x_ND.square().sum(-1).round()) if distance == "cosine" else None
        self.x_ND = x_ND - x_ND.mean(0)
        self.square_N = torch.linalg.vector_norm(self.x_ND, dim=1).square_()  # no copy of all rows
        self._memory = [x_ND.new_empty(0), x_ND.new_empty(0)]

    def block(self, i: slice, j: slice) -> Tensor:
        """K of rows i against rows j, [b, c]; exactly 0 on the diagonal of K. The next block takes its memory."""
        if self.distance == "manhattan":
            return torch.cdist(self.x_ND[i], self.x_ND[j], p=1.0)
        s_bc = torch.add(self.square_N[i, None], self.square_N[None, j], out=self.scratch(i, j, 1))
        s_bc.addmm_(self.x_ND[i], self.x_ND[j].T, alpha=-2)
        # Rows so near each other are equally long: 2 |x_i|^2 stands for |x_i|^2 + |x_j|^2.
        noise_b = 2 * NOISE_ROUNDING_ERRORS * torch.finfo(s_bc.dtype).eps * self.square_N[i]
        if not _all_above(s_bc, noise_b):
            s_bc.masked_fill_(s_bc <= noise_b[:, None], 0.0)
        if self.distance == "euclidean":
            k_bc = s_bc.sqrt_()
        elif self.distance == "sqeuclidean":
            k_bc = s_bc
        else:
            k_bc = s_bc.mul_(0.5).add_(self.offset_N[i, None]).add_(self.offset_N[None, j])
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
        if self.kernel.distance == "manhattan":
            self._add_manhattan(g_bc, i, j, mirrored)
            return
        w_bc = self.kernel.scratch(i, j)
        if self.kernel.distance == "euclidean":
            torch.div(g_bc, k_bc, out=w_bc)
            if not _all_above(k_bc):
                w_bc.masked_fill_(k_bc == 0, 0.0)
        else:
            torch.mul(g_bc, 2 if self.kernel.distance == "sqeuclidean" else 1, out=w_bc)
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
        if self.kernel.distance == "manhattan":
            return self.product_nD, 1.0
        return self.product_nD.addcmul_(self.row_sum_n[:, None], self.kernel.x_ND[self.rows], value=-1), -2.0

    def _own(self, i: slice) -> slice:
        return slice(i.start - self.rows.start, i.stop - self.rows.start)

    def _add_manhattan(self, g_bc: Tensor, i: slice, j: slice, mirrored: bool) -> None:
        # dK_ij/dx_i = sign(x_i - x_j), a sum over [b, c, D]. Torch's own backward holds these b * c * D numbers on a
        # GPU, not on the CPU: blocks are smaller for this distance (loss.py).
        with torch.enable_grad():
            x_bD, x_cD = (self.kernel.x_ND[rows].detach().requires_grad_() for rows in (i, j))
            k_bc = torch.cdist(x_bD, x_cD, p=1.0)
            gradients = torch.autograd.grad(k_bc, (x_bD, x_cD) if mirrored else (x_bD,), 2 * g_bc)
        self.product_nD[self._own(i)] += gradients[0]
        if mirrored:
            self.product_nD[self._own(j)] += gradients[1]


def _add_product(to_bD: Tensor, w_bc: Tensor, x_cD: Tensor) -> None:
    if w_bc.dtype == to_bD.dtype:
        to_bD.addmm_(w_bc, x_cD)
    elif to_bD.is_cuda:
        torch.addmm(to_bD, w_bc, x_cD, out_dtype=to_bD.dtype, out=to_bD)
    else:  # only GPUs have that product
        to_bD.addmm_(w_bc.to(to_bD.dtype), x_cD.to(to_bD.dtype))


def _all_above(x_bc: Tensor, least_b: Tensor | None = None) -> bool:
    """Whether all are known to be above these, or above 0: one read of the block, a tenth of making and applying a mask.

    Only for the CPU: on a GPU one would wait for the answer.
    """
    return x_bc.device.type == "cpu" and bool(x_bc.amin() > (0.0 if least_b is None else least_b.max()))
