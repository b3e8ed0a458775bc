"""Context parallelism's arithmetic with plain tensors, over gloo; test_context_parallel.py has it in training.

The gradient scale: four processes, DP=2 x CP=2, each with half of every row. The script's division by tokens and
micro-batches and DDP's mean or sum over ranks are done here as Megatron does them (objective.py tells how).
Pooling by parts: every caption of a row, for every way of laying the row over four ranks.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed

from rsa_megatron.alignment.loss import rsa_loss_reference
from rsa_megatron.batch import RSASamples
from rsa_megatron.config import RSAConfig
from rsa_megatron.hooks import caption_pooling, objective
from rsa_megatron.hooks.representations import Representations
from tests.support import context_parallel_attention, processes

WEIGHT, NUM_MICRO_BATCHES = 0.5, 2
ADDED_UP = ", added up over context-parallel ranks"
B, L, D, E = 3, 8, 5, 6  # samples a data-parallel rank, rows, widths
ELIGIBLE = [[1, 0, 1], [1, 1, 1]]


def everything(dtype=torch.float32):
    """Two micro-batches of two data-parallel ranks; weights that make v and the hidden states of them."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_MICRO_BATCHES, 2)
    images = torch.randn(*shape, B, D, generator=generator).to(dtype)
    states = torch.randn(*shape, L, B, E, generator=generator).to(dtype)
    mask = (torch.rand(*shape, B, L, generator=generator) < 0.6).to(dtype)
    mask[0, 1, 2] = 0  # an eligible sample whose caption has no row
    weights = [torch.randn(n, generator=generator).to(dtype).requires_grad_() for n in (D, E)]
    return images, states, mask, weights


