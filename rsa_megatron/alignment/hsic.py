"""The sums over pairs of samples that kernel alignment is made of, without an N x N matrix.

HSIC, biased or not, needs of two kernels K and L no more than sum_ij K_ij L_ij, their row sums and diagonals. A linear
kernel's come from products of columns, D x E (sum_ij K_ij L_ij = |A^T B|^2), where these cost less than blocks of the
kernel. Rows are centred first: neither form of HSIC changes, and there is less to cancel. All in float64.

Shapes: N samples; widths D and E; b rows of one block, c of another.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rsa_megatron.alignment.neighbour_candidates import slices

_BLOCK_ROWS = 1024
#: Up to so many samples a whole kernel is held, 128 MiB, to be read in other orders.
MATRIX_ROWS = 4096
KERNELS = ("linear", "rbf")


@dataclass(frozen=True)
class KernelSums:
    """Of two kernels, called "a" and "b"."""

    #: sum over all i and j of K_ij L_ij: of ("a", "b"), ("a", "a") and ("b", "b")
    products: dict[tuple[str, str], Tensor]
    #: sum over all j of K_ij, [N]
    rows: dict[str, Tensor]
    #: K_ii, [N]
    diagonals: dict[str, Tensor]

    def hsic(self, first: str, second: str) -> Tensor:
        """trace(K H L H) with H = 1 - 11^T / N: the biased estimate but for a factor of N alone (Gretton et al. 2005)."""
        row_k_N, row_l_N = self.rows[first], self.rows[second]
        n = len(row_k_N)
        return self.products[first, second] - 2 / n * (row_k_N @ row_l_N) + row_k_N.sum() * row_l_N.sum() / n**2

    def unbiased_hsic(self, first: str, second: str) -> Tensor:
        """Song et al. 2012, eq. 5: of the kernels with zeros on their diagonals."""
        diagonal_k_N, diagonal_l_N = self.diagonals[first], self.diagonals[second]
        row_k_N, row_l_N = self.rows[first] - diagonal_k_N, self.rows[second] - diagonal_l_N
        product = self.products[first, second] - diagonal_k_N @ diagonal_l_N
        return unbiased_hsic(product, row_k_N.sum() * row_l_N.sum(), row_k_N @ row_l_N, len(row_k_N))


def unbiased_hsic(trace: Tensor, product_of_sums: Tensor, sum_of_product: Tensor, n: int) -> Tensor:
    """Eq. 5 of Song et al. 2012 from tr(KL), (1'K1)(1'L1) and 1'KL1, of kernels with empty diagonals."""
    return (trace + product_of_sums / ((n - 1) * (n - 2)) - 2 * sum_of_product / (n - 2)) / (n * (n - 3))


def kernel_sums(a_ND: Tensor, b_NE: Tensor, *, kernel: str, sigma: float) -> KernelSums:
    """Raises ValueError for an unknown kernel and for spaces whose rows are all equal: their HSIC is 0."""
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; choose one of {', '.join(KERNELS)}")
    if not sigma > 0:
        raise ValueError(f"sigma={sigma} of the rbf kernel must be above 0")
    spaces = _centre(a_ND, b_NE)
    if kernel == "linear" and _has_cheap_columns(spaces):
        return _from_columns(spaces)
    return _from_blocks(spaces, sigma if kernel == "rbf" else None)


def shuffled_kernel_sums(
    sums: KernelSums, a_ND: Tensor, b_NE: Tensor, order_PN: Tensor, *, kernel: str, sigma: float
) -> list[KernelSums]:
    """The sums of the first kernel and of the second with its samples in P other orders.

    Args:
        sums: `kernel_sums` of the same features, kernel and sigma: all but sum_ij K_ij L_ij is that in another order.
        order_PN: which sample of the second space stands beside each of the first.
    """
    spaces = _centre(a_ND, b_NE)
    if kernel == "linear" and _has_cheap_columns(spaces):
        products = [_product_of_columns(spaces["a"], spaces["b"], order_N) for order_N in order_PN]
    else:
        products = _shuffled_products(spaces, order_PN, sigma if kernel == "rbf" else None)
    return [
        KernelSums(
            sums.products | {("a", "b"): product},
            sums.rows | {"b": sums.rows["b"][order_N]},
            sums.diagonals | {"b": sums.diagonals["b"][order_N]},
        )
        for product, order_N in zip(products, order_PN)
    ]


