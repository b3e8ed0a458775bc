"""The Triton programs behind fused_blocks.py, which alone imports this file, and only where Triton is.

`block_kernel` does in one launch what loss.py does to a block of pairs in some 35: from the rows to the weights w^V, w^T
of the gradient and all sums. One program computes one tile: it multiplies rows over D, keeps K^V of the tile in registers,
multiplies over E, and has both distances of a pair side by side. Only w and the sums leave the chip.

Nothing is added atomically: each program adds to numbers of its own, and launches follow each other, so that two runs
give the same bits.

Shapes: N rows of widths D and E, n of them this rank's own; a block is rows i against rows j. A tile is TILE x TILE; w,
[b, c], has room for whole tiles, so that it is written without a mask.
"""

import triton
import triton.language as tl

# So many rows of tiles go through their columns together: the rows of x that they share stay in the L2 cache.
_GROUP = tl.constexpr(8)


@triton.jit
def products(
    x,
    rows,
    columns,
    stop_i,
    stop_j,
    width,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """x_i.x_j of a tile, summed in float32; 0 beyond the last row of the block."""
    k = tl.arange(0, STEP)
    # int64: 600,000 rows of 3584 are 2^31 numbers
    from_i = x + rows.to(tl.int64)[:, None] * width + k[None, :]
    from_j = x + columns.to(tl.int64)[:, None] * width + k[None, :]
    total = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, width, STEP):
        in_width = (start + k < width)[None, :]
        a = tl.load(from_i + start, mask=(rows < stop_i)[:, None] & in_width, other=0.0)
        b = tl.load(from_j + start, mask=(columns < stop_j)[:, None] & in_width, other=0.0)
        if INTERPRETED:  # the interpreter's tl.dot takes the bits of a bfloat16 for an integer
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def squares_kernel(
    x,
    square,
    num_rows,
    width,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """|x_i|^2 of all rows as the diagonal of their products, so that it errs as those do (fused_blocks.py says why)."""
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x_x = products(x, rows, rows, num_rows, num_rows, width, TILE, STEP, PRECISION, INTERPRETED)
    diagonal = tl.sum(tl.where(rows[:, None] == rows[None, :], x_x, 0.0), 1)
    tl.store(square + rows, diagonal, mask=rows < num_rows)


@triton.jit
def distances(x_x, square, offset, rows, columns, stop_i, stop_j, is_pair, noise, DISTANCE: tl.constexpr):
    """K of a tile from its products, as pairwise_kernel.py's PairwiseKernel.block has it; 0 on the diagonal and outside."""
    in_i, in_j = rows < stop_i, columns < stop_j
    squares_i = tl.load(square + rows, mask=in_i, other=0.0)[:, None]
    squares_j = tl.load(square + columns, mask=in_j, other=0.0)[None, :]
    s = squares_i + squares_j - 2.0 * x_x
    s = tl.where(s <= noise * (squares_i + squares_j), 0.0, s)  # this way round, NaN stays NaN
    if DISTANCE == "euclidean":
        k = tl.sqrt_rn(s)
    elif DISTANCE == "sqeuclidean":
        k = s
    else:
        offsets_i = tl.load(offset + rows, mask=in_i, other=0.0)[:, None]
        offsets_j = tl.load(offset + columns, mask=in_j, other=0.0)[None, :]
        k = 0.5 * s + offsets_i + offsets_j
    return tl.where(is_pair, k, 0.0)


@triton.jit
def weights(g, k, is_pair, dtype: tl.constexpr, DISTANCE: tl.constexpr, PRECISION: tl.constexpr):
    """w = g slope, rounded as the matrix products would round it: row sums must be sums of the same numbers."""
    if DISTANCE == "euclidean":
        w = tl.where(k == 0.0, 0.0, g / k)
    elif DISTANCE == "sqeuclidean":
        w = 2.0 * g
    else:
        w = g
    w = tl.where(is_pair, w, 0.0)
    if PRECISION == "tf32":  # as fused_blocks.py's rounded_rows
        w = tl.where(w == w, ((w.to(tl.int32, bitcast=True) + 0x1000) & ~0x1FFF).to(tl.float32, bitcast=True), w)
    return w.to(dtype)


@triton.jit
def add_to(pointer, value, mask=None):
    tl.store(pointer, tl.load(pointer, mask=mask) + value, mask=mask)


@triton.jit
def store_weights(
    to,
    w,
    row_sums_i,
    row_sums_j,
    in_i,
    in_j,
    b,
    c,
    num_own,
    pitch,
    tile_i,
    tile_j,
    SAME: tl.constexpr,
    MIRRORED: tl.constexpr,
):
    """w of a tile and its row sums; and those of the mirror image, if that is left out."""
    tl.store(to + in_i[:, None] * pitch + in_j[None, :], w)
    add_to(row_sums_i + tile_j * num_own + in_i, tl.sum(w.to(tl.float32), 1), in_i < b)
    if SAME:
        if tile_i != tile_j:
            tl.store(to + in_j[:, None] * pitch + in_i[None, :], tl.trans(w))
            add_to(row_sums_i + tile_i * num_own + in_j, tl.sum(w.to(tl.float32), 0), in_j < c)
    elif MIRRORED:
        add_to(row_sums_j + tile_i * num_own + in_j, tl.sum(w.to(tl.float32), 0), in_j < c)


# Numbers that change from block to block and from batch to batch must not each compile a kernel.
@triton.jit(do_not_specialize=["start_i", "stop_i", "start_j", "stop_j", "first_own", "num_own"])
def block_kernel(
    v,
    t,  # the rows, [N, D], [N, E]
    square_v,
    square_t,  # |x|^2 of them, [N]
    offset_v,
    offset_t,  # of cosine, [N]; None otherwise
    normal,  # scale_v, scale_t, shift_v, shift_t; None without normalisation
    w_v,
    w_t,  # where w goes, [b, c]
    row_sums_v,
    row_sums_t,  # where row sums are added, [tiles, n]
    sums,  # where a tile's sums of r^2, K^V and K^T are added, [tiles, 3] of float64
    start_i,
    stop_i,
    start_j,
    stop_j,
    first_own,
    num_own,
    width_v,
    width_t,
    pitch,
    noise,
    SAME: tl.constexpr,
    MIRRORED: tl.constexpr,
    DISTANCE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One tile of one block of pairs.

    SAME: i = j. Tiles below the diagonal are left out, the others store their mirror images.
    MIRRORED: block (j, i) is left out. This one counts twice, and its column sums are row sums of that.
    """
    tile_i, tile_j = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), _GROUP)
    if SAME:
        if tile_i > tile_j:
            return
    in_i, in_j = tile_i * TILE + tl.arange(0, TILE), tile_j * TILE + tl.arange(0, TILE)
    rows, columns = start_i + in_i, start_j + in_j
    b, c = stop_i - start_i, stop_j - start_j
    is_pair = (in_i < b)[:, None] & (in_j < c)[None, :]
    if SAME:
        is_pair &= in_i[:, None] != in_j[None, :]

    v_v = products(v, rows, columns, stop_i, stop_j, width_v, TILE, STEP, PRECISION, INTERPRETED)
    k_v = distances(v_v, square_v, offset_v, rows, columns, stop_i, stop_j, is_pair, noise, DISTANCE)
    t_t = products(t, rows, columns, stop_i, stop_j, width_t, TILE, STEP, PRECISION, INTERPRETED)
    k_t = distances(t_t, square_t, offset_t, rows, columns, stop_i, stop_j, is_pair, noise, DISTANCE)

    times = 1.0
    if SAME:
        times = tl.where(tile_i == tile_j, 1.0, 2.0)
    elif MIRRORED:
        times = 2.0
    sums += 3 * (tile_i * tl.num_programs(1) + tile_j)
    g_v = k_v - k_t
    if normal is not None:
        g_v = k_v * tl.load(normal) - k_t * tl.load(normal + 1)
    add_to(sums, times * tl.sum(g_v * g_v).to(tl.float64))
    add_to(sums + 1, times * tl.sum(k_v).to(tl.float64))
    add_to(sums + 2, times * tl.sum(k_t).to(tl.float64))

    g_t = g_v
    if normal is not None:
        g_v, g_t = g_v - tl.load(normal + 2), g_t - tl.load(normal + 3)
    own_i, own_j = start_i - first_own, start_j - first_own
    tile_w_v = weights(g_v, k_v, is_pair, w_v.dtype.element_ty, DISTANCE, PRECISION)
    store_weights(
        w_v,
        tile_w_v,
        row_sums_v + own_i,
        row_sums_v + own_j,
        in_i,
        in_j,
        b,
        c,
        num_own,
        pitch,
        tile_i,
        tile_j,
        SAME,
        MIRRORED,
    )
    tile_w_t = weights(g_t, k_t, is_pair, w_t.dtype.element_ty, DISTANCE, PRECISION)
    store_weights(
        w_t,
        tile_w_t,
        row_sums_t + own_i,
        row_sums_t + own_j,
        in_i,
        in_j,
        b,
        c,
        num_own,
        pitch,
        tile_i,
        tile_j,
        SAME,
        MIRRORED,
    )
