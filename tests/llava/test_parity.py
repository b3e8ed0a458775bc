"""The loss, its figures and every parameter's gradient do not depend on how the run is split over processes.

Megatron's own train_step, optimizer and schedules; each kernel holds the same samples in each layout (micro-batch 4
alone, 2 on two data-parallel ranks). The tolerances and the largest differences seen are in tests/README.md.
"""

import layouts
import packed_attention
import processes
import pytest
import tiny
import torch
from layouts import LAYOUTS, SINGLE, largest_difference

# Gradients and parameters in fp32: about a hundred roundings of 6e-8 between a weight and the loss, in another order
# in each layout. Largest seen: tests/README.md. A wrong factor is off by 0.1 and more.
TOLERANCE = 2e-5
# By micro-batches of a step; parity_table.py takes ten of each.
NUM_ITERATIONS = {1: 10, 2: 3, 4: 3}

# Which of a micro-batch's four samples take part: all; all but one; none of the first rank's; all but the last.
ELIGIBLE = [(1, 0, 1, 1), (1, 1, 1, 1), (0, 0, 1, 1), (1, 1, 1, 0)]
CASES = [
    (layout, num_micro_batches, per_token, distributed_optimizer)
    for layout in LAYOUTS
    for num_micro_batches in (1, 4)
    for per_token in (False, True)
    for distributed_optimizer in (False, True)
    # Interleaved schedules take a multiple of the pipeline size.
    if not (num_micro_batches == 1 and "VPP" in layout.name)
]


TILES = (1, 3, 1, 2)  # of the samples, where images have several


def case_name(case) -> str:
    layout, num_micro_batches, per_token, distributed_optimizer = case
    names = [layout.name, f"M={num_micro_batches}"]
    names += ["per-token"] * per_token + ["distributed optimizer"] * distributed_optimizer
    return ", ".join(names)


def batches(num_micro_batches: int, per_token: bool) -> list[list]:
    # Without per-token loss Megatron averages over ranks, each divided by its own tokens: equal only for equal counts.
    num_targets = (9, 5, 7, 8) if per_token else (9, 9, 9, 9)
    return [
        [tiny.batch(100 * i + m, ELIGIBLE[m % 4], num_targets=num_targets) for m in range(num_micro_batches)]
        for i in range(NUM_ITERATIONS[num_micro_batches])
    ]


def flags(demo, num_micro_batches, per_token, distributed_optimizer, data_parallel_size, save) -> list[str]:
    flags = ["--data-path", str(demo / "data" / "captions"), "--tokenizer-model", str(demo / "tokenizer")]
    flags += ["--rsa-weight", "0.3", "--micro-batch-size", str(4 // data_parallel_size)]
    flags += ["--global-batch-size", str(4 * num_micro_batches)]
    flags += ["--calculate-per-token-loss"] * per_token
    if distributed_optimizer:
        flags += ["--use-distributed-optimizer", "--save", str(save), "--save-interval", "1000"]
    return flags


class Parity:
    """Runs of the one-process reference, each made once, and comparisons with them."""

    def __init__(self, demo, folder):
        self.demo, self.folder, self.references = demo, folder, {}
        self.initial = folder / "initial"
        processes.run(_save_initial_weights, 1, flags(demo, 1, False, False, 1, None), str(self.initial))

    def run(self, case, sabotage=None, options=(), batches_of=None) -> layouts.Run:
        layout, num_micro_batches, per_token, distributed_optimizer = case
        size = layout.data_parallel_size
        return layouts.run(
            layout,
            batches_of(num_micro_batches) if batches_of else batches(num_micro_batches, per_token),
            [*flags(self.demo, num_micro_batches, per_token, distributed_optimizer, size, self.folder), *options],
            load=self.initial,
            sabotage=sabotage,
        )

    def reference(self, case, options=(), batches_of=None) -> layouts.Run:
        _, num_micro_batches, per_token, _ = case
        key = (num_micro_batches, per_token, batches_of, *options)
        if key not in self.references:
            self.references[key] = self.run((SINGLE, num_micro_batches, per_token, False), None, options, batches_of)
        return self.references[key]

    def differences(self, case, sabotage=None, options=(), batches_of=None) -> dict[str, float]:
        """Largest relative differences between a layout and one process."""
        actual, expected = self.run(case, sabotage, options, batches_of), self.reference(case, options, batches_of)
        found = {
            name: max(abs(a[name] - e[name]) / max(abs(e[name]), 1e-30) for a, e in zip(actual.losses, expected.losses))
            for name in expected.losses[0]
            # How far rows are filled up differs from layout to layout, and with it what the copies add to them.
            if name == "lm loss" or (name.startswith("rsa ") and name != "rsa extra positions")
        }
        found["gradients"], _ = largest_difference(actual.gradients, expected.gradients)
        found["parameters"], _ = largest_difference(actual.parameters, expected.parameters)
        return found


def _save_initial_weights(argv, folder):
    from megatron.training.checkpointing import save_checkpoint

    trainer = layouts.Trainer([*argv, "--save", folder, "--save-interval", "1000", "--no-save-optim", "--no-save-rng"])
    save_checkpoint(0, trainer.model, None, None, 0)


@pytest.fixture(scope="module")
def parity(demo, tmp_path_factory) -> Parity:
    return Parity(demo, tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_a_layout_equals_one_process(parity, case):
    differences = parity.differences(case)
    assert differences["rsa pairs"] == 0
    assert max(differences.values()) < TOLERANCE, differences


def layout_of(name: str) -> layouts.Layout:
    return next(layout for layout in LAYOUTS if layout.name == name)


RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")


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


def of_grids(num_micro_batches) -> list[list]:
    return [[tiny.batch(100 * i + m, ELIGIBLE[m % 4], tiles=TILES) for m in range(num_micro_batches)] for i in range(2)]


def of_texts(num_micro_batches) -> list[list]:
    return [[tiny.text_batch(100 * i + m) for m in range(num_micro_batches)] for i in range(2)]


def some_of_texts(num_micro_batches) -> list[list]:
    with_images = of_grids(num_micro_batches)
    return [[texts[0], *images[1:]] for texts, images in zip(of_texts(num_micro_batches), with_images)]


def of_questions(num_micro_batches) -> list[list]:
    """Images that are no pairs: the kernels are empty."""
    return [[tiny.batch(100 * i + m, (0, 0, 0, 0), tiles=TILES) for m in range(num_micro_batches)] for i in range(2)]


def of_every_kind(num_micro_batches) -> list[list]:
    """Captions, questions about an image, texts, and an empty row, as the last batch of an epoch has them; two pairs in each."""
    kinds = dict(eligible=(1, 0, 1, 0), tiles=(3, 1, 1, 0), num_targets=(9, 7, 8, 5))
    others = dict(eligible=(0, 1, 0, 1), tiles=(0, 2, 0, 1), num_targets=(0, 9, 8, 7))
    return [[tiny.batch(100 * i + m, **(others if m % 2 else kinds)) for m in range(num_micro_batches)] for i in range(2)]


# A parameter that has no gradient would be waited for, and asserted, when gradients are reduced as they come.
OVERLAP = ("--overlap-grad-reduce",)


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


CAPTION = ("--rsa-text-source", "caption")


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
