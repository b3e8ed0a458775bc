"""For every row, the few others that may be among its k nearest by cosine: the first pass of nearest_neighbours.py.

Rows are multiplied block by block, each pair of blocks once for both directions. A row keeps k + 22 candidates. Once
it has seen some blocks, few products come near its k-th best, and only those are touched again: the time goes into
the products, which may be bfloat16 where the machine multiplies that faster. A bound on their rounding errors says
what may be left out.

The order of row i's cosines u_i.u_j is that of -|u_i - u_j|^2, and of c_i.c_j + h_j, with c the unit rows less their mean m and
h_j = -|c_j|^2 / 2: what is left out is the same for all j. Features of language models lie in a narrow cone with all their
cosines near 1; one column 3,000 times the others leaves differences of 1e-7 between them. Of a difference to the mean bfloat16
keeps eight bits, of such a cosine nothing but noise. (m.c_j has the order of h_j too, but is itself a small difference of
numbers near 1: 1e-16 is left of its digits, where |c_j|^2 keeps all.)

Shapes: N rows, D width, k neighbours, C candidates; b rows of one block, c of another.
"""

import torch
from torch import Tensor

#: Of two rows' squared distance differences of 2^-30 count, 1e-9: whole steps of its logarithm to base 2.
DISTANCE_STEPS = 2**30

_SPARE_CANDIDATES = 22
# A factor rounded to nearest errs by a standard deviation of at most 0.58 units, a product of two by 0.82, and the
# difference of two products by 1.2. Each product is given 2.5, their difference 5: more than four deviations at worst. In one
# column no product errs by more than 2. (Only bfloat16 leans on that: of float32 it is far less than the bound of the sums.)
_ROUNDING_ERRORS = 2.5
_FLOAT32_UNIT, _FLOAT64_UNIT = (torch.finfo(dtype).eps / 2 for dtype in (torch.float32, torch.float64))
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
        self._mean_D = sum(self.unit_rows(rows).sum(0) for rows in pieces) / num_rows
        self._left_NF = x_ND.new_empty(num_rows, width + 4, dtype=dtype)
        square_N, quartic_N, self._same_N = torch.empty_like(
            self.norm_N.expand(3, -1), memory_format=torch.contiguous_format
        )
        for rows in pieces:
            u_bD = self.unit_rows(rows)
            c_bD = u_bD - self._mean_D
            self._left_NF[rows, :width] = c_bD
            square_bD = c_bD.square_()
            square_N[rows] = square_bD.sum(1)
            quartic_N[rows] = square_bD.square_().sum(1).sqrt_().sqrt_()
            self._same_N[rows] = _same_direction(u_bD)
        self.all_equal = bool((square_N <= self._same_N).all())
        # A zero row has cosine 0 with every other, as rows at a squared distance of 2 have; its own is 1.
        h_N = -0.5 * (square_N + (self.norm_N == 0))
        self._h_N = h_N - h_N.mean()
        high_N, one_N = self._h_N.to(dtype), torch.ones_like(h_N, dtype=dtype)
        self._left_NF[:, width:] = torch.stack([high_N, (self._h_N - high_N).to(dtype), one_N, one_N], dim=1)
        self._unit = torch.finfo(dtype).eps / 2
        self._bound_errors(square_N.sqrt(), quartic_N)

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

    def float64_products(self, rows: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
        """The products of some rows with all, [b, N] in float64, and their margin, [b]."""
        c_bD = self.unit_rows(rows) - self._mean_D
        pieces = [
            torch.addmm(self._h_N[j], c_bD, (self.unit_rows(j) - self._mean_D).T)
            for j in slices(len(self.norm_N), block_rows)
        ]
        return torch.cat(pieces, dim=1), 2 * self._float64_error_N[rows]

    def nearness(self, i_M: Tensor, j_M: Tensor) -> Tensor:
        """How near M pairs are in direction, [M], larger for the nearer: 0 at a cosine of 0, and rising with it.

        1 - log2 |u_i - u_j|^2 for an angle below 90 degrees, log2 |u_i + u_j|^2 - 1 above. Differences of unit rows keep the
        digits that a cosine near 1 or -1 has lost. Rows as near as multiples of one, rounded to float32, are equally near.
        """
        found_M = self.norm_N.new_empty(len(i_M))
        for pairs in slices(len(i_M), rows_at_a_time(self.x_ND)):
            i_b, j_b = i_M[pairs], j_M[pairs]
            # index_select reads whole rows at several times the rate of indexing.
            u_bD, v_bD = (
                self.x_ND.index_select(0, index_b).double() / self.norm_N[index_b, None].clamp_min(_TINY)
                for index_b in (i_b, j_b)
            )
            apart_b = (u_bD - v_bD).square_().sum(1)
            opposite_b = v_bD.add_(u_bD).square_().sum(1) if (apart_b > 2).any() else 4 - apart_b
            bits_b = torch.minimum(apart_b, opposite_b).clamp_min_(self._same_N[i_b]).log2_().sub_(1)
            bits_b.masked_fill_((self.norm_N[i_b] == 0) | (self.norm_N[j_b] == 0), 0.0)
            found_M[pairs] = torch.where(apart_b <= opposite_b, -bits_b, bits_b)
        return found_M

    def _bound_errors(self, length_N: Tensor, quartic_N: Tensor) -> None:
        longest, largest_h, num_terms = length_N.max(), self._h_N.abs().max(), self._left_NF.shape[1] + 4
        # Rounded factors: their errors are independent, so that c_i.c_j errs by units of the root of
        # sum_d c_id^2 c_jd^2, which is at most q_i q_j with q^4 = sum_d c_d^4. And by two units of |c_i| |c_j| at most.
        factors_N = torch.minimum(_ROUNDING_ERRORS * quartic_N * quartic_N.max(), 2.02 * length_N * longest)
        # Adding up float32 numbers errs at most by a unit of their absolute sum for each. It may come near to that: beside one
        # large term the small ones, which are alike between neighbours, are all rounded the same way.
        size_N = length_N * longest + 2 * largest_h
        # What counts as equally near: a step, and rows of one direction.
        ties_N = (length_N + longest).square() / DISTANCE_STEPS + self._same_N
        error_N = self._unit * factors_N + 1.02 * num_terms * _FLOAT32_UNIT * size_N + 2 * self._unit**2 * largest_h
        self._error_N = (error_N + ties_N).float()
        # Unit rows and their difference to the mean are themselves rounded, by units of 1.
        self._float64_error_N = _FLOAT64_UNIT * (num_terms * size_N + 8 * (length_N + longest)) + ties_N


def _same_direction(u_bD: Tensor) -> Tensor:
    """The squared distance of unit rows below which they are one direction, [b].

    That of multiples of a row, whose numbers float32 has rounded by up to 2^-24 each: what all columns have in common turns
    nothing, so that beside one large column only the others count. Twice what is typical of two such rows.
    """
    square_bD = u_bD.square()
    square_bD.scatter_(1, square_bD.argmax(1, keepdim=True), 0.0)
    return 2.0**-48 * (4 * square_bD.sum(1)).clamp_max_(1.0) + 2.0**-100


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
