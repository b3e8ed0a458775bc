"""A block of pairs in one launch: what `rsa_loss` does between two matrix products, on GPUs that have Triton.

For each block (rows i, rows j) of K the loss needs both distances of each pair, the sums of r^2, K^V and K^T with
r = K^V - K^T, and the weights w^V = r slope^V and w^T = r slope^T, with which the gradient is (row sum of w) x - w x
(pairwise_kernel.py's KernelGradient). In PyTorch that is some 35 launches a block, which at N = 512 to 2048 is all the time it
takes. Here it is one (fused_kernel.py). The products w x stay with cuBLAS: they are thousands wide, and nothing remains
to be fused into them. `sweep` is what loss.py calls.

How the rows are multiplied is `precision`:
    ieee     float32 as it is; no tensor core
    tf32x3   float32 as three TF32 products on tensor cores; w x as it is
    tf32     rows rounded to TF32, 11 significant bits
    bf16     rows rounded to bfloat16, 8 significant bits
A tensor core that rounds float32 rows on its own would spoil s_ij = |x_i|^2 + |x_j|^2 - 2 x_i.x_j: with both factors of the
last term rounded by u, s is off by up to 4 u |x|^2, and distances below sqrt(4u) |x|, 4% of |x| for TF32, would be noise. So
rows are rounded once, before anything is computed from them, and products of rounded numbers are exact in float32. Distances
are then those of rows y_i = x_i + e_i with |e_i| <= u |x_i|, u = 2^-11 for TF32 and 2^-8 for bfloat16, and
    | |y_i - y_j| - |x_i - x_j| | <= |e_i| + |e_j| <= u (|x_i| + |x_j|),
0.1% and 0.8% of |x| at the very most and, as the errors of the D coordinates have no common direction, some sqrt(D) times
less along x_i - x_j. Equal rows stay equal. The gradient is that of the rounded rows, exact but for w, which is rounded like
them, so that the products w x are exact, too.

What the sums round is left. Tensor cores cut their sums off, each time by less than one unit of 2^-23, D/8 times: near rows
lose the same in all three terms of s if these are summed alike. Therefore |x_i|^2 is the diagonal of the same program's
products: of equal rows all three terms are equal to the last bit.

Shapes: N rows of widths D and E, n of them this rank's own; a block is b rows against c.
"""

import importlib.util
import os

import torch
from torch import Tensor

from rsa_megatron.alignment.distances import DISTANCES
from rsa_megatron.alignment.pairwise_kernel import (
    NOISE_ROUNDING_ERRORS,
    KernelGradient,
    PairwiseKernel,
    float32_products,
)

# Rows of x that a program reads at a time, [TILE, step]: 32 KiB for both sides of a tile of 128 on tensor cores. Three
# such stages fit all GPUs since Ampere (99 KiB and more). Without tensor cores the operands pass through registers.
_STEPS = {"ieee": 16, "tf32x3": 32, "tf32": 32, "bf16": 64}
PRECISIONS = tuple(_STEPS)
_STAGES = 3
# 128: two accumulators of 128 x 128 are 128 registers of each of 256 threads, as much as leaves room for the rest.
_TILES = (128, 64)


def available(x_ND: Tensor, distance: str, precision: str) -> bool:
    """Whether `sweep` can take these rows, as they come to it: float32."""
    return _obstacle(x_ND, distance, precision) is None


