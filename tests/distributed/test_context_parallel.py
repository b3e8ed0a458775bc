"""Rows split over context-parallel ranks: loss, figures and every parameter's gradient are those of one process.

Megatron's own split of the rows, schedules and reductions, so that the factors of objective.py's docstring are proved and
not derived alone. The attention stands in for Transformer Engine's, which needs a GPU (tests/context_parallel_attention.py).

Every row is an image of 4 positions and 11 tokens after it: text position p is position p + 3 of 15, which are filled up to
16, or to 32 under pipeline parallelism.
"""

import pytest
import torch

from tests.support import context_parallel_attention, layouts, processes, tiny
from tests.support.context_parallel_attention import in_order
from tests.support.layouts import SINGLE, Layout, largest_difference, layout_of
from tests.support.parity import (
    ELIGIBLE,
    LAYERS,
    OVERLAP,
    RECOMPUTE,
    TOLERANCE,
    WHOLE,
    case_name,
    flags,
    of_every_kind,
    of_grids,
    of_texts,
)

_CP = ("--context-parallel-size", "2")
CP = Layout("CP=2", 2, 1, _CP)
CP_4 = Layout("CP=4", 4, 1, ("--context-parallel-size", "4"))
CP_TP = Layout("CP=2 TP=2", 4, 1, _CP + layout_of("TP=2").flags)
CP_TP_SP = Layout("CP=2 TP=2 SP", 4, 1, _CP + layout_of("TP=2 SP").flags)
CP_DP = Layout("CP=2 DP=2", 4, 2, _CP)
CP_PP = Layout("CP=2 PP=2", 4, 1, _CP + layout_of("PP=2").flags)

# First and last text position of the four samples' captions.
CAPTIONS = [(1, 8), (9, 11), (7, 10), (1, 11)]
# Text positions whose next token is learnt. Without per-token loss Megatron averages over ranks, each divided by its own
# tokens: equal to one process only where all ranks have as many.
EVEN = [(1, 3, 9, 11)] * 4
UNEVEN = [range(1, 10), range(1, 6), range(1, 6), range(1, 10)]
ON_ONE_RANK = [range(1, 4), range(1, 6), range(1, 3), range(1, 7)]


def batches(num_micro_batches: int, learnt: list) -> list[list]:
    made = [[tiny.batch(100 * i + m, ELIGIBLE[m % 4]) for m in range(num_micro_batches)] for i in range(2)]
    for batch in sum(made, []):
        for b, (first, last) in enumerate(CAPTIONS):
            batch.rsa.caption_mask[b], batch.loss_mask[b] = 0, 0
            batch.rsa.caption_mask[b, first : last + 1], batch.loss_mask[b, list(learnt[b])] = 1, 1
    return made


def even(num_micro_batches):
    return batches(num_micro_batches, EVEN)


def uneven(num_micro_batches):
    return batches(num_micro_batches, UNEVEN)


def on_one_rank(num_micro_batches):
    return batches(num_micro_batches, ON_ONE_RANK)


def ranks_that_hold(text_positions, size: int, length: int) -> set[int]:
    rows = torch.tensor(text_positions) + 3
    return {
        rank for rank in range(size) if torch.isin(rows, context_parallel_attention.positions(rank, size, length)).any()
    }


def test_captions_lie_on_one_rank_and_on_several():
    def ranks(size, length):
        return [ranks_that_hold(range(first, last + 1), size, length) for first, last in CAPTIONS]

    assert ranks(2, 16) == [{1}, {0}, {0, 1}, {0, 1}]
    assert ranks(2, 32) == [{0, 1}, {1}, {1}, {0, 1}]  # through a pipeline
    assert ranks(4, 16) == [{2, 3}, {0, 1}, {1, 2}, {0, 1, 2, 3}]
    for size, length in ((2, 16), (2, 32), (4, 16)):
        learnt = [ranks_that_hold([position], size, length) for position in EVEN[0]]
        assert all(learnt.count({rank}) == len(learnt) / size for rank in range(size))
    assert all(ranks_that_hold(list(learnt), 2, 16) == {1} for learnt in ON_ONE_RANK)


# Layout, micro-batches, per-token loss, distributed optimizer.
CASES = [
    (CP, 1, False, False),
    (CP, 4, True, False),
    (CP_4, 4, False, False),
    (CP_TP, 1, True, False),
    (CP_TP, 4, False, False),
    (CP_TP_SP, 4, True, False),
    (CP_DP, 4, False, True),
    (CP_PP, 4, False, False),
]


