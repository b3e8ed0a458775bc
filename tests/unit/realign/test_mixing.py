"""Figures of two clouds against the same formulas in loops, against cases by hand, and in what they must not depend on."""

import math
import random
from itertools import combinations

import pytest
import torch
from torch.nn.functional import normalize

from rsa_megatron.realign import mixing
from rsa_megatron.realign.mixing import (
    chance_of_mixing,
    cosine_histogram,
    fidelity,
    js_divergence,
    mixing_rate,
)
from tests.support.naive_metrics import cosines, neighbour_sets

# Figures are float64 sums of at most some thousand terms of size 1: rounding stays below this.
ROUNDING = 1e-12


def normal(num_rows, width, seed=0, **options):
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, **options)


def cloud(num_rows, direction, spread, seed=0):
    """Rows around a direction, [num_rows, 16], of lengths between 1/2 and 2."""
    centre_D = torch.zeros(16, dtype=torch.float64)
    centre_D[direction] = 1
    length_N1 = 2 ** (2 * torch.rand(num_rows, 1, generator=torch.Generator().manual_seed(seed)).double() - 1)
    return length_N1 * normalize(centre_D + spread * normal(num_rows, 16, seed), dim=1)


# The same in loops


def naive_mixing(x, y, k):
    near = neighbour_sets(torch.cat([x, y]), k)
    return sum((j < len(x)) != (i < len(x)) for i, others in enumerate(near) for j in others) / (k * len(near))


def naive_histogram(x, num_bins):
    table = cosines(x)
    counts = [0] * num_bins
    for i, j in combinations(range(len(table)), 2):
        counts[min(int((table[i][j] + 1) / 2 * num_bins), num_bins - 1)] += 1
    return counts


def naive_divergence(p, q):
    p, q = ([count / sum(counts) for count in counts] for counts in (p, q))
    middle = [(a + b) / 2 for a, b in zip(p, q)]
    halves = [sum(a * math.log2(a / m) for a, m in zip(r, middle) if a) for r in (p, q)]
    return sum(halves) / 2


def naive_correlation(x, y):
    pairs = list(combinations(range(len(x)), 2))
    a, b = ([table[i][j] for i, j in pairs] for table in (cosines(x), cosines(y)))
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    covariance = math.fsum((p - mean_a) * (q - mean_b) for p, q in zip(a, b))
    return covariance / math.sqrt(math.fsum((p - mean_a) ** 2 for p in a) * math.fsum((q - mean_b) ** 2 for q in b))


@pytest.mark.parametrize("block_rows", [7, 1024])
def test_figures_are_those_of_the_formulas(monkeypatch, block_rows):
    monkeypatch.setattr(mixing, "_BLOCK_ROWS", block_rows)
    x, y = cloud(40, 0, 0.3), cloud(31, 1, 0.5, seed=1)
    moved = x + 0.1 * normal(40, 16, seed=2)
    assert mixing_rate(x, y, 5) == pytest.approx(naive_mixing(x, y, 5), abs=ROUNDING)
    counts = [cosine_histogram(rows, num_bins=20) for rows in (x, y)]
    expected = [naive_histogram(rows, 20) for rows in (x, y)]
    assert [count.tolist() for count in counts] == expected
    assert js_divergence(*counts) == pytest.approx(naive_divergence(*expected), abs=ROUNDING)
    found = fidelity(x, moved, 5)
    direct = torch.cosine_similarity(x, moved).mean().item()
    assert found.mean_cosine == pytest.approx(direct, abs=ROUNDING)
    assert found.cosine_correlation == pytest.approx(naive_correlation(x, moved), abs=ROUNDING)
    shared = [len(a & b) / 5 for a, b in zip(neighbour_sets(x, 5), neighbour_sets(moved, 5))]
    assert found.neighbour_overlap == pytest.approx(sum(shared) / 40, abs=ROUNDING)


# By hand


def test_clouds_apart_do_not_mix_and_draws_of_one_cloud_mix_by_chance():
    assert mixing_rate(cloud(60, 0, 0.05), cloud(60, 1, 0.05, seed=1)) == 0
    rates = [mixing_rate(cloud(150, 0, 0.3, seed), cloud(150, 0, 0.3, seed + 50)) for seed in range(4)]
    # 4 x 300 x 20 draws that are half of each: a deviation of 0.5 / sqrt(24000) = 0.003 were they independent; shared
    # neighbours make it some times that.
    assert sum(rates) / 4 == pytest.approx(chance_of_mixing(150, 150), abs=0.015)
    assert chance_of_mixing(150, 150) == pytest.approx(150 / 299)


def test_mixing_by_hand():
    # On an arc whose gaps grow, a row's nearest is the one below it. First and second cloud in turn: always of the other one.
    angle = (torch.arange(10.0) ** 1.5).deg2rad()
    rows = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert mixing_rate(rows[0::2], rows[1::2], 1) == 1
    # In two runs: only row 5 looks across, to row 4, and that one to row 3.
    assert mixing_rate(rows[:5], rows[5:], 1) == 0.1
    # Counts that differ: of each row all others are neighbours, 1 x 2 + 2 x 1 of 3 x 2 across.
    assert mixing_rate(rows[:1], rows[1:3], 2) == chance_of_mixing(1, 2) == pytest.approx(4 / 6)


def test_a_cloud_twice_mixes_by_half():
    x = cloud(200, 0, 0.3)
    # Each has its copy, and then copies in twos: 10 of 20, and one more of the other cloud where k is odd.
    assert mixing_rate(x, x.clone(), 20) == pytest.approx(0.5, abs=0.03)
    assert js_divergence(cosine_histogram(x), cosine_histogram(x.clone())) == 0


