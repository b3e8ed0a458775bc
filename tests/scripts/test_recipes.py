"""Every recipe is what Megatron's parser takes, and its flags override it."""

import argparse

import pytest

from rsa_megatron.models.architectures import get_architecture
from rsa_megatron.recipes import STAGES, demo_parts, recipe
from tests.support import embedding_data, processes, script

CASES = [(model, stage, None) for model in ("demo", "llava-ov-7b") for stage in STAGES] + [("demo", "1", demo_parts())]
PACKED = ("--packing-buffer-size", "8")
UNPACKED = ("--packing-buffer-size", "0")
#: Command lines of their own, by the place of their arguments behind those of CASES.
PACKING = [
    ("demo", "1", PACKED),
    ("demo", "1", (*PACKED, "--step-batch-size-schedule", "0:2 1K:4", "--train-samples", "64")),
    ("llava-ov-7b", "1.5", UNPACKED),
    ("llava-ov-7b", "2", UNPACKED),
]
FLAGS = ("--lr", "0.25", "--rsa-weight", "7", "--trainable", "language")


@pytest.fixture(scope="module")
def parsed(demo, tmp_path_factory) -> list:
    """What each recipe, alone and with the flags, becomes in Megatron's arguments."""
    runs = []
    for model, stage, settings, flags in [(*case, FLAGS) for case in CASES] + [
        (model, stage, None, flags) for model, stage, flags in PACKING
    ]:
        shards = demo / "data" / "captions"
        if "image_positions" in (settings or recipe(model, stage)):
            width = get_architecture(model).vision.hidden_size
            shards = embedding_data.write_shards(shards, tmp_path_factory.mktemp("shards") / "embeddings", width)
        argv = [
            "--model",
            model,
            "--stage",
            stage,
            "--data-path",
            shards,
            "--tokenizer-model",
            demo / "tokenizer",
            "--dry-run",
        ]
        runs += [([str(word) for word in argv], settings), ([*map(str, argv), *flags], settings)]
    (found,) = processes.run(script.parse_each, 1, runs)
    assert not [line for line in found if isinstance(line, str)]
    return found


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{model} {stage}{' parts' * bool(own)}" for model, stage, own in CASES]
)
def test_a_recipe_arrives_in_megatrons_arguments_and_flags_override_it(parsed, number):
    model, stage, settings = CASES[number]
    expected = settings or recipe(model, stage)
    args, config = parsed[2 * number]
    assert {name: args[name] for name in expected} == expected and config.weight == expected.get("rsa_weight", 0.01)
    args, config = parsed[2 * number + 1]
    changed = dict(lr=0.25, trainable=["language"]) | (dict(rsa_weight=7) if "rsa_weight" in expected else {})
    assert {name: args[name] for name in expected} == expected | changed and config.weight == 7


def test_packing_sets_what_follows_from_it_and_0_turns_a_recipes_off(parsed):
    behind = parsed[2 * len(CASES) :]
    (demo_1, _), (schedule, _), *unpacked = behind[1::2]
    names = ("micro_batch_size", "eval_micro_batch_size", "calculate_per_token_loss", "packing_max_tiles")
    # 1.5 x 160 positions of 36 a tile, rounded up; evaluations keep the recipe's 16.
    assert [demo_1[name] for name in names] == [schedule[name] for name in names] == [1, 16, True, 7]
    # As many samples as a step has rows, in whole micro-batches.
    assert (demo_1["eval_global_batch_size"], schedule["eval_global_batch_size"]) == (32, 16)
    for (args, _), max_tiles in zip(behind[4::2], (17, 37)):
        assert [args[name] for name in names] == [1, 1, True, max_tiles]
        assert args["packing_buffer_size"] == 1000 and args["eval_iters"] * args["eval_global_batch_size"] == 2400
    for args, _ in unpacked:
        assert [args[name] for name in names] == [1, 1, False, None]
        assert (args["packing_buffer_size"], args["global_batch_size"], args["eval_iters"]) == (0, 256, 10)


def start_of(*runs) -> list[list[str]]:
    """The lines of each run's start."""
    from rsa_megatron.training.run_summary import format_run

    return [format_run(argparse.Namespace(**args), rsa, get_architecture("demo")).splitlines() for args, rsa in runs]


def test_the_start_says_what_packing_does(parsed):
    unpacked, packed = processes.run(start_of, 1, *parsed[2 * len(CASES) :][:2])[0]
    batch, packing = [line for line in packed if line.startswith(("batch: ", "packing: "))]
    assert batch.startswith("batch: micro-batch 1 x 32 x DP 1 = 32 packed rows; ")
    for words in (
        "up to 160 positions and 7 tiles",
        "of 8 samples",
        "per token",
        "--global-batch-size counts rows",
        "`samples`",
    ):
        assert words in packing
    assert not any("packing" in line for line in unpacked) and any("= 32 samples" in line for line in unpacked)
