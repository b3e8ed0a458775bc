"""The RSA loss: how far the geometry of the image vectors is from that of the caption vectors.

    L_RSA = 1/N^2 sum_ij (K^V_ij - K^T_ij)^2                                    (paper, eq. 5)

`rsa_loss_reference` is that line. `rsa_loss` gives the same value and gradient in blocks: memory grows with
N, not N^2, the symmetric half is computed once, and the gradient is in closed form, so that autograd holds
nothing but the two gradients. `rsa_loss_of_rows` is the same again for one rank of many: the sum over its own
rows i against everyone's rows j, with the gradient of the WHOLE loss with respect to its own rows. The shares
of all ranks add up to L_RSA, and no rank needs anything from another in the backward pass.

Shapes: N pairs in all, n of them this rank's own; D width of the image vectors, E of the caption vectors.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rsa_megatron.alignment import fused_blocks
from rsa_megatron.alignment.distances import at_least_fp32, find_distance, pairwise_distance
from rsa_megatron.alignment.pairwise_kernel import PairwiseKernel, float32_products
from rsa_megatron.alignment.spaces import Spaces

NORMALIZATIONS = ("none", "mean-distance")

# Rows and columns of a block, 4 MiB of floats: small against the rows themselves, near the CPU's cache for the dozen
# passes over a block's distances, and large enough for matrix products at nearly their full rate. Fewer rows compute less
# twice: of the N^2/2 distances that are needed, the blocks on the diagonal add half of rows x N. On a GPU, where each
# block costs launches, blocks are square.
_BLOCK = {"cpu": (512, 2048), "cuda": (1024, 1024)}
# With the fused launch a block on the diagonal computes no distance twice, and blocks may be large: the w of both kernels
# take 2 x 64 MiB. Adding w x to what is there reads and writes 8 bytes of a number for 2 c operations: 1024 a byte with
# c = 4096 columns, where an H100 must have 300 (bf16) to multiply at its full rate.
_BLOCK_FUSED = (4096, 4096)


def rsa_loss_reference(v_ND: Tensor, t_NE: Tensor, *, distance: str = "euclidean", normalize: str = "none") -> Tensor:
    """Eq. 5 as it stands, differentiated by autograd: the specification of all that follows. Scalar."""
    _check_rows(v_ND, t_NE)
    num_pairs = v_ND.shape[0]
    if num_pairs < 2:
        return 0.0 * (at_least_fp32(v_ND).sum() + at_least_fp32(t_NE).sum())
    kernels = [pairwise_distance(x, distance=distance) for x in (v_ND, t_NE)]
    if normalize == "mean-distance":
        kernels = [k_NN / mean if (mean := _off_diagonal_mean(k_NN.sum(), num_pairs)) > 0 else k_NN for k_NN in kernels]
    return (kernels[0] - kernels[1]).square().sum() / num_pairs**2


def rsa_loss(
    v_ND: Tensor, t_NE: Tensor, *, distance: str = "euclidean", normalize: str = "none", fused: str | None = None
) -> Tensor:
    """L_RSA of N image-caption pairs held by one process (paper, eq. 5).

    Args:
        v_ND: image vectors, one row a pair. Any float type; computed in float32 (float64 stays float64).
        t_NE: caption vectors of the same pairs in the same order. D and E may differ.
        distance: euclidean (the paper's), sqeuclidean, cosine or manhattan.
        normalize: "mean-distance" divides each kernel by its own mean over the pairs i != j, which makes the
            loss free of either space's scale. The mean is differentiated too: with a constant one, shrinking
            all distances would still look like an improvement.
        fused: None: blocks in PyTorch, on any device. Or how one Triton launch a block multiplies the rows: ieee, tf32x3,
            tf32 or bf16 (fused_blocks.py has their errors). For an NVIDIA GPU, and not for manhattan or float64.

    Returns:
        A scalar, 0 with zero gradients for fewer than two pairs. Equal and zero rows give no NaN, nor do rows whose squares no
        float can hold; a loss that none can hold is infinite. With a row that is not finite the loss is NaN.

    Raises:
        ValueError: for unknown settings, tensors that are no rows of floats or do not pair up, or `fused` where it cannot be.
        RuntimeError: when it is differentiated twice (create_graph=True, and then its gradient): `rsa_loss_reference` can be.
    """
    _check_rows(v_ND, t_NE)
    settings = dict(distance=distance, normalize=normalize, fused=fused)
    return rsa_loss_of_rows(v_ND, t_NE, v_ND.detach(), t_NE.detach(), 0, **settings).loss


class RSALossOfRows(NamedTuple):
    """What one rank knows of the loss. Each is a scalar that adds up over ranks to that of all N pairs."""

    #: this rank's rows of L_RSA; differentiable, with the gradient of the whole L_RSA to its own rows
    loss: Tensor
    #: sum over own i, all j of K^V_ij
    distance_sum_v: Tensor
    #: sum over own i, all j of K^T_ij
    distance_sum_t: Tensor


def rsa_loss_of_rows(
    v_nD: Tensor,
    t_nE: Tensor,
    v_ND: Tensor,
    t_NE: Tensor,
    first_row: int,
    *,
    distance: str = "euclidean",
    normalize: str = "none",
    group: "torch.distributed.ProcessGroup | None" = None,
    fused: str | None = None,
) -> RSALossOfRows:
    """One rank's rows of L_RSA.

    Args:
        v_nD, t_nE: this rank's rows, with gradient.
        v_ND, t_NE: all ranks' rows, gathered without gradient; rows first_row .. first_row + n are v_nD, t_nE.
        first_row: where the own rows begin.
        distance, normalize, fused: as in `rsa_loss`.
        group: the ranks that hold the other rows. Used by normalize="mean-distance" alone, for the sums of
            five numbers that the normalisation needs (one all-reduce, in the forward pass).
    """
    find_distance(distance)
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"unknown normalize {normalize!r}; choose one of {', '.join(NORMALIZATIONS)}")
    _check_rows(v_nD, t_nE)
    _check_rows(v_ND, t_NE)
    for own, every in ((v_nD, v_ND), (t_nE, t_NE)):
        if own.shape[1] != every.shape[1] or not 0 <= first_row <= len(every) - len(own):
            raise ValueError(
                f"rows {first_row} to {first_row + len(own)} of {tuple(every.shape)} cannot be own rows {tuple(own.shape)}"
            )
    v_ND, t_NE = at_least_fp32(v_ND), at_least_fp32(t_NE)
    dtype = torch.promote_types(v_ND.dtype, t_NE.dtype)
    v_ND, t_NE = v_ND.to(dtype), t_NE.to(dtype)
    if fused is not None:
        fused_blocks.check_available(fused, distance, v_ND, t_NE)
    # Inside the function autograd's switch is off: whether a gradient is wanted is asked here.
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (v_nD, t_nE)]
    # Nothing of the rows but their place in the graph, for a second derivative to find (_OneDerivative).
    places = [x[:0].clone() if is_wanted else x.new_empty(0) for x, is_wanted in zip((v_nD, t_nE), wanted)]
    return RSALossOfRows(
        *_RowsOfRSA.apply(v_nD, t_nE, *places, v_ND, t_NE, first_row, distance, normalize, group, fused, wanted)
    )


def _check_rows(v_ND: Tensor, t_NE: Tensor) -> None:
    for name, x in (("image", v_ND), ("caption", t_NE)):
        if x.dim() != 2:
            raise ValueError(
                f"{name} vectors must be rows, one a pair, [N, width]; these are of shape {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"{name} vectors must be of a real float type, and these are {x.dtype}: convert them first"
            )
    if v_ND.shape[0] != t_NE.shape[0]:
        raise ValueError(f"image and caption vectors must pair up: {tuple(v_ND.shape)} against {tuple(t_NE.shape)}")


class _RowsOfRSA(torch.autograd.Function):
    """Forward: the rows' sums, and in the same pass over blocks the gradient. Backward: one multiplication.

    The own rows' numbers are those among all ranks' rows: of v_nD and t_nE only shape and type are asked.
    """

    @staticmethod
    @float32_products()
    def forward(ctx, v_nD, t_nE, place_v, place_t, v_ND, t_NE, first_row, distance, normalize, group, fused, wanted):
        num_pairs = v_ND.shape[0]
        ctx.dtypes = v_nD.dtype, t_nE.dtype
        sums = v_ND.new_zeros(3)
        if num_pairs < 2:  # eq. 5 compares pairs: there is none
            ctx.save_for_backward(v_ND.new_zeros(v_nD.shape), t_NE.new_zeros(t_nE.shape), place_v, place_t)
            ctx.factors = (1.0, 1.0), (1.0, 1.0)
        else:
            rows = slice(first_row, first_row + v_nD.shape[0])
            spaces = Spaces(v_ND, t_NE, distance, normalizes=normalize == "mean-distance")
            kernels = spaces.kernels
            normal = _normalization(*kernels, rows, num_pairs, group) if normalize == "mean-distance" else None
            gradients = [k.gradient(rows) if is_wanted else None for k, is_wanted in zip(kernels, wanted)]
            sums = _sweep(*kernels, rows, num_pairs, normal, *gradients, fused)
            # dL/dK^V_ij = 2/N^2 r_ij and dL/dK^T_ij = -2/N^2 r_ij; _sweep has added up the r part.
            scale_v, scale_t = (normal.scale_v, normal.scale_t) if normal else (1.0, 1.0)
            signs = 2 * scale_v / num_pairs**2, -2 * scale_t / num_pairs**2
            results = [g.result() if g else (None, 1.0) for g in gradients]
            # The factors wait for the backward pass, which multiplies all numbers anyway.
            ctx.save_for_backward(*spaces.gradients([tensor for tensor, _ in results], rows), place_v, place_t)
            of_spaces = spaces.gradient_factors()
            ctx.factors = tuple(
                (sign * factor, of_space) for sign, (_, factor), of_space in zip(signs, results, of_spaces)
            )
            sums = spaces.sums(sums)
            sums[0] /= num_pairs**2
        loss, distance_sum_v, distance_sum_t = (total.to(v_ND.dtype, copy=True) for total in sums)
        ctx.mark_non_differentiable(distance_sum_v, distance_sum_t)
        return loss, distance_sum_v, distance_sum_t

    @staticmethod
    def backward(ctx, loss_gradient, *_):
        *gradients, place_v, place_t = ctx.saved_tensors
        with torch.no_grad():
            scaled = [
                None if g is None else (g * (loss_gradient * of_space * factor).to(g.dtype)).to(dtype)
                for g, (factor, of_space), dtype in zip(gradients, ctx.factors, ctx.dtypes)
            ]
        if torch.is_grad_enabled():  # create_graph=True
            scaled = [None if g is None else _OneDerivative.apply(g, place_v, place_t, loss_gradient) for g in scaled]
        return *scaled, *(None,) * 10


class _OneDerivative(torch.autograd.Function):
    """The gradient, from which no other can be had.

    torch's once_differentiable leaves it a constant where the loss's own gradient is one (a backward pass that begins here, or a sum
    with another loss), and its error stands where a search for some inputs' gradients does not come by: either way the second derivative
    would be without RSA's part. This one has its place in the graph before the rows.
    """

    @staticmethod
    def forward(ctx, gradient, place_v, place_t, loss_gradient):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "rsa_loss has no second derivative: take rsa_megatron.alignment.loss.rsa_loss_reference, which has one (in N x N x "
            "width memory), or do not differentiate the gradient"
        )


class _Normalization(NamedTuple):
    """Scales 1/m of the two kernels, and what differentiating the means m takes off r in dL/dK.

    With a = K^V / m_V and b = K^T / m_T, m the mean over the P = N (N - 1) ordered pairs i != j,
        d a_kl / d K^V_ij = [kl = ij] / m_V - a_kl / (P m_V)
        dL / dK^V_ij = 2/N^2 / m_V ((a - b)_ij - 1/P sum_kl (a - b)_kl a_kl)
    and the same for K^T with b in place of the last a and the sign turned.
    """

    scale_v: Tensor
    scale_t: Tensor
    shift_v: Tensor
    shift_t: Tensor


def _normalization(kernel_v, kernel_t, rows, num_pairs, group) -> _Normalization:
    sums = kernel_v.x_ND.new_zeros(5, dtype=torch.float64)
    for i, j, mirrored in _block_pairs(rows, num_pairs, _block_shape(kernel_v)):
        v_bc, t_bc = kernel_v.block(i, j), kernel_t.block(i, j)
        parts = torch.stack([x.sum() for x in (v_bc, t_bc, v_bc * v_bc, v_bc * t_bc, t_bc * t_bc)])
        sums += parts.double() * (2 if mirrored else 1)
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)
    means = _off_diagonal_mean(sums, num_pairs)
    # All rows equal: the kernel is 0 whatever the scale; leave it so.
    scale_v, scale_t = (torch.where(m > 0, 1 / m, 1.0) for m in means[:2])
    aa, ab, bb = means[2] * scale_v**2, means[3] * scale_v * scale_t, means[4] * scale_t**2
    return _Normalization(*(x.to(kernel_v.x_ND.dtype) for x in (scale_v, scale_t, aa - ab, ab - bb)))


def _sweep(kernel_v, kernel_t, rows, num_pairs, normal, gradient_v, gradient_t, fused):
    """Over own i, all j: the sums of r_ij^2, K^V_ij and K^T_ij, in float64; adds to the gradients that are given."""
    if fused is not None:
        blocks = list(_block_pairs(rows, num_pairs, _BLOCK_FUSED))
        return fused_blocks.sweep(kernel_v, kernel_t, rows, blocks, normal, gradient_v, gradient_t, fused)
    sums = kernel_v.x_ND.new_zeros(3, dtype=torch.float64)
    residual = kernel_v.x_ND.new_empty(0)
    for i, j, mirrored in _block_pairs(rows, num_pairs, _block_shape(kernel_v)):
        v_bc, t_bc = kernel_v.block(i, j), kernel_t.block(i, j)
        if normal is not None:
            r_bc = v_bc * normal.scale_v - t_bc * normal.scale_t
        else:
            r_bc = torch.sub(v_bc, t_bc, out=residual.resize_(v_bc.shape))
        square_bc = torch.mul(r_bc, r_bc, out=kernel_v.scratch(i, j))
        parts = torch.stack([x.sum() for x in (square_bc, v_bc, t_bc)])
        sums += parts.double() * (2 if mirrored else 1)
        if gradient_v is not None:
            gradient_v.add(r_bc if normal is None else r_bc - normal.shift_v, v_bc, i, j, mirrored)
        if gradient_t is not None:
            gradient_t.add(r_bc if normal is None else r_bc - normal.shift_t, t_bc, i, j, mirrored)
    return sums


def _off_diagonal_mean(total, num_pairs):
    return total / (num_pairs * (num_pairs - 1))


def _block_shape(kernel: PairwiseKernel) -> tuple[int, int]:
    return kernel.distance.block_shape or _BLOCK.get(kernel.x_ND.device.type, (1024, 1024))


def _block_pairs(rows: slice, num_pairs: int, shape: tuple[int, int]):
    """Blocks (i, j, mirrored) that cover own i x all j once: of two that mirror each other, only the upper."""
    num_rows, num_columns = shape
    others = _blocks(0, rows.start, num_columns) + _blocks(rows.stop, num_pairs, num_columns)
    for i in _blocks(rows.start, rows.stop, num_rows):
        yield i, i, False
        yield from ((i, j, True) for j in _blocks(i.stop, rows.stop, num_columns))
        yield from ((i, j, False) for j in others)


def _blocks(start: int, stop: int, size: int) -> list[slice]:
    """As few as there can be of that size, and all nearly as large: a narrow last one would cost as much time as a wide one."""
    count = -(-(stop - start) // size)
    edges = [start + (stop - start) * k // count for k in range(count + 1)] if count else []
    return [slice(a, b) for a, b in zip(edges, edges[1:])]