def test_divergence_is_1_bit_where_no_bin_is_shared_and_looks_at_spreads_alone():
    tight, wide = cosine_histogram(cloud(50, 0, 0.01)), cosine_histogram(normal(50, 16))
    assert js_divergence(tight, wide) == pytest.approx(1, abs=ROUNDING)
    # (1, 0) against (1/2, 1/2): H(3/4, 1/4) - H(1/2, 1/2) / 2 = 0.811278 - 0.5
    counts = torch.tensor([4, 0]), torch.tensor([7, 7])
    assert js_divergence(*counts) == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2 - 0.5, abs=ROUNDING)
    # Natural logarithms, a likely mistake, would say 0.6931 of what is 1.
    assert js_divergence(torch.tensor([1, 0]), torch.tensor([0, 1])) == pytest.approx(1, abs=ROUNDING)
    far = cloud(50, 1, 0.01) @ torch.linalg.qr(normal(16, 16, seed=9)).Q
    assert js_divergence(cosine_histogram(far), cosine_histogram(far.roll(3, dims=1))) == 0


def test_the_edges_of_the_bins():
    directions = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [3.0, 0.0]])
    # Cosines 0, -1, 1, 0, 0, -1: bins [-1, -0.5) [-0.5, 0) [0, 0.5) [0.5, 1]
    assert cosine_histogram(directions, num_bins=4).tolist() == [2, 0, 3, 1]


def test_a_rotation_keeps_everything_within_and_the_mean_cosine_tells():
    x = cloud(80, 0, 0.3)
    turned = x @ torch.linalg.qr(normal(16, 16, seed=3)).Q
    found = fidelity(x, turned)
    assert found.cosine_correlation == pytest.approx(1, abs=ROUNDING) and found.neighbour_overlap == 1
    assert found.mean_cosine < 0.5
    itself = fidelity(x, 7 * x)
    assert itself.mean_cosine == pytest.approx(1, abs=ROUNDING) and itself.neighbour_overlap == 1
    # Rows of others have nothing left: neighbours by chance, 10 of 79, pairs uncorrelated up to 1 / sqrt(80 x 79 / 2).
    others = fidelity(normal(80, 16), normal(80, 16, seed=4))
    assert others.neighbour_overlap == pytest.approx(10 / 79, abs=0.04)
    assert abs(others.cosine_correlation) < 4 / math.sqrt(3160)


def test_cosines_that_are_all_equal_correlate_with_nothing():
    assert math.isnan(fidelity(torch.eye(12).double(), normal(12, 12)).cosine_correlation)


# What they must not depend on


def test_lengths_order_blocks_and_dtype_change_nothing(monkeypatch):
    x, y = cloud(90, 0, 0.4).float(), cloud(70, 0, 0.4, seed=5).float()
    expected = mixing_rate(x, y, 8), cosine_histogram(x), fidelity(x, x.roll(1, dims=1))
    order = torch.tensor(random.Random(0).sample(range(90), 90))
    scaled = (x * torch.rand(90, 1).add(0.1).log2().round().exp2())[order]  # powers of two: not a bit is lost
    monkeypatch.setattr(mixing, "_BLOCK_ROWS", 13)
    assert mixing_rate(scaled, y, 8) == mixing_rate(y, scaled, 8) == expected[0]
    assert torch.equal(cosine_histogram(scaled), expected[1])
    found = fidelity(scaled, scaled.roll(1, dims=1))
    assert found.neighbour_overlap == expected[2].neighbour_overlap
    assert found.cosine_correlation == pytest.approx(expected[2].cosine_correlation, abs=ROUNDING)
    assert mixing_rate(scaled.double(), y, 8) == expected[0]  # float32 rows hold the same numbers in float64


def test_no_table_of_all_pairs_is_made():
    x = normal(3000, 8).float()
    with torch.profiler.profile(profile_memory=True) as profile:
        num_pairs = int(cosine_histogram(x).sum())
        fidelity(x, x.roll(1, dims=1))
    largest = max(event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage)
    assert num_pairs == 3000 * 2999 // 2
    # A block of 1024 x 1024 in float64 is 8 MiB, the table of 3000 x 3000 would be 72 MB.
    assert 8 * 1024**2 <= largest < 3 * 8 * 1024**2


FAULTS = {
    "NaN": (lambda x: x.index_fill_(0, torch.tensor([2, 5]), math.nan), r"2 of 20 rows hold NaN or infinity \(2, 5\)"),
    "zero": (
        lambda x: x.index_fill_(0, torch.arange(1, 8), 0.0),
        r"7 of 20 rows are zero .* \(1, 2, 3, 4, 5, \.\.\.\)",
    ),
    "one row": (lambda x: x[:1], "a pair needs two rows, got 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_rows_without_a_direction_are_counted_and_named(fault):
    spoil, message = FAULTS[fault]
    x = spoil(normal(20, 4))
    with pytest.raises(ValueError, match=message):
        cosine_histogram(x)
    if fault != "one row":
        with pytest.raises(ValueError, match=message):
            mixing_rate(normal(20, 4), x, 3)
        with pytest.raises(ValueError, match=message):
            fidelity(x, normal(20, 4), 3)


def test_sets_that_cannot_be_compared():
    with pytest.raises(ValueError, match="width 4 and 5 cannot be compared"):
        mixing_rate(normal(9, 4), normal(9, 5))
    with pytest.raises(ValueError, match="need at least k \\+ 1 samples; there are 18"):
        mixing_rate(normal(9, 4), normal(9, 4))
    with pytest.raises(ValueError, match="the same rows moved: got"):
        fidelity(normal(9, 4), normal(8, 4))
    with pytest.raises(ValueError, match="histograms must have the same bins"):
        js_divergence(torch.tensor([1, 2]), torch.tensor([0, 0]))
