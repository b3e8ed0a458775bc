"""Every recipe is what Megatron's parser takes, and its flags override it."""

import pytest
from recipes import STAGES, demo_parts, recipe

from rsa_megatron.llava.architectures import get_architecture
from tests.support import embedding_data, processes


def parsed(model, stage, settings, data, tokenizer, *flags):
    import sys

    import pretrain_llava_rsa

    from rsa_megatron.plugin import RSAPlugin

    sys.argv = ["pretrain_llava_rsa.py", "--model", model, "--stage", stage, "--data-path", data,
                "--tokenizer-model", tokenizer, "--dry-run", *flags]  # fmt: skip
    rsa = RSAPlugin()
    args = vars(pretrain_llava_rsa.parse(rsa, settings=settings))
    return {name: args[name] for name in settings or recipe(model, stage)}, rsa.config


CASES = [(model, stage, None) for model in ("demo", "llava-ov-7b") for stage in STAGES] + [("demo", "1", demo_parts())]


@pytest.mark.parametrize("model, stage, settings", CASES)
def test_a_recipe_arrives_in_megatrons_arguments_and_flags_override_it(demo, tmp_path, model, stage, settings):
    expected = settings or recipe(model, stage)
    shards = demo / "data" / "captions"
    if "image_positions" in expected:
        shards = embedding_data.write_shards(shards, tmp_path / "shards", get_architecture(model).vision.hidden_size)
    data = (str(shards), str(demo / "tokenizer"))
    ((actual, config),) = processes.run(parsed, 1, model, stage, settings, *data)
    assert actual == expected and config.weight == expected.get("rsa_weight", 0.01)
    flags = ("--lr", "0.25", "--rsa-weight", "7", "--trainable", "language")
    ((actual, config),) = processes.run(parsed, 1, model, stage, settings, *data, *flags)
    changed = dict(lr=0.25, trainable=["language"]) | (dict(rsa_weight=7) if "rsa_weight" in expected else {})
    assert actual == expected | changed and config.weight == 7