@pytest.mark.parametrize("case", [pytest.param(CASES[0], marks=pytest.mark.check), *CASES[1:]], ids=case_name)
def test_a_context_parallel_layout_equals_one_process(parity, case):
    _, _, per_token, _ = case
    differences = parity.differences(case, context_parallel_attention.use, batches_of=uneven if per_token else even)
    assert differences["rsa pairs"] == 0
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize(
    "layout, kind, options",
    [
        (CP_TP_SP, of_grids, OVERLAP),
        (CP, of_texts, OVERLAP),
        (CP, of_every_kind, RECOMPUTE),
    ],
    ids=lambda value: getattr(value, "name", getattr(value, "__name__", "")),
)
def test_images_of_several_tiles_and_texts_too(parity, layout, kind, options):
    differences = parity.differences((layout, 2, True, False), context_parallel_attention.use, options, kind)
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize(
    "layout, options, per_token",
    [
        (CP_PP, LAYERS, True),
        (CP_TP_SP, LAYERS, True),
        (CP, WHOLE, False),
        (CP_DP, WHOLE, True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else getattr(value, "name", ""),
)
def test_pairs_of_layers_and_whole_batches_too(parity, layout, options, per_token):
    case = (layout, 4, per_token, False)
    differences = parity.differences(case, context_parallel_attention.use, options, uneven if per_token else even)
    assert differences["rsa pairs"] == 0
    assert max(differences.values()) < TOLERANCE, differences


def vectors_of_layers(argv, sabotage):
    from rsa_megatron.evaluation.megatron_features import Pairs, caption_vectors_of_layers

    trainer = layouts.Trainer(argv, sabotage)
    for chunk in trainer.model:
        chunk.eval()
    generator = torch.Generator().manual_seed(0)
    captions = [torch.randint(10, tiny.VOCAB_SIZE, (length,), generator=generator) for length in (5, 9, 12, 7)]
    pairs = [Pairs.of(torch.zeros(4, 3, 28, 28), captions, torch.ones(4, dtype=torch.int64))]
    return caption_vectors_of_layers(trainer.model, pairs, [0, 2, 4], micro_batch_size=4, seq_length=32)


@pytest.mark.parametrize("layout", [CP_TP_SP, CP_PP], ids=lambda layout: layout.name)
def test_what_is_measured_is_the_same_too(parity, layout):
    argv = [*flags(parity.demo, 1, False, False, 1, None), "--pretrained-checkpoint", str(parity.initial)]
    (expected,) = processes.run(vectors_of_layers, 1, argv, None)
    for of_rank in processes.run(
        vectors_of_layers, layout.world_size, [*layout.flags, *argv], context_parallel_attention.use
    ):
        for layer, t_BE in expected.items():
            assert (of_rank[layer] - t_BE).abs().max() < TOLERANCE * t_BE.abs().max()


@pytest.mark.parametrize("kind", [uneven, on_one_rank])
def test_the_rsa_gradient_does_not_depend_on_how_the_learnt_tokens_lie(parity, kind):
    """Without per-token loss, where the LM loss does: what RSA adds to the gradients is that of one process."""

    def added(layout, sabotage):
        def gradients(weight):
            return parity.run((layout, 1, False, False), sabotage, ("--rsa-weight", weight), kind).gradients

        both, of_lm = (
            gradients("100"),
            gradients("0"),
        )  # a large weight, so that next to nothing is lost in the difference
        return {name: gradient - of_lm[name] for name, gradient in both.items()}, of_lm

    (actual, actual_lm), (expected, expected_lm) = added(CP, context_parallel_attention.use), added(SINGLE, None)
    assert largest_difference(actual, expected)[0] < TOLERANCE
    assert largest_difference(actual_lm, expected_lm)[0] > 1000 * TOLERANCE


def use_and_return_a_pair():
    """A script of the old kind: the mean over the tokens of all context-parallel ranks, and a report."""
    import pretrain_llava_rsa as script
    from megatron.core import mpu

    context_parallel_attention.use()
    right = script.forward_step

    def forward_step(data_iterator, model):
        output, loss_func = right(data_iterator, model)

        def pair(output_tensor):
            loss_sum, num_tokens, report = loss_func(output_tensor)
            torch.distributed.all_reduce(num_tokens, group=mpu.get_context_parallel_group())
            return loss_sum / num_tokens, report

        return output, pair

    script.forward_step = forward_step


def test_scripts_that_return_a_pair_get_the_same(parity):
    differences = parity.differences((CP_DP, 4, False, False), use_and_return_a_pair, batches_of=uneven)
    assert max(differences.values()) < TOLERANCE, differences


def tower_counted_once_a_rank():
    from rsa_megatron.hooks import objective

    context_parallel_attention.use()
    objective._scale_gradient = lambda x, factor: x


def scale_without_context_parallel_size():
    from rsa_megatron import plugin

    context_parallel_attention.use()
    right = plugin.add_to_loss

    class OneRank:
        def __init__(self, groups):
            self.__dict__.update(dp_cp=groups.dp_cp, dp=groups.dp, cp=type("Size1", (), {"size": lambda self: 1})())

    plugin.add_to_loss = lambda *args: right(*args[:-1], OneRank(args[-1]))


def first_stage_in_order():
    """The first stage of a pipeline, which works out where captions lie for layers before the last, takes halves."""
    from rsa_megatron.hooks import token_positions

    context_parallel_attention.use()
    token_positions.context_parallel_part = lambda mask_BL, size, rank, bounds=None: mask_BL.chunk(size, dim=1)[rank]


@pytest.mark.parametrize(
    "layout, options, sabotage",
    [
        (CP, (), tower_counted_once_a_rank),
        (CP, (), scale_without_context_parallel_size),
        (CP, (), in_order),
        (CP_PP, LAYERS, first_stage_in_order),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mistake_would_be_seen(parity, layout, options, sabotage):
    differences = parity.differences((layout, 1, False, False), sabotage, options, even)
    assert differences["gradients"] > 1000 * TOLERANCE
