"""The training script, run as a user runs it: log, resume, checkpoints, layouts, and what it says to bad input."""

import dataclasses
import json
import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rsa_megatron.models.hf_config import read_architecture
from tests.support import script, tiny
from tests.support.layouts import PP
from tests.support.processes import Failed


@pytest.mark.check
def test_the_log_shows_the_figures_and_tensorboard_has_them(demo, tmp_path):
    outputs = script.run(
        2,
        demo,
        "--eval-interval",
        3,
        "--eval-iters",
        2,
        "--mutual-knn-samples",
        64,
        "--mutual-knn-k",
        5,
        "--tensorboard-dir",
        tmp_path,
        "--global-batch-size",
        16,
        "--wandb-project",
        "tests",
        "--wandb-exp-name",
        "a run",
        "--wandb-save-dir",
        tmp_path,
        sabotage=wandb_offline,
    )
    figures = script.iterations(outputs)
    assert list(figures) == [1, 2, 3, 4, 5, 6]
    for line in figures.values():
        assert float(line["rsa pairs"]) == 8  # micro-batch 4 on 2 ranks
        assert float(line["skipped samples"]) == 0 and float(line["samples"]) == 16
        for name in ("lm loss", "rsa loss", "rsa dist vision", "rsa dist text"):
            assert float(line[name]) > 0
    found = re.findall(
        r"mutual-knn@5 at iteration (\d+) \| mutual-knn value: ([\d.]+) \| (\d+) pairs.*chance ([\d.]+)", outputs[1]
    )
    assert [(i, pairs, chance) for i, _, pairs, chance in found] == [
        (i, "64", "0.0794") for i in ("3", "6")
    ]  # the last one once
    assert all(0 < float(score) < 1 for _, score, *_ in found)
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in ("lm loss", "rsa loss", "rsa pairs", "rsa dist vision", "rsa dist text", "skipped samples"):
        assert len(events.Scalars(name)) == 6
    for name in ("lm loss validation", "rsa loss validation", "mutual-knn validation"):
        assert [event.step for event in events.Scalars(name)] == [3, 6]
    (written,) = tmp_path.rglob("*.wandb")
    for name in ("lm loss", "rsa loss", "rsa pairs", "rsa dist vision", "rsa dist text", "mutual-knn validation"):
        assert name.encode() in written.read_bytes()


def wandb_offline():
    import os

    os.environ["WANDB_MODE"] = "offline"


def test_weight_0_leaves_no_trace(demo):
    (output,) = script.run(1, demo, "--rsa-weight", 0, sabotage=no_hooks_allowed)
    assert all("rsa loss" not in line and float(line["lm loss"]) > 0 for line in script.iterations([output]).values())


def no_hooks_allowed():
    from rsa_megatron import plugin

    plugin.RepresentationHooks = None  # making one would raise


def test_dry_run_prints_what_would_run_and_stops_without_a_file(demo, tmp_path):
    flags = [
        "--tensorboard-dir",
        str(tmp_path),
        "--wandb-project",
        "tests",
        "--wandb-save-dir",
        str(tmp_path),
        "--save-interval",
        "7",
        "--rsa-distance",
        "cosine",
        "--lr-warmup-iters",
        "1",
        "--trainable",
        "projector",
        "vision",
        "--tensor-model-parallel-size",
        "2",
        "--make-vocab-size-divisible-by",
        "768",
    ]
    output, _ = script.run(2, demo, "--dry-run", *flags)
    counts = {part: sum(pieces.values()) for part, pieces in tiny.TINY.parameter_counts().items()}
    for part, learns in (("vision", "0.001"), ("projector", "0.001"), ("embeddings", "frozen"), ("language", "frozen")):
        assert re.search(rf"^{part} +{counts[part]:,}  {learns} ", output, flags=re.MULTILINE)
    assert re.search(r"^projector .* two linear layers 2,624, image_newline 32$", output, flags=re.MULTILINE)
    assert re.search(
        rf"^all +{sum(counts.values()):,}  {counts['vision'] + counts['projector']:,} are trained$", output, re.M
    )
    assert "word embeddings: 1,024 rows, and 512 of padding, not counted" in output
    assert "\ncheckpoints: none, as there is no --save (--save-interval 7 does nothing)\n" in output
    assert re.search(
        r"^RSA: weight 0.01; up to \d+ pairs a kernel \(micro-batch x DP\); distance cosine$", output, re.M
    )
    assert "iteration 1 changes no weight" in output and "resumes" not in output
    assert "layout: 2 rank(s), DP 1, TP 2\n" in output
    assert "iteration        1" not in output and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, flags",
    [
        ("lm loss", ["--rsa-weight", 0]),
        ("rsa loss", ["--rsa-weight", 1, "--trainable", "vision"]),
    ],
)
def test_each_loss_is_learnt(demo, name, flags):
    flags = ["--train-iters", 60, "--lr", "2e-3", "--adam-eps", "1e-8", *flags]
    figures = [float(line[name]) for line in script.iterations(script.run(1, demo, *flags)).values()]
    assert sum(figures[-10:]) < 0.6 * sum(figures[:10])  # ten micro-batches each: single ones differ by a factor