def gradients_on_a_rank(mode, sabotage):
    rank = torch.distributed.get_rank()
    data_rank, context_rank = divmod(rank, 2)
    groups = {
        name: [torch.distributed.new_group(ranks) for ranks in members]
        for name, members in {
            "cp": [[0, 1], [2, 3]],
            "dp": [[0, 2], [1, 3]],
            "tp": [[0], [1], [2], [3]],
            "dp_cp": [[0, 1, 2, 3]],
        }.items()
    }
    own = SimpleNamespace(
        cp=groups["cp"][data_rank], dp=groups["dp"][context_rank], tp=groups["tp"][rank], dp_cp=groups["dp_cp"][0]
    )
    if sabotage:
        objective._scale_gradient = lambda x, factor: x
    images, states, mask, weights = everything()
    half = slice(context_rank * L // 2, (context_rank + 1) * L // 2)
    num_tokens_of = [[[3, 5], [4, 0]], [[2, 2], [6, 1]]]  # micro-batch, data rank, context rank
    added_up, num_returned = mode.endswith(ADDED_UP), 0
    mode = mode.removesuffix(ADDED_UP)
    config, model_config = RSAConfig(weight=WEIGHT), SimpleNamespace(sequence_parallel=False)
    for m in range(NUM_MICRO_BATCHES):
        samples = RSASamples(torch.tensor(ELIGIBLE[data_rank]), None, torch.ones(B), torch.arange(B))
        representations = Representations(
            v={-1: images[m, data_rank] * weights[0]},
            hidden={-1: states[m, data_rank, half] * weights[1]},
            sums={},
            caption_mask_BL=mask[m, data_rank, :, half],
            samples=samples,
            is_packed=False,
            num_copied=0,
        )
        term = objective.rsa_term(representations, config, model_config, own)
        own_tokens = num_tokens_of[m][data_rank]
        # Some scripts add up loss and tokens over the context-parallel ranks before they return them.
        num_tokens = torch.tensor(sum(own_tokens) if added_up else own_tokens[context_rank])
        num_returned += int(num_tokens)
        outputs = (torch.zeros(()), {}) if mode == "pair" else (torch.zeros(()), num_tokens, {})
        loss, *_ = objective.add_to_loss(outputs, term, config, mode == "per-token", own)
        if mode == "pair":
            loss = loss * 2 / NUM_MICRO_BATCHES  # Megatron multiplies by the context-parallel size
        elif mode == "triple":
            loss = loss / num_tokens.clamp(min=1) / NUM_MICRO_BATCHES
        loss.backward()
    all_returned = torch.tensor(num_returned)
    torch.distributed.all_reduce(all_returned)
    for weight in weights:
        torch.distributed.all_reduce(weight.grad)
        weight.grad /= all_returned if mode == "per-token" else 4
    return [weight.grad for weight in weights]


def expected_gradients(mode):
    images, states, mask, weights = everything(torch.float64)
    total = 0
    num_tokens = [12, 11]  # of each micro-batch, all ranks
    for m in range(NUM_MICRO_BATCHES):
        takes_part = (torch.tensor(ELIGIBLE) > 0) & (mask[m].sum(-1) > 0)
        v_ND = (images[m] * weights[0])[takes_part]
        t_RBE = torch.einsum("rlbe,rbl->rbe", states[m] * weights[1], mask[m]) / mask[m].sum(-1).clamp(min=1)[..., None]
        share = num_tokens[m] / sum(num_tokens) if mode.startswith("per-token") else 1 / NUM_MICRO_BATCHES
        total = total + WEIGHT * share * rsa_loss_reference(v_ND, t_RBE[takes_part])
    return torch.autograd.grad(total, weights)


@pytest.mark.parametrize("mode", ["triple", "per-token", "pair", "triple" + ADDED_UP, "per-token" + ADDED_UP])
def test_context_parallel_ranks_add_up_to_equation_6(mode):
    for gradients in processes.run(gradients_on_a_rank, 4, mode, False):
        for actual, expected in zip(gradients, expected_gradients(mode)):
            assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()  # float32 against float64


def test_counting_the_tower_once_a_context_rank_would_be_seen():
    (v_gradient, t_gradient), *_ = processes.run(gradients_on_a_rank, 4, "triple", True)
    expected_v, expected_t = expected_gradients("triple")
    assert (v_gradient - expected_v).abs().max() > 0.1 * expected_v.abs().max()
    assert (t_gradient - expected_t).abs().max() < 1e-5 * expected_t.abs().max()


# Samples packed into the one row of each of two data-parallel ranks, the image and caption vectors of each, and which of
# them take part. (A caption's rows all hold its vector.)
PACKED = [torch.randn(n, D + E, generator=torch.Generator().manual_seed(n)) for n in (2, 5)]
TAKE_PART = [[1, 1], [1, 0, 1, 1, 0]]


def packed_term_on_a_rank():
    rank, whole = torch.distributed.get_rank(), torch.distributed.new_group([0, 1])
    alone = [torch.distributed.new_group([r]) for r in range(2)][rank]
    groups = SimpleNamespace(dp=whole, dp_cp=whole, cp=alone, tp=alone)
    own = PACKED[rank].clone().requires_grad_()
    v, t = own.split([D, E], dim=1)
    count = len(own)
    sample_L = torch.arange(1, count + 1).repeat_interleave(3)  # three rows each
    eligible = torch.tensor(TAKE_PART[rank])
    representations = Representations(
        v={-1: v},
        hidden={-1: t.repeat_interleave(3, dim=0)[:, None]},
        sums={},
        caption_mask_BL=sample_L[None].double(),
        samples=RSASamples(eligible, sample_L[None], torch.ones(count), torch.arange(count)),
        is_packed=True,
        num_copied=0,
    )
    term = objective.rsa_term(representations, RSAConfig(), SimpleNamespace(sequence_parallel=False), groups)
    return term.loss.detach(), torch.autograd.grad(term.loss, own)[0], term.num_pairs


def test_rows_packed_with_different_numbers_of_samples_add_up():
    ranks = processes.run(packed_term_on_a_rank, 2)
    whole = torch.cat(PACKED).double().requires_grad_()
    chosen = whole[torch.tensor(sum(TAKE_PART, [])) > 0]
    expected = rsa_loss_reference(*chosen.split([D, E], dim=1))
    assert [pairs for _, _, pairs in ranks] == [5, 5]
    # float32 against float64.
    torch.testing.assert_close(sum(loss for loss, _, _ in ranks).double(), expected, rtol=1e-5, atol=0)
    gradient = torch.cat([gradient for _, gradient, _ in ranks]).double()
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, whole)[0], rtol=1e-4, atol=1e-6)