def check_available(precision: str, distance: str, *rows: Tensor) -> None:
    """Raise ValueError, saying what is missing, where `sweep` cannot take these rows in that precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown fused {precision!r}; choose one of {', '.join(PRECISIONS)}, or None")
    for x_ND in rows:
        if obstacle := _obstacle(x_ND, distance, precision):
            raise ValueError(f"fused={precision!r} {obstacle}; use fused=None")


def _obstacle(x_ND, distance, precision) -> str | None:
    if not DISTANCES[distance].is_fused:
        return (
            f"has no distance {distance!r}, only {', '.join(name for name, one in DISTANCES.items() if one.is_fused)}"
        )
    if x_ND.dtype != torch.float32:
        return f"computes in float32, and these rows are {x_ND.dtype}"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if _is_interpreted(x_ND):
        return None
    if not x_ND.is_cuda or torch.version.hip:
        return f"needs an NVIDIA GPU, and these rows are on {x_ND.device}"
    if (capability := torch.cuda.get_device_capability(x_ND.device)) < (8, 0):
        return "needs compute capability 8.0 (Ampere), and this GPU has {}.{}".format(*capability)
    if precision == "bf16" and torch.__version__ < (2, 10):
        return f"needs torch 2.10, which adds products of bfloat16 to sums of float32, and this is {torch.__version__}"
    return None


def _is_interpreted(x_ND):
    # Triton reads that variable when fused_kernel.py is imported.
    return x_ND.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def sweep(
    kernel_v: PairwiseKernel,
    kernel_t: PairwiseKernel,
    rows: slice,
    blocks: list[tuple[slice, slice, bool]],
    normal: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    gradient_v: KernelGradient | None,
    gradient_t: KernelGradient | None,
    precision: str,
) -> Tensor:
    """Sums of r^2, K^V and K^T over the blocks, [3], float64; adds to the gradients that are given.

    Args:
        kernel_v, kernel_t: whose rows are rounded for good (FusedBlocks).
        rows: which of them are this rank's own.
        blocks: (i, j, mirrored) as in `FusedBlocks.weights`.
        normal: loss.py's _Normalization. Its means over all pairs may be those of rows that are not rounded: the errors of
            single distances have no common sign.
        precision: one of PRECISIONS.
    """
    shape = tuple(max((block[side].stop - block[side].start for block in blocks), default=0) for side in (0, 1))
    fused = FusedBlocks(kernel_v, kernel_t, rows, shape, precision)
    gradients = gradient_v, gradient_t
    normal_4 = None if normal is None else torch.stack(normal)
    # Factors that are rounded to TF32 already lose nothing on tensor cores.
    with float32_products("tf32" if precision == "tf32" else "ieee"):
        for i, j, mirrored in blocks:
            for gradient, w_bc in zip(gradients, fused.weights(i, j, mirrored, normal_4)):
                if gradient is not None:
                    gradient.add_product(w_bc, i, j, mirrored)
    for gradient, row_sum_n in zip(gradients, fused.row_sums()):
        if gradient is not None:
            gradient.row_sum_n = row_sum_n
    return fused.sums()


def rounded_rows(x_ND: Tensor, precision: str) -> Tensor:
    """Float32 rows as `precision` multiplies them: bfloat16, float32 whose last 13 bits are 0 (TF32), or as they are."""
    if precision == "bf16":
        return x_ND.bfloat16()
    if precision == "tf32":
        # Of 23 bits 10 stay: half a unit of the last of them is added, then 13 are cut off. A NaN of ones would become -0.
        rounded_ND = x_ND.view(torch.int32).add(0x1000).bitwise_and_(~0x1FFF).view(torch.float32)
        return rounded_ND.where(x_ND == x_ND, x_ND)
    return x_ND


class FusedBlocks:
    """One rank's share of K^V and K^T, block by block; w is handed out, row sums and sums are added up.

    Args:
        kernel_v, kernel_t: of float32 rows. Their x_ND becomes the rows as they are multiplied (`rounded_rows`), with which
            the gradient takes its products, too.
        rows: which of them are this rank's own.
        block_shape: the most rows and columns that a block has.
        precision: one of PRECISIONS.
    """

    def __init__(
        self,
        kernel_v: PairwiseKernel,
        kernel_t: PairwiseKernel,
        rows: slice,
        block_shape: tuple[int, int],
        precision: str,
    ):
        self.kernels, self.rows, self.precision = (kernel_v, kernel_t), rows, precision
        for kernel in self.kernels:
            kernel.x_ND = rounded_rows(kernel.x_ND.contiguous(), precision)
        self.tile = _tile(block_shape, kernel_v.x_ND.device, precision)
        self.squares = [self._squares(kernel.x_ND) for kernel in self.kernels]
        b, c = (self._num_tiles(size) for size in block_shape)
        self.pitch = c * self.tile
        self.w = [kernel.x_ND.new_empty(b * self.tile, self.pitch) for kernel in self.kernels]
        # A program adds to the row sums of its rows in the place of its tile's column, of its columns in that of its row.
        self._row_sums = self.squares[0].new_zeros(2, max(b, c), rows.stop - rows.start)
        self._sums = self.squares[0].new_zeros(b * c, 3, dtype=torch.float64)

    def weights(self, i: slice, j: slice, mirrored: bool, normal_4: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """w^V and w^T of rows i against rows j, [b, c] each; the next block takes their memory.

        Args:
            mirrored: block (j, i) is this one transposed and left out: row sums and sums take it along.
            normal_4: scale_v, scale_t, shift_v, shift_t of normalize="mean-distance" (loss.py's _Normalization).
        """
        from rsa_megatron.alignment.fused_kernel import block_kernel

        b, c = i.stop - i.start, j.stop - j.start
        assert i == j or i.stop <= j.start or j.stop <= i.start, "a block lies on the diagonal of K or beside it"
        assert b <= self.w[0].shape[0] and c <= self.pitch
        v, t = self.kernels
        with torch.cuda.device_of(v.x_ND):
            block_kernel[self._num_tiles(b), self._num_tiles(c)](
                v.x_ND,
                t.x_ND,
                *self.squares,
                v.offset_N,
                t.offset_N,
                normal_4,
                *self.w,
                *self._row_sums,
                self._sums,
                i.start,
                i.stop,
                j.start,
                j.stop,
                self.rows.start,
                self.rows.stop - self.rows.start,
                v.x_ND.shape[1],
                t.x_ND.shape[1],
                self.pitch,
                NOISE_ROUNDING_ERRORS * torch.finfo(torch.float32).eps,
                SAME=i == j,
                MIRRORED=mirrored,
                DISTANCE=v.distance.name,
                **self._settings(),
            )
        return tuple(w[:b, :c] for w in self.w)

    def row_sums(self) -> Tensor:
        """Sum over j of w^V_ij and w^T_ij so far, of the own rows, [2, n]."""
        return self._row_sums.sum(1)

    def sums(self) -> Tensor:
        """Sums of r^2, K^V and K^T so far, [3], float64."""
        return self._sums.sum(0)

    def _squares(self, x_ND):
        from rsa_megatron.alignment.fused_kernel import squares_kernel

        square_N = x_ND.new_empty(x_ND.shape[0], dtype=torch.float32)
        with torch.cuda.device_of(x_ND):
            squares_kernel[(self._num_tiles(x_ND.shape[0]),)](x_ND, square_N, *x_ND.shape, **self._settings())
        return square_N

    def _settings(self):
        return compile_settings(self.precision, self.tile, interpreted=_is_interpreted(self.kernels[0].x_ND))

    def _num_tiles(self, size):
        return -(-size // self.tile)


def compile_settings(precision: str, tile: int, *, interpreted: bool) -> dict:
    """What both programs are compiled for."""
    return dict(
        PRECISION="ieee" if precision == "bf16" else precision,
        TILE=tile,
        STEP=_STEPS[precision],
        INTERPRETED=interpreted,
        num_warps=8 if tile >= 128 else 4,
        num_stages=_STAGES,
    )


def _tile(block_shape, device, precision):
    """The wide one, which reads rows half as often, where it makes three rounds of programs: the last may be half empty."""
    wide, narrow = _TILES
    if precision == "tf32x3" or device.type == "cpu":  # three products a step need the registers
        return narrow
    num_programs = -(-block_shape[0] // wide) * -(-block_shape[1] // wide)
    return wide if num_programs >= 3 * torch.cuda.get_device_properties(device).multi_processor_count else narrow
