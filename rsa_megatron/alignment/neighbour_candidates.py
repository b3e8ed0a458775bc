"""For every row, the few others that may be among its k nearest by cosine: the first pass of nearest_neighbours.py.

Rows are multiplied block by block, each pair of blocks once for both directions. A row keeps k + 22 candidates. Once
it has seen some blocks, few products come near its k-th best, and only those are touched again: the time goes into
the products, which may be bfloat16 where the machine multiplies that faster. A bound on their rounding errors says
what may be left out.

The order of row i's cosines u_i.u_j is that of c_i.c_j + h_j, with c the unit rows less their mean m and h_j = m.c_j:
what is left out is the same for all j. Features of language models lie in a narrow cone with all their cosines near
1. Of a difference to the mean bfloat16 keeps eight bits, of such a cosine nothing but noise.

Shapes: N rows, D width, k neighbours, C candidates; b rows of one block, c of another.
"""

import torch
from torch import Tensor

# Cosines are compared in steps of 1e-9, finer than float32 features tell them apart: whole numbers in [-2^30, 2^30].
COSINE_STEPS = 2**30

_SPARE_CANDIDATES = 22
# A factor rounded to nearest errs by a standard deviation of at most 0.58 units, a product of two by 0.82, and the
# difference of two products by 1.2. Each product is given 2.5, their difference 5: more than four deviations at worst.
_ROUNDING_ERRORS = 2.5
_TINY = torch.finfo(torch.float64).tiny  # instead of a zero row's length: 0 / _TINY is 0


def slices(stop: int, size: int) -> list[slice]:
    """0 .. stop in pieces of `size`."""
    return [slice(a, min(a + size, stop)) for a in range(0, stop, size)]


