"""Every recipe is what Megatron's parser takes, and its flags override it."""

import pytest

from rsa_megatron.models.architectures import get_architecture
from rsa_megatron.recipes import STAGES, demo_parts, recipe
from tests.support import embedding_data, processes, script

CASES = [(model, stage, None) for model in ("demo", "llava-ov-7b") for stage in STAGES] + [("demo", "1", demo_parts())]
FLAGS = ("--lr", "0.25", "--rsa-weight", "7", "--trainable", "language")


@pytest.fixture(scope="module")
def parsed(demo, tmp_path_factory) -> list:
    """What each recipe, alone and with the flags, becomes in Megatron's arguments."""
    runs = []
    for model, stage, settings in CASES:
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
        runs += [([str(word) for word in argv], settings), ([*map(str, argv), *FLAGS], settings)]
    (found,) = processes.run(script.parse_each, 1, runs)
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
