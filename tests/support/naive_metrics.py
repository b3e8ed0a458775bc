"""The metrics once more, from their formulas alone: loops over samples in float64, nothing of rsa_megatron's.

N x N lists and Python's loops: for tens of samples.
"""

import math

import torch


def rows_of(x):
    return [row.tolist() for row in x.double()]


def dot(x, y):
    return math.fsum(p * q for p, q in zip(x, y))


def unit(x):
    length = math.sqrt(dot(x, x))
    return [p / length for p in x] if length else list(x)


def cosines(x):
    units = [unit(row) for row in rows_of(x)]
    return [[dot(p, q) for q in units] for p in units]


def neighbour_sets(x, k):
    """Largest cosines first, rounded to nine digits so that equal rows are equal; then the smaller index."""
    table = cosines(x)
    n = len(table)
    return [
        set(sorted((j for j in range(n) if j != i), key=lambda j: (-round(table[i][j], 9), j))[:k]) for i in range(n)
    ]


def mutual_knn(a, b, k):
    pairs = list(zip(neighbour_sets(a, k), neighbour_sets(b, k)))
    return sum(len(p & q) / k for p, q in pairs) / len(pairs)


def cycle_knn(a, b, k):
    near_a, near_b = neighbour_sets(a, k), neighbour_sets(b, k)
    return sum(any(i in near_a[j] for j in near_b[i]) for i in range(len(near_a))) / len(near_a)


def linear_kernel(x):
    rows = rows_of(x)
    return [[dot(p, q) for q in rows] for p in rows]


def rbf_kernel(x, sigma):
    rows = rows_of(x)
    return [[math.exp(-math.fsum((s - t) ** 2 for s, t in zip(p, q)) / (2 * sigma**2)) for q in rows] for p in rows]


def matmul(x, y):
    return [[dot(row, column) for column in zip(*y)] for row in x]


def hsic(k, l):
    """trace(K H L H)."""
    n = len(k)
    h = [[(i == j) - 1 / n for j in range(n)] for i in range(n)]
    product = matmul(matmul(k, h), matmul(l, h))
    return math.fsum(product[i][i] for i in range(n))


def unbiased_hsic(k, l):
    """Song et al. 2012, eq. 5."""
    m = len(k)
    k, l = ([[0.0 if i == j else x[i][j] for j in range(m)] for i in range(m)] for x in (k, l))
    product = matmul(k, l)
    trace = math.fsum(product[i][i] for i in range(m))
    sums = math.fsum(map(math.fsum, k)) * math.fsum(map(math.fsum, l))
    return (trace + sums / ((m - 1) * (m - 2)) - 2 / (m - 2) * math.fsum(map(math.fsum, product))) / (m * (m - 3))


def alignment(k, l, estimate):
    return estimate(k, l) / math.sqrt(estimate(k, k) * estimate(l, l))


def cknna(a, b, k):
    near_a, near_b = neighbour_sets(a, k), neighbour_sets(b, k)
    kernel_a, kernel_b = cosines(a), cosines(b)

    def masked(kernel, *near):
        n = range(len(kernel))
        return [[kernel[i][j] if all(j in sets[i] for sets in near) else 0.0 for j in n] for i in n]

    both = unbiased_hsic(masked(kernel_a, near_a, near_b), masked(kernel_b, near_a, near_b))
    alone = [unbiased_hsic(*[masked(kernel, near)] * 2) for kernel, near in ((kernel_a, near_a), (kernel_b, near_b))]
    return both / math.sqrt(alone[0] * alone[1])


def svcca(a, b, num_directions):
    spans = []
    for x in (a, b):
        x = x.double()
        x = (x - x.mean(0)) / (x.std(0) + 1e-8)
        spans.append(torch.linalg.svd(x, full_matrices=False).U[:, :num_directions])
    # Canonical correlations by their definition: eigenvalues of S11^-1 S12 S22^-1 S21 are their squares.
    s11, s22, s12 = spans[0].T @ spans[0], spans[1].T @ spans[1], spans[0].T @ spans[1]
    squares = torch.linalg.eigvals(torch.linalg.solve(s11, s12) @ torch.linalg.solve(s22, s12.T)).real
    return squares.clamp_min(0).sqrt().mean().item()


def rsa_discrepancy(a, b):
    a, b = rows_of(a), rows_of(b)
    n = range(len(a))
    return math.fsum((math.dist(a[i], a[j]) - math.dist(b[i], b[j])) ** 2 for i in n for j in n) / len(a) ** 2


def clipping_limit(x, quantile, exact):
    """x: a row for each sample."""
    if exact:
        values = sorted(abs(p) for row in rows_of(x) for p in row)
        return values[int(quantile * len(values))]
    limits = []
    for row in rows_of(x):
        values = sorted(map(abs, row))
        place = quantile * (len(values) - 1)
        low = int(place)
        high = min(low + 1, len(values) - 1)
        limits.append(values[low] + (place - low) * (values[high] - values[low]))
    return sum(limits) / len(limits)