def rows_at_a_time(x_ND: Tensor) -> int:
    """As many as are 0.5 MiB of float64: more come out of new memory, which costs more than the arithmetic.

    On a GPU, where it is launches that cost, 128 MiB.
    """
    return max(1, (2**16 if x_ND.device.type == "cpu" else 2**24) // x_ND.shape[1])


def row_norms(x_ND: Tensor) -> Tensor:
    """Lengths in float64, [N]: there squares of any float32 neither overflow nor vanish."""
    return torch.cat([torch.linalg.vector_norm(x_bD.double(), dim=1) for x_bD in x_ND.split(rows_at_a_time(x_ND))])


def pair_cosines(x_ND: Tensor, norm_N: Tensor, i_M: Tensor, j_M: Tensor) -> Tensor:
    """Cosines of M pairs of rows in float64, [M]; 0 with a zero row."""
    dot_M = norm_N.new_empty(len(i_M))
    for pairs in slices(len(i_M), rows_at_a_time(x_ND)):
        # index_select reads whole rows at several times the rate of indexing.
        x_bD, y_bD = (x_ND.index_select(0, index_M[pairs]).double() for index_M in (i_M, j_M))
        dot_M[pairs] = x_bD.mul_(y_bD).sum(1)
    return dot_M / (norm_N[i_M] * norm_N[j_M]).clamp_min(_TINY)


class CentredRows:
    """A matrix whose products with itself, in `dtype`, put each row's cosines in order, and their largest error.

    Four columns carry h: [c, hi, lo, 1, 1] . [c, 1, 1, hi, lo] = c_i.c_j + h_i + h_j, where hi + lo is h with twice the
    dtype's bits. h_i is there for the other direction and does no harm in this one.
    """

    def __init__(self, x_ND: Tensor, dtype: torch.dtype):
        num_rows, width = x_ND.shape
        pieces = slices(num_rows, rows_at_a_time(x_ND))
        self.x_ND, self.norm_N = x_ND, row_norms(x_ND)
        mean_D = sum(self.unit_rows(rows).sum(0) for rows in pieces) / num_rows
        self._left_NF = x_ND.new_empty(num_rows, width + 4, dtype=dtype)
        length_N, quartic_N, h_N = torch.empty_like(self.norm_N.expand(3, -1), memory_format=torch.contiguous_format)
        for rows in pieces:
            c_bD = self.unit_rows(rows).sub_(mean_D)
            self._left_NF[rows, :width] = c_bD
            h_N[rows] = c_bD @ mean_D
            square_bD = c_bD.square_()
            length_N[rows] = square_bD.sum(1).sqrt_()
            quartic_N[rows] = square_bD.square_().sum(1).sqrt_().sqrt_()
        self.all_equal = bool(length_N.max() ** 2 <= 1 / COSINE_STEPS)
        h_N -= h_N.mean()
        high_N, one_N = h_N.to(dtype), torch.ones_like(h_N, dtype=dtype)
        self._left_NF[:, width:] = torch.stack([high_N, (h_N - high_N).to(dtype), one_N, one_N], dim=1)
        self._unit = torch.finfo(dtype).eps / 2
        self._error_N = self._bound(width, length_N, quartic_N, h_N)

    def unit_rows(self, rows: slice | Tensor) -> Tensor:
        """In float64; a zero row stays zero."""
        return self.x_ND[rows].double() / self.norm_N[rows, None].clamp_min(_TINY)

    def left(self, rows: slice) -> Tensor:
        return self._left_NF[rows]

    def right(self, rows: slice) -> Tensor:
        """The other factor: the columns of h have changed places."""
        left_bF = self._left_NF[rows]
        return torch.cat([left_bF[:, :-4], left_bF[:, -2:], left_bF[:, -4:-2]], dim=1)

    def margin(self, rows: slice, value_b: Tensor) -> Tensor:
        """Two products of a row, one of them `value_b`, stand in their true order if they are further apart than this.

        Each errs by the row's largest error and by its own rounding to the dtype.
        """
        return 2 * (self._error_N[rows] + self._unit * value_b.abs())

    def _bound(self, width, length_N, quartic_N, h_N) -> Tensor:
        # Rounded factors: their errors are independent, so that c_i.c_j errs by units of the root of
        # sum_d c_id^2 c_jd^2, which is at most q_i q_j with q^4 = sum_d c_d^4.
        factors_N = _ROUNDING_ERRORS * self._unit * quartic_N * quartic_N.max()
        # Adding up D float32 numbers errs by the root of D times their sum's rounding.
        sums_N = torch.finfo(torch.float32).eps * width**0.5 * (length_N * length_N.max() + 2 * h_N.abs().max())
        return (factors_N + sums_N + 2 * self._unit**2 * h_N.abs().max() + 1 / COSINE_STEPS).float()


class Candidates:
    """Each row's largest products so far, falling, and with which rows.

    After `sweep`, a row that is not among row i's candidates is not among its k nearest, unless the last
    candidate itself may be (`least`): then there are more such rows than places.
    """

    def __init__(self, rows: CentredRows, k: int):
        self.rows, self.k = rows, k
        num_rows = len(rows.norm_N)
        size = num_rows, min(k + _SPARE_CANDIDATES, num_rows - 1)
        self.value_NC = torch.full(size, float("-inf"), device=rows.norm_N.device)
        self.index_NC = torch.zeros(size, dtype=torch.int64, device=rows.norm_N.device)

    def sweep(self, block_rows: int) -> "Candidates":
        blocks = slices(len(self.value_NC), block_rows)
        # Blocks on the diagonal first: with them every row has a k-th best to compare with.
        for j in blocks:
            s_bb = self._products(j, self.rows.right(j)).fill_diagonal_(float("-inf"))
            self._merge(j, s_bb, _numbers(j, s_bb))
        for number, j in enumerate(blocks):
            right_cF = self.rows.right(j)
            for i in blocks[:number]:
                s_bc = self._products(i, right_cF)
                self._offer(i, s_bc, j)
                self._offer(j, s_bc.T, i)
        return self

    def least(self, rows: slice) -> Tensor:
        """What a product must reach to be possibly among the row's k largest."""
        value_b = self.value_NC[rows, self.k - 1]
        return torch.where(value_b.isinf(), value_b, value_b - self.rows.margin(rows, value_b))

    def _products(self, rows: slice, right_cF: Tensor) -> Tensor:
        return (self.rows.left(rows) @ right_cF.T).float()

    def _offer(self, rows: slice, s_bc: Tensor, columns: slice) -> None:
        """Take up what may be among the k largest; s_bc may be a transposed view."""
        row, column = _where(s_bc >= self.least(rows)[:, None])
        if row.numel() == 0:
            return
        if row.numel() > s_bc.numel() // 8:  # then they are not worth picking out
            self._merge(rows, s_bc, _numbers(columns, s_bc))
            return
        slot, width = _slots(row, len(s_bc))
        value_bn = s_bc.new_full((len(s_bc), width), float("-inf"))
        value_bn[row, slot] = s_bc[row, column]
        index_bn = column.new_zeros(len(s_bc), width)
        index_bn[row, slot] = column + columns.start
        self._merge(rows, value_bn, index_bn)

    def _merge(self, rows: slice, value_bn: Tensor, index_bn: Tensor) -> None:
        value_bC, index_bC = self.value_NC[rows], self.index_NC[rows]
        top = torch.cat([value_bC, value_bn], dim=1).topk(value_bC.shape[1], dim=1)
        index_bC.copy_(torch.cat([index_bC, index_bn], dim=1).gather(1, top.indices))
        value_bC.copy_(top.values)


def _numbers(columns: slice, s_bc: Tensor) -> Tensor:
    return torch.arange(columns.start, columns.stop, device=s_bc.device).expand_as(s_bc)


def _where(mask_bc: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of a mask's ones, row by row. They are few: eight bytes are looked at as one number."""
    if not mask_bc.is_contiguous():
        column, row = _where(mask_bc.T)
        row, order = row.sort(stable=True)
        return row, column[order]
    flat = mask_bc.view(-1)
    if flat.numel() % 8:
        return mask_bc.nonzero(as_tuple=True)
    ones = (8 * flat.view(torch.int64).nonzero() + torch.arange(8, device=flat.device)).view(-1)
    ones = ones[flat[ones]]
    return ones // mask_bc.shape[1], ones % mask_bc.shape[1]


def _slots(row: Tensor, num_rows: int) -> tuple[Tensor, int]:
    """How many of the same row stand before each entry of a sorted list, and the most that one row has."""
    count_b = torch.bincount(row, minlength=num_rows)
    return torch.arange(len(row), device=row.device) - (count_b.cumsum(0) - count_b)[row], int(count_b.max())
