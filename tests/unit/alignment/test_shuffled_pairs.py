"""Scores of shuffled pairs are the metric's own of samples in another order, and lie where chance is known to be."""

import math

import pytest
import torch

from rsa_megatron.alignment import hsic, shuffled_pairs
from rsa_megatron.alignment.metrics import METRICS, describe_too_few, find_chance, least_samples
from rsa_megatron.alignment.nearest_neighbours import nearest_neighbours
from rsa_megatron.alignment.shuffled_pairs import draw_orders, score_with_shuffled, shuffle_neighbours

K = 5


def related(num_samples=80, widths=(16, 24), seed=0):
    """Two spaces that share six numbers a sample."""
    generator = torch.Generator().manual_seed(seed)
    shared_NF = torch.randn(num_samples, 6, generator=generator)
    return [
        shared_NF @ torch.randn(6, width, generator=generator)
        + 0.3 * torch.randn(num_samples, width, generator=generator)
        for width in widths
    ]


@pytest.mark.parametrize("widths", ((16, 24), (150, 120)))  # kernels from columns and from blocks
@pytest.mark.parametrize("metric", METRICS)
def test_each_order_has_the_value_of_its_pairs(metric, widths, monkeypatch):
    a_ND, b_NE = related(widths=widths)
    orders = draw_orders(metric, 80)
    assert orders.shape == (10, 80) and torch.equal(orders, draw_orders(metric, 80))
    assert not torch.equal(orders, draw_orders(metric, 80, seed=1))
    own, shuffled = score_with_shuffled(metric, a_ND, b_NE, K, orders)
    assert own == METRICS[metric](a_ND, b_NE, K)
    # The same in another order of sums, of float32 distances for rsa.
    expected = [METRICS[metric](a_ND, b_NE[order_N], K) for order_N in orders]
    assert shuffled == pytest.approx(expected, rel=1e-5 if metric == "rsa" else 1e-9, abs=1e-12)
    assert max(shuffled) < own if metric != "rsa" else min(shuffled) > own
    # Kernels that are too large to be held whole, in several blocks.
    monkeypatch.setattr(hsic, "MATRIX_ROWS", 50)
    monkeypatch.setattr(shuffled_pairs, "MATRIX_ROWS", 50)
    monkeypatch.setattr(hsic, "_BLOCK_ROWS", 33)
    few = draw_orders(metric, 80)
    assert len(few) == (3 if metric in ("cka", "cka-rbf", "unbiased-cka", "rsa") else 10)
    assert score_with_shuffled(metric, a_ND, b_NE, K, few)[1] == pytest.approx(expected[: len(few)], rel=1e-5, abs=1e-9)


def test_neighbours_of_shuffled_samples_are_those_found_among_them():
    x_ND, order_N = related()[0], draw_orders("mutual-knn", 80)[0]
    found = shuffle_neighbours(nearest_neighbours(x_ND, K), order_N)
    assert torch.equal(found, nearest_neighbours(x_ND[order_N], K))
    assert not torch.equal(found, nearest_neighbours(x_ND, K))


def test_chance_is_where_it_is_known_to_be():
    a_ND, b_NE = related(60, (30, 40))
    order_PN = torch.stack([torch.randperm(60, generator=torch.Generator().manual_seed(p)) for p in range(2000)])
    shuffled = {
        metric: torch.tensor(score_with_shuffled(metric, a_ND, b_NE, K, order_PN)[1])
        for metric in ("mutual-knn", "cka", "unbiased-cka")
    }
    u, v = (torch.nn.functional.normalize(x.double()) for x in (a_ND, b_NE))
    k_NN, l_NN = ((x - x.mean(0)) @ (x - x.mean(0)).T for x in (u, v))
    expected = {
        "mutual-knn": K / 59,
        "cka": (k_NN.trace() * l_NN.trace() / (59 * k_NN.norm() * l_NN.norm())).item(),
        "unbiased-cka": 0.0,
    }
    for metric, value in expected.items():
        # four standard errors
        assert shuffled[metric].mean().item() == pytest.approx(
            value, abs=4 * shuffled[metric].std().item() / 2000**0.5
        ), metric
    assert find_chance("mutual-knn", K, 60) == K / 59 and find_chance("cka", K, 60) is None


def test_unrelated_wide_features_have_a_large_cka_and_chance_says_so():
    a_ND, b_NE = (torch.randn(400, 1600, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    own, shuffled = score_with_shuffled("cka", a_ND, b_NE, K, draw_orders("cka", 400))
    assert own > 0.75 and sum(shuffled) / len(shuffled) == pytest.approx(
        own, abs=0.003
    )  # of 400 x 399 / 2 pairs: 1 / 283


@pytest.mark.parametrize("metric", METRICS)
def test_the_least_number_of_samples_has_a_finite_value_and_one_less_has_none(metric):
    least = least_samples(metric, K)
    a_ND, b_NE = related(least, seed=2)
    own, shuffled = score_with_shuffled(metric, a_ND, b_NE, K, draw_orders(metric, least))
    assert math.isfinite(own) and all(map(math.isfinite, shuffled)) and describe_too_few(metric, K, least) is None
    chance = find_chance(metric, K, least)
    assert chance is None or 0 < chance <= 1
    for few in range(least):
        reason = f"too few pairs ({few}; need at least {least})"
        assert describe_too_few(metric, K, few) == reason and find_chance(metric, K, few) is None
        with pytest.raises(ValueError) as error:
            score_with_shuffled(metric, a_ND[:few], b_NE[:few], K, draw_orders(metric, few))
        assert str(error.value) == reason