@pytest.mark.parametrize("optimizer", [(), ("--use-distributed-optimizer",)], ids=["", "distributed optimizer"])
def test_only_what_is_to_learn_moves(demo, tmp_path, optimizer):
    """Stage 1, language model frozen, on two pipeline stages: nothing on the last stage learns."""
    flags = ("--trainable", "vision", "projector", "--save-interval", 3, "--save", tmp_path, *PP, *optimizer)
    script.run(2, demo, "--train-iters", 6, *flags)
    before, after = (script.plain_tensors(tmp_path / f"iter_000000{i}") for i in (3, 6))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # The tower's last norm is only kept, and square images have no newline.
    unused = {"vision_model.ln_post.weight", "vision_model.ln_post.bias", "vision_projection.image_newline"}
    assert moved == {name for name in before if name.startswith(("vision_model.", "vision_projection."))} - unused
    flags = ("--train-iters", 6, *flags, "--load", tmp_path, "--ckpt-step", 3)
    assert list(script.iterations(script.run(2, demo, *flags))) == [4, 5, 6]


def test_mutual_knn_is_of_base_tiles_however_images_are_cut(demo):
    def scores(*flags):
        flags = (
            "--skip-train",
            "--eval-iters",
            1,
            "--seq-length",
            160,
            "--mutual-knn-samples",
            48,
            "--mutual-knn-k",
            5,
            *flags,
        )
        outputs = "".join(script.run(2, demo, *PP, *flags))
        return [
            re.search(pattern, outputs)[1] for pattern in (r"mutual-knn value: ([\d.]+)", r"lm loss value: ([\d.E+-]+)")
        ]

    (square, square_loss), (anyres, anyres_loss) = scores(), scores("--image-aspect-ratio", "anyres")
    assert square == anyres and square_loss != anyres_loss


def collapsed_images():
    from rsa_megatron.evaluation import online

    right = online.image_vectors
    online.image_vectors = lambda *args: {layer: torch.ones_like(v) for layer, v in right(*args).items()}


def test_what_has_no_score_is_said_with_the_reason_and_the_run_goes_on(demo, tmp_path):
    flags = ("--train-iters", 2, "--eval-interval", 1, "--eval-iters", 1, "--mutual-knn-samples", 8)
    metrics = ("--eval-metrics", "mutual-knn", "cka", "svcca", "rsa", "--metrics-file", tmp_path / "metrics.jsonl")
    outputs = script.run(1, demo, *flags, *metrics, sabotage=collapsed_images)
    assert list(script.iterations(outputs)) == [1, 2]
    start = " at iteration 1 | {0} has no value: "
    # k is 10: of 8 pairs chance would be 10 / 7.
    for name, at, reason in (
        ("mutual-knn", "mutual-knn@10", "too few pairs (8; need at least 11)"),
        ("svcca", "svcca", "too few pairs (8; need at least 11)"),
        ("cka", "cka", "all 8 rows of the first features are equal: there is nothing to compare"),
    ):
        assert f" validation {at}{start.format(name)}{reason} |" in outputs[0]
    assert "nan |" not in outputs[0]
    text = (tmp_path / "metrics.jsonl").read_text()
    evaluations = [json.loads(line) for line in text.splitlines() if "lm loss validation" in line]
    assert evaluations and all({"rsa validation", "rsa chance validation"} <= line.keys() for line in evaluations)
    assert not any(name.startswith(("mutual-knn", "cka", "svcca")) for line in evaluations for name in line)
    assert all(value > 0 for line in evaluations for value in line.values())


# Kill and resume


def test_a_frozen_language_model_without_a_checkpoint_is_warned_of(demo):
    flags = ("--train-iters", 1, "--trainable", "vision", "projector")
    assert "the language model is frozen and no checkpoint was found" in script.run(1, demo, *flags)[0]


# Layouts


# Bad input


def test_help_lists_our_flags_and_on_request_megatrons(demo):
    ours, *others = script.run(2, demo, "--help")
    (everything,) = script.run(1, demo, "--help-megatron")
    assert others == [""]  # once, not on each rank
    for flag in ("--image-aspect-ratio", "--rsa-weight", "--help-megatron"):
        assert flag in ours and flag in everything
    assert "--tensor-model-parallel-size" in everything and "--tensor-model-parallel-size" not in ours
    assert ours.count("\n") < 150 < 1000 < everything.count("\n")


def test_what_an_export_needs_is_beside_the_checkpoints_and_of_this_model(demo, tmp_path):
    def run(*flags):
        folder = tmp_path / "save"
        return script.run(1, demo, "--train-iters", 1, "--save", folder, *flags)

    (said,) = run("--template", "qwen_1_5", "--rotary-base", 5000)
    assert (
        "/save, at the end alone (--save-interval N: every N iterations too)" in said
    )  # and there it is to resume from
    hf = tmp_path / "save" / "hf"
    expected = dataclasses.replace(
        tiny.TINY, name="hf", decoder=dataclasses.replace(tiny.TINY.decoder, rotary_base=5000)
    )
    assert read_architecture(hf) == expected
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(hf).chat_template
    resumed = ("--load", tmp_path / "save", "--train-iters", 2)
    run("--template", "qwen_1_5", "--rotary-base", 5000, *resumed)  # it is the same model
    with pytest.raises(Failed) as failed:
        run(*resumed, "--train-iters", 3)
    assert "save/hf/config.json and 1000000 by --model tiny: name the model" in failed.value.output
    # A tokenizer that has no room for <video> cannot be exported: said before training.
    vocabulary = {f"word{i}": i for i in range(1021)} | {"<image>": 1021, "<|endoftext|>": 1022, "[UNK]": 1023}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "full")
    line = script.error_line(1, demo, "--tokenizer-model", tmp_path / "full", "--save", tmp_path / "never")
    assert "has 1025 ids (<video> added), the model 1024 word embeddings" in line
