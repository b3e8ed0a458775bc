"""The loss, its figures and every parameter's gradient do not depend on how the run is split over processes.

Megatron's own train_step, optimizer and schedules; each kernel holds the same samples in each layout (micro-batch 4
alone, 2 on two data-parallel ranks). The tolerances and the largest differences seen are in tests/README.md.
"""

import pytest

from tests.support import processes
from tests.support.layouts import LAYOUTS, SINGLE, layout_of
from tests.support.parity import (
    ALL_CASES,
    CASES,
    OVERLAP,
    RECOMPUTE,
    TOLERANCE,
    case_name,
    of_every_kind,
    of_grids,
    of_questions,
    of_texts,
    some_of_texts,
)

# The first of each layout is part of `make check`.
FIRST = [case for number, case in enumerate(CASES) if case[0] not in [earlier[0] for earlier in CASES[:number]]]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.check] * (case in FIRST)) for case in CASES], ids=case_name
)
def test_a_layout_equals_one_process(parity, case):
    differences = parity.differences(case)
    assert differences["rsa pairs"] == 0
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize(
    "name, options",
    [
        ("DP=2 PP=2", ("--rsa-normalize", "mean-distance")),
        ("DP=2 PP=2", ("--rsa-stop-gradient", "text")),
        ("DP=2 PP=2", ("--rsa-stop-gradient", "vision")),
        ("DP=2", ("--rsa-distance", "cosine")),
        ("DP=2", ("--rsa-distance", "manhattan")),
        ("TP=2 PP=2", ("--trainable", "vision", "projector")),
        ("PP=2", RECOMPUTE),
        ("PP=2 VPP=2", RECOMPUTE),
        ("TP=2 SP", RECOMPUTE),
        ("DP=2", ("--ddp-average-in-collective",)),
        ("DP=2", ("--overlap-grad-reduce",)),
        ("DP=2 PP=2", ("--overlap-grad-reduce",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_options_change_nothing_of_that(parity, name, options):
    differences = parity.differences((layout_of(name), 4, False, False), options=options)
    assert max(differences.values()) < TOLERANCE, differences


def test_cases_have_every_two_settings_together():
    """Of the full matrix, which parity_table.py runs, enough that no two settings meet in it alone."""

    def pairs(cases):
        return {(i, j, case[i], case[j]) for case in cases for i in range(4) for j in range(i)}

    assert pairs(CASES) == pairs(ALL_CASES)


# In every layout: each kind of sample in one micro-batch, and texts alone, for which the vision parts still take part in
# each reduction. The others are parts of the first: in a layout with DP and PP, and in one with TP and SP.
KINDS = [(layout, kind) for layout in LAYOUTS for kind in (of_every_kind, of_texts)]
KINDS += [
    (layout_of(name), kind) for name in ("DP=2 PP=2", "TP=2 SP") for kind in (of_grids, some_of_texts, of_questions)
]


@pytest.mark.parametrize(
    "layout, kind", KINDS, ids=lambda value: getattr(value, "name", getattr(value, "__name__", ""))
)
def test_images_of_several_tiles_and_texts_in_every_layout(parity, layout, kind):
    case = (layout, 2, True, False)  # per token: the losses of ranks with fewer tokens weigh less
    actual = parity.run(case, options=OVERLAP, batches_of=kind)
    differences = parity.differences_of(actual, case, OVERLAP, kind)
    assert max(differences.values()) < TOLERANCE, differences
    has_pairs = kind not in (of_texts, of_questions)
    assert all((losses["rsa loss"] > 0) == has_pairs for losses in parity.reference(case, OVERLAP, kind).losses)
    if kind is of_texts:
        of_images = [name for name in actual.gradients if name.startswith("vision_")]
        assert of_images and not any(actual.gradients[name].any() for name in of_images if "ln_post" not in name)


def no_black_tile():
    from rsa_megatron.models import llava_onevision

    llava_onevision.LlavaOneVision._make_black_tile = lambda self, images: images


def test_texts_without_the_black_tile_would_be_seen(parity):
    with pytest.raises(processes.Failed, match="per_param_grad_ready_counts"):
        parity.run((layout_of("DP=2"), 2, True, False), no_black_tile, OVERLAP, of_texts)


def old_pair_of_loss_and_report():
    import pretrain_llava_rsa as script

    right = script.forward_step

    def forward_step(data_iterator, model):
        output, loss_func = right(data_iterator, model)

        def pair(output_tensor):
            loss_sum, num_tokens, report = loss_func(output_tensor)
            return loss_sum / num_tokens, report

        return output, loss_func and pair

    script.forward_step = forward_step


@pytest.mark.parametrize("name", ["DP=2", "DP=2 PP=2", "TP=2 SP"])
def test_scripts_that_return_a_pair_get_the_same(parity, name):
    differences = parity.differences((layout_of(name), 4, False, False), old_pair_of_loss_and_report)
    assert max(differences.values()) < TOLERANCE, differences


def hi_without_lo():
    from rsa_megatron.hooks import pipeline_payload

    pipeline_payload._num_parts = lambda dtype: 1


def test_a_bf16_pipeline_keeps_the_digits_of_the_image_vectors(parity):
    """In one process v is pooled in fp32 and used so; through a bf16 pipeline it comes as hi + lo, good to 2^-17."""

    def distance(layout, sabotage=None):
        run = parity.run((layout, 1, False, False), sabotage, options=("--bf16",))
        return run.losses[0]["rsa dist vision"]

    expected = distance(SINGLE)
    assert distance(layout_of("PP=2")) == pytest.approx(expected, rel=2**-17)
    # A mean of nine distances, each of vectors rounded to 8 bits, is off by more than that.
    assert distance(layout_of("PP=2"), hi_without_lo) != pytest.approx(expected, rel=2**-15)


def scale_without_data_parallel_size():
    from rsa_megatron import plugin

    right = plugin.add_to_loss

    class OneRank:
        def __init__(self, groups):
            self.__dict__.update(dp_cp=groups.dp_cp, cp=groups.cp, dp=type("Size1", (), {"size": lambda self: 1})())

    plugin.add_to_loss = lambda *args: right(*args[:-1], OneRank(args[-1]))


def payload_without_gradient():
    from rsa_megatron.hooks import pipeline_payload

    right = pipeline_payload.pack

    def pack(payload, *args, **options):
        return right(payload._replace(vector_BF=payload.vector_BF.detach()), *args, **options)

    pipeline_payload.pack = pack


def caption_mask_of_the_next_token():
    from rsa_megatron.hooks import representations

    right = representations.select_samples

    def shifted(*args, **options):
        samples = right(*args, **options)
        samples.caption_mask = samples.caption_mask.roll(-1, dims=1)
        return samples

    representations.select_samples = shifted


def unsummed_sequence_parallel_text():
    from rsa_megatron.hooks import caption_pooling

    caption_pooling.reduce_from_tensor_model_parallel_region = lambda x, group: x


@pytest.mark.parametrize(
    "name, sabotage",
    [
        ("DP=2", scale_without_data_parallel_size),
        ("PP=2", payload_without_gradient),
        ("TP=2", caption_mask_of_the_next_token),
        ("TP=2 SP", unsummed_sequence_parallel_text),
    ],
)
def test_a_mistake_would_be_seen(parity, name, sabotage):
    assert parity.differences((layout_of(name), 1, False, False), sabotage)["gradients"] > 1000 * TOLERANCE
