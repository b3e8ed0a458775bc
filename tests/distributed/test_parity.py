"""The loss, its figures and every parameter's gradient do not depend on how the run is split over processes.

Megatron's own train_step, optimizer and schedules; each kernel holds the same samples in each layout (micro-batch 4
alone, 2 on two data-parallel ranks). The tolerances and the largest differences seen are in tests/README.md.
"""

import pytest
import torch

from tests.support import layouts, packed_attention, processes, tiny
from tests.support.layouts import LAYOUTS, SINGLE, largest_difference, layout_of
from tests.support.parity import (
    ALL_CASES,
    CAPTION,
    ELIGIBLE,
    OVERLAP,
    RECOMPUTE,
    TILES,
    TOLERANCE,
    Parity,
    case_name,
    flags,
    of_every_kind,
    of_grids,
    of_questions,
    of_texts,
    some_of_texts,
)


@pytest.fixture(scope="module")
def parity(demo, tmp_path_factory) -> Parity:
    return Parity(demo, tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("case", ALL_CASES, ids=case_name)
def test_a_layout_equals_one_process(parity, case):
    differences = parity.differences(case)
    assert differences["rsa pairs"] == 0
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize("name, options", [
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
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else value)  # fmt: skip
def test_options_change_nothing_of_that(parity, name, options):
    differences = parity.differences((layout_of(name), 4, False, False), options=options)
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize("kind", [of_grids, of_texts, some_of_texts, of_questions, of_every_kind], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_images_of_several_tiles_and_texts_in_every_layout(parity, layout, kind):
    case = (layout, 2, True, False)  # per token: the losses of ranks with fewer tokens weigh less
    differences = parity.differences(case, options=OVERLAP, batches_of=kind)
    assert max(differences.values()) < TOLERANCE, differences
    has_pairs = kind not in (of_texts, of_questions)
    assert all((losses["rsa loss"] > 0) == has_pairs for losses in parity.reference(case, OVERLAP, kind).losses)
    if kind is of_texts:
        gradients = parity.run(case, options=OVERLAP, batches_of=kind).gradients
        of_images = [name for name in gradients if name.startswith("vision_")]
        assert of_images and not any(gradients[name].any() for name in of_images if "ln_post" not in name)


def no_black_tile():
    from rsa_megatron.llava import model

    model.LlavaOneVision._black_tile = lambda self, images: images


def test_texts_without_the_black_tile_would_be_seen(parity):
    with pytest.raises(processes.Failed, match="per_param_grad_ready_counts"):
        parity.run((layout_of("DP=2"), 2, True, False), no_black_tile, OVERLAP, of_texts)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_captions_read_alone_in_every_layout(parity, layout):
    # Captions, grids of tiles, a text and an empty row in one micro-batch; then with the rows recomputed in backward.
    for kind, options in ((None, CAPTION), (of_every_kind, (*CAPTION, *RECOMPUTE))):
        differences = parity.differences((layout, 2, True, False), options=options, batches_of=kind)
        assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize("name", ["DP=2", "TP=2 PP=2", "PP=2 VPP=2"])
def test_packed_sequences_in_the_place_of_a_mask_are_the_same(parity, name):
    for options in (CAPTION, (*CAPTION, *RECOMPUTE)):
        differences = parity.differences((layout_of(name), 2, True, False), packed_attention.use, options, of_every_kind)
        assert max(differences.values()) < TOLERANCE, differences


def test_packed_sequences_need_whole_rows(parity):
    with pytest.raises(processes.Failed, match="--sequence-parallel: each rank has a part of every row.*--micro-batch-size 1"):
        parity.run((layout_of("TP=2 SP"), 1, False, False), packed_attention.use, CAPTION)


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
    from rsa_megatron.llava import carrier

    carrier._num_parts = lambda dtype: 1


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


def carrier_without_gradient():
    from rsa_megatron.llava import carrier

    right = carrier.pack
    carrier.pack = lambda carried, *args: right(carried._replace(vector_BF=carried.vector_BF.detach()), *args)


def caption_mask_of_the_next_token():
    from rsa_megatron.llava import taps

    right = taps.Taps._samples

    def shifted(self, arguments):
        samples = right(self, arguments)
        samples.caption_mask = samples.caption_mask.roll(-1, dims=1)
        return samples

    taps.Taps._samples = shifted


def unsummed_sequence_parallel_text():
    from rsa_megatron.llava import caption_pooling

    caption_pooling.reduce_from_tensor_model_parallel_region = lambda x, group: x


@pytest.mark.parametrize("name, sabotage", [
    ("DP=2", scale_without_data_parallel_size),
    ("PP=2", carrier_without_gradient),
    ("TP=2", caption_mask_of_the_next_token),
    ("TP=2 SP", unsummed_sequence_parallel_text),
])  # fmt: skip
def test_a_mistake_would_be_seen(parity, name, sabotage):
    assert parity.differences((layout_of(name), 1, False, False), sabotage)["gradients"] > 1000 * TOLERANCE


def carrier_without_starts():
    from rsa_megatron.llava import carrier

    right = carrier.pack
    carrier.pack = lambda carried, *args: right(carried._replace(start_B=0 * carried.start_B), *args)


@pytest.mark.parametrize("name", ["PP=2", "PP=2 VPP=2"])
def test_stages_that_do_not_know_where_the_copies_begin_would_be_seen(parity, name):
    differences = parity.differences((layout_of(name), 2, True, False), carrier_without_starts, CAPTION)
    assert differences["gradients"] > 1000 * TOLERANCE


FIRST_TILES, LAST_TILES = [[0], [1], [4], [5]], [[0], [3], [4], [6]]
ALL_TILES = [[0], [1, 2, 3], [4], [5, 6]]


@pytest.mark.parametrize("options, tiles_of, detached", [
    ((), FIRST_TILES, ""),
    (("--rsa-base-tile", "last"), LAST_TILES, ""),
    (("--rsa-image-pooling", "full"), ALL_TILES, ""),
    (("--rsa-stop-gradient", "text"), FIRST_TILES, "t"),
    (("--rsa-stop-gradient", "vision"), FIRST_TILES, "v"),
    (CAPTION, FIRST_TILES, ""),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")  # fmt: skip
def test_one_process_is_equation_6(parity, demo, options, tiles_of, detached):
    """The reference of all others against LM loss + weight * eq. 5, written down anew and left to autograd."""
    actual, expected = with_and_by_plain_autograd(parity, demo, options, tiles_of, detached)
    for name in ("lm loss", "rsa loss"):
        assert actual.losses[0][name] == pytest.approx(expected[name], rel=1e-5)
    assert largest_difference(actual.gradients, layouts._assemble([expected["gradients"]]))[0] < TOLERANCE


def copies_that_see_their_row():
    from rsa_megatron.llava import caption_copies

    right = caption_copies.segment_mask
    caption_copies.segment_mask = lambda start_B, length: right(0 * start_B, length)


def test_copies_that_saw_their_row_would_be_seen(parity, demo):
    actual, expected = with_and_by_plain_autograd(parity, demo, CAPTION, FIRST_TILES, "", copies_that_see_their_row)
    assert actual.losses[0]["lm loss"] == pytest.approx(expected["lm loss"], rel=1e-5)
    assert abs(actual.losses[0]["rsa loss"] / expected["rsa loss"] - 1) > 1e-2


def with_and_by_plain_autograd(parity, demo, options, tiles_of, detached, sabotage=None):
    argv = [*flags(demo, 1, False, False, 1, None), *options]
    batch = tiny.batch(0, ELIGIBLE[0], tiles=TILES)
    actual = layouts.run(SINGLE, [[batch]], argv, load=parity.initial, sabotage=sabotage)
    (expected,) = processes.run(_by_plain_autograd, 1, argv, str(parity.initial), batch, tiles_of, detached)
    return actual, expected


def _by_plain_autograd(argv, initial, batch, tiles_of, detached):
    from megatron.core.utils import unwrap_model

    from rsa_megatron.alignment.loss import rsa_loss_reference

    trainer = layouts.Trainer([*argv, "--rsa-weight", "0", "--pretrained-checkpoint", initial])
    (model,) = unwrap_model(trainer.model)
    seen = {}
    model.vision_model.register_forward_hook(lambda m, a, out: seen.update(vision=out))
    model.language_model.decoder.register_forward_hook(lambda m, a, out: seen.update(text=out))
    token_loss, _ = model(
        batch.images, batch.tokens, None, None, labels=batch.labels, loss_mask=batch.loss_mask,
        image_layouts=batch.image_layouts, sound_clips=torch.zeros(0),
    )  # fmt: skip
    lm_loss, num_targets, v, t = 0, 0, [], []
    tokens_of_tiles, in_rows = seen["vision"], seen["text"]
    for b, tiles in enumerate(TILES):
        # The image token at position 0 became so many rows: text position p is row p + shift.
        shift = tiny.layout(tiles).num_tokens(side=2, max_tiles=9) - 1
        learnt = torch.nonzero(batch.loss_mask[b]).flatten()
        lm_loss, num_targets = lm_loss + token_loss[b, shift + learnt].sum(), num_targets + len(learnt)
        if batch.rsa.eligible[b]:
            v.append(torch.cat([tokens_of_tiles[tile] for tile in tiles_of[b]]).mean(0))
            caption = torch.nonzero(batch.rsa.caption_mask[b]).flatten()
            if "caption" in argv:  # by itself
                alone = batch.tokens[b, caption][None]
                model(batch.images[:0], alone, None, None, sound_clips=torch.zeros(0), image_layouts=torch.zeros(0, 6).long())
                t.append(seen["text"][:, 0].mean(0))
            else:
                t.append(in_rows[shift + caption, b].mean(0))
    v_ND, t_NE = torch.stack(v), torch.stack(t)
    lm_loss = lm_loss / num_targets
    rsa_loss = rsa_loss_reference(v_ND.detach() if detached == "v" else v_ND, t_NE.detach() if detached == "t" else t_NE)
    parameters = dict(model.named_parameters())
    gradients = dict(zip(parameters.values(), torch.autograd.grad(lm_loss + 0.3 * rsa_loss, list(parameters.values()))))
    return {
        "lm loss": lm_loss.item(),
        "rsa loss": rsa_loss.item(),
        "gradients": trainer.shards(gradients.__getitem__),
    }
