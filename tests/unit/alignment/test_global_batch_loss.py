"""A batch whose rows come in parts: its value is the whole kernel's, its gradient the whole one's on average over orders."""

import itertools

import pytest
import torch

from rsa_megatron.alignment.distances import DISTANCES
from rsa_megatron.alignment.global_batch_loss import rsa_sums
from rsa_megatron.alignment.loss import rsa_loss_reference

SIZES = (3, 1, 4, 2)  # pairs of each micro-batch
D, E = 7, 5


def vectors(sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(n, width, generator=generator, dtype=torch.float64).requires_grad_() for width in (D, E)]
        for n in sizes
    ]


def in_order(parts, order, distance="euclidean"):
    """S_m of each micro-batch as a step in this order finds it; its own rows all on one rank."""
    sums, earlier = {}, [torch.zeros(0, D, dtype=torch.float64), torch.zeros(0, E, dtype=torch.float64)]
    for m in order:
        v, t = parts[m]
        sums[m] = rsa_sums(v, t, v.detach(), t.detach(), 0, *earlier, distance=distance)
        earlier = [torch.cat([rows, own.detach()]) for rows, own in zip(earlier, (v, t))]
    return sums


def whole(parts, distance="euclidean"):
    return rsa_loss_reference(*(torch.cat(side) for side in zip(*parts)), distance=distance)


def leaves(parts):
    return [x for part in parts for x in part]


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_value_is_the_whole_batch_s(distance):
    parts = vectors()
    sums = in_order(parts, range(4), distance)
    total = sum(SIZES)
    # float64 sums of a hundred terms in another order.
    torch.testing.assert_close(
        sum(s.loss for s in sums.values()) / total**2, whole(parts, distance), rtol=1e-12, atol=0
    )
    distances = sum(s.distance_sum_v for s in sums.values())
    v = torch.cat([v for v, _ in parts]).detach()
    if distance == "euclidean":
        # cdist of a row with itself is 0 or a rounding of 1e-8.
        torch.testing.assert_close(distances, torch.cdist(v, v).sum(), rtol=1e-7, atol=0)


def mean_gradients(parts, orders, distance="euclidean"):
    gradients = [
        torch.autograd.grad(
            sum(s.loss for s in in_order(parts, order, distance).values()) / sum(SIZES) ** 2, leaves(parts)
        )
        for order in orders
    ]
    return [torch.stack(of_one).mean(dim=0) for of_one in zip(*gradients)], gradients


@pytest.mark.parametrize("distance", DISTANCES)
def test_over_all_orders_the_gradient_is_the_whole_batch_s(distance):
    parts = vectors()
    means, gradients = mean_gradients(parts, list(itertools.permutations(range(4))), distance)
    for mean, expected in zip(means, torch.autograd.grad(whole(parts, distance), leaves(parts))):
        torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-12)
    # One order alone is not: it is an estimate.
    assert any((g - m).abs().max() > 0.1 * m.abs().max() for g, m in zip(gradients[0], means))


def test_without_doubling_it_would_not_be():
    parts = vectors()
    own = in_order(parts, [0])[0].loss
    v, t = parts[0]
    torch.testing.assert_close(own, rsa_loss_reference(v, t) * SIZES[0] ** 2, rtol=1e-12, atol=0)
    kernels_of_micro_batches = sum(rsa_loss_reference(*part) * len(part[0]) ** 2 for part in parts) / sum(SIZES) ** 2
    gradients = torch.autograd.grad(kernels_of_micro_batches, leaves(parts))
    expected = torch.autograd.grad(whole(parts), leaves(parts))
    assert any((g - e).abs().max() > 0.1 * e.abs().max() for g, e in zip(gradients, expected))


def test_one_order_is_what_the_derivation_says():
    """R(m, m) through both sides, 2 R(m, m') through the later side, twice."""
    parts = vectors()
    order = [2, 0, 3, 1]
    sums = in_order(parts, order)
    for place, m in enumerate(order):
        v, t = parts[m]
        written_out = (torch.cdist(v, v) - torch.cdist(t, t)).square()
        written_out = torch.where(torch.eye(len(v), dtype=torch.bool), 0.0, written_out).sum()
        for before in order[:place]:
            other_v, other_t = (x.detach() for x in parts[before])
            written_out = written_out + 4 * (torch.cdist(v, other_v) - torch.cdist(t, other_t)).square().sum()
        expected = torch.autograd.grad(written_out, parts[m], allow_unused=True)
        for actual, other in zip(torch.autograd.grad(sums[m].loss, parts[m]), expected):
            torch.testing.assert_close(actual, other, rtol=1e-9, atol=1e-12)


def test_ranks_add_up():
    (v, t), (other_v, other_t) = vectors((4, 3))
    earlier = other_v.detach(), other_t.detach()
    together = rsa_sums(v, t, v.detach(), t.detach(), 0, *earlier)
    rows = [slice(0, 1), slice(1, 1), slice(1, 4)]  # a rank with one pair, with none, with three
    parts = [rsa_sums(v[r], t[r], v.detach(), t.detach(), r.start, *earlier) for r in rows]
    for name in ("loss", "distance_sum_v", "distance_sum_t"):
        torch.testing.assert_close(sum(getattr(p, name) for p in parts), getattr(together, name), rtol=1e-12, atol=0)
    for x in (v, t):
        split = torch.autograd.grad(sum(p.loss for p in parts), x, retain_graph=True)[0]
        torch.testing.assert_close(
            split, torch.autograd.grad(together.loss, x, retain_graph=True)[0], rtol=1e-9, atol=1e-12
        )


def test_the_first_single_pair_has_nothing_to_be_compared_with():
    (v, t), _ = vectors((1, 3))
    alone = rsa_sums(v, t, v.detach(), t.detach(), 0, v.detach()[:0], t.detach()[:0])
    assert alone.loss == 0 and torch.autograd.grad(alone.loss, v)[0].abs().max() == 0