ROW = 16
# Every caption of a row, by its first position and the one after its last.
SPANS = [(first, end) for first in range(ROW) for end in range(first + 1, ROW + 1)]
# Which positions a context-parallel rank has. Packed: two sequences of half a row, each split by itself.
ORDERS = {
    "in order": lambda rank, size: torch.arange(ROW).chunk(size)[rank],
    "zigzag": lambda rank, size: context_parallel_attention.positions(rank, size, ROW),
    "packed": lambda rank, size: torch.cat(
        [start + context_parallel_attention.positions(rank, size, ROW // 2) for start in (0, ROW // 2)]
    ),
}
# Context-parallel and tensor-parallel size, sequence parallelism.
SPLITS = [(4, 1, False), (2, 2, False), (2, 2, True), (1, 4, True), (1, 4, False)]
# An order; whether several samples share a row; and how many positions at the end of a rank's part have no mask, as a row is
# filled up after its mask.
CASES = [(order, packed, cut) for order in ORDERS for packed in (False, True) for cut in (0, 1)]


def a_row(packed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, [ROW, B, E]; the caption mask, [B, ROW]; weights that make a sum of t, [n, E].

    Each sample with one of SPANS for a caption; or packed, three samples' captions strewn over one row.
    """
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[first <= position < end for position in range(ROW)] for first, end in SPANS]).float()
    if packed:
        mask = torch.randint(0, 4, (1, ROW), generator=generator).float()
    states, num_samples = torch.randn(ROW, len(mask), E, generator=generator), 3 if packed else len(mask)
    return states, mask, torch.randn(num_samples, E, generator=generator)


def pooled_by_parts(split, mask_order: str | None) -> list[tuple]:
    """For each of CASES: this rank's positions, t, its counts, and the gradient of its states.

    Args:
        mask_order: the order of the mask's parts, where it is wrongly another than that of the states.
    """
    context_size, tensor_size, sequence_parallel = split
    context_rank, tensor_rank = divmod(torch.distributed.get_rank(), tensor_size)
    ranks = torch.arange(4).view(context_size, tensor_size)
    tp = [torch.distributed.new_group(members) for members in ranks.tolist()][context_rank]
    cp = [torch.distributed.new_group(members) for members in ranks.T.tolist()][tensor_rank]
    model_config = SimpleNamespace(sequence_parallel=sequence_parallel)
    results = []
    for order, packed, cut in CASES:
        states, mask, weight = a_row(packed)
        places = ORDERS[order](context_rank, context_size)
        own_mask = mask[:, ORDERS[mask_order or order](context_rank, context_size)[: len(places) - cut]]
        if sequence_parallel:
            places = places.chunk(tensor_size)[tensor_rank]
        own_states = states[places].requires_grad_()
        sums = caption_pooling.caption_sums(own_states, own_mask, len(weight), model_config, tp)
        t, count = caption_pooling.caption_means(sums, caption_pooling.caption_counts(own_mask, len(weight)), cp)
        (gradient,) = torch.autograd.grad((t * weight).sum(), own_states)
        results.append((places, t.detach(), count, gradient))
    return results


def pooled_whole(context_size: int, order: str, packed: bool, cut: int) -> tuple[torch.Tensor, ...]:
    """The same over the whole row: t, its counts and the gradient of all states."""
    states, mask, weight = a_row(packed)
    for rank in range(context_size):
        mask[:, ORDERS[order](rank, context_size)[ROW // context_size - cut :]] = 0
    mask_nS = mask == torch.arange(1, 4)[:, None] if packed else mask > 0
    states.requires_grad_()
    rows_of = [states[counted, 0 if packed else sample] for sample, counted in enumerate(mask_nS)]
    t = torch.stack([rows.mean(0) if len(rows) else torch.zeros(E) for rows in rows_of])
    (gradient,) = torch.autograd.grad((t * weight).sum(), states)
    return t.detach(), mask_nS.sum(1), gradient


def largest_pooling_errors(split, mask_order: str | None = None) -> dict[tuple, float]:
    """By case: of t, count or gradient on any rank."""
    ranks = processes.run(pooled_by_parts, 4, split, mask_order)
    errors = {}
    for case, of_ranks in zip(CASES, zip(*ranks)):
        t, count, gradient = pooled_whole(split[0], *case)
        errors[case] = max(
            (actual - expected).abs().max().item()
            for places, *actuals in of_ranks
            for actual, expected in zip(actuals, (t, count, gradient[places]))
        )
    return errors


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: f"CP={split[0]} TP={split[1]}{' SP' * split[2]}")
def test_every_caption_of_a_split_row_is_pooled_as_in_a_whole_one(split):
    """Each rank has t whole, and the gradient of its own positions, once: captions on one rank, on several, and cut off."""
    errors = largest_pooling_errors(split)
    assert max(errors.values()) < 2e-6, errors  # float32: 16 roundings of 6e-8 of sums up to 8


def test_a_mask_split_in_another_order_would_be_seen():
    for (order, _, _), error in largest_pooling_errors((2, 2, True), "in order").items():
        assert error < 2e-6 if order == "in order" else error > 0.1