class _CentredFeatures:
    """Rows less their mean in float64, a block at a time."""

    def __init__(self, x_ND: Tensor, name: str):
        self._x_ND = x_ND
        self.blocks = slices(len(x_ND), _BLOCK_ROWS)
        self._mean_D = sum(x_ND[i].double().sum(0) for i in self.blocks) / len(x_ND)
        self.square_N = torch.cat([self[i].square().sum(1) for i in self.blocks])
        # Rounding leaves that much of the mean in rows that are equal.
        if self.square_N.max() <= (1e-14 * self._mean_D.abs().max()) ** 2 * x_ND.shape[1]:
            which = "first" if name == "a" else "second"
            raise ValueError(f"all {len(x_ND)} rows of the {which} features are equal: there is nothing to compare")

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return self._x_ND[rows].double() - self._mean_D

    @property
    def num_columns(self) -> int:
        return self._x_ND.shape[1]

    def kernel(self, i: slice | Tensor, j: slice | Tensor, sigma: float | None) -> Tensor:
        """K of rows i against rows j, [b, c]: linear without a sigma."""
        dot_bc = self[i] @ self[j].T
        if sigma is None:
            return dot_bc
        s_bc = (self.square_N[i, None] + self.square_N[None, j]).sub_(dot_bc, alpha=2).clamp_min_(0.0)
        if i is j:
            s_bc.fill_diagonal_(0.0)
        return s_bc.mul_(-0.5 / sigma**2).exp_()


_PAIRS = (("a", "b"), ("a", "a"), ("b", "b"))


def _centre(a_ND: Tensor, b_NE: Tensor) -> dict[str, _CentredFeatures]:
    return {name: _CentredFeatures(x, name) for name, x in (("a", a_ND), ("b", b_NE))}


def _has_cheap_columns(spaces: dict[str, _CentredFeatures]) -> bool:
    d, e = (space.num_columns for space in spaces.values())
    return d * d + d * e + e * e < len(spaces["a"].square_N) * (d + e) / 2


def _product_of_columns(first: _CentredFeatures, second: _CentredFeatures, order_N: Tensor | None = None) -> Tensor:
    blocks = first.blocks
    return sum(first[i].T @ second[i if order_N is None else order_N[i]] for i in blocks).square().sum()


def _shuffled_products(spaces: dict[str, _CentredFeatures], order_PN: Tensor, sigma: float | None) -> list[Tensor]:
    """sum_ij K_ij L_ij of each order."""
    blocks, every, b = spaces["a"].blocks, slice(None), spaces["b"]
    whole_NN = b.kernel(every, every, sigma) if order_PN.shape[1] <= MATRIX_ROWS else None
    products = [0.0] * len(order_PN)
    for number, j in enumerate(blocks):
        for i in blocks[: number + 1]:
            k_bc = spaces["a"].kernel(i, j, sigma)
            for p, order_N in enumerate(order_PN):
                rows_b, rows_c = order_N[i], order_N[j]
                l_bc = b.kernel(rows_b, rows_c, sigma) if whole_NN is None else whole_NN[rows_b][:, rows_c]
                products[p] = products[p] + (k_bc * l_bc).sum() * (1 if i is j else 2)
    return products


def _from_columns(spaces: dict[str, _CentredFeatures]) -> KernelSums:
    products = {(x, y): _product_of_columns(spaces[x], spaces[y]) for x, y in _PAIRS}
    diagonals = {name: space.square_N for name, space in spaces.items()}
    return KernelSums(products, {name: torch.zeros_like(square_N) for name, square_N in diagonals.items()}, diagonals)


def _from_blocks(spaces: dict[str, _CentredFeatures], sigma: float | None) -> KernelSums:
    squares = {name: space.square_N for name, space in spaces.items()}
    diagonals = squares if sigma is None else {name: torch.ones_like(square_N) for name, square_N in squares.items()}
    rows = {name: torch.zeros_like(diagonal_N) for name, diagonal_N in diagonals.items()}
    products = {pair: 0.0 for pair in _PAIRS}
    blocks = spaces["a"].blocks
    for number, j in enumerate(blocks):
        for i in blocks[: number + 1]:
            kernels = {name: space.kernel(i, j, sigma) for name, space in spaces.items()}
            for x, y in _PAIRS:
                products[x, y] = products[x, y] + (kernels[x] * kernels[y]).sum() * (1 if i is j else 2)
            for name, k_bc in kernels.items():
                rows[name][i] += k_bc.sum(1)
                if i is not j:  # the block that mirrors it
                    rows[name][j] += k_bc.sum(0)
    return KernelSums(products, rows, diagonals)
