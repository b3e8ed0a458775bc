"""Sizes, counts and layouts are those of the model that is built."""

import pytest

from rsa_megatron.llava.architectures import ARCHITECTURES, get_architecture
from tests.support import layouts, processes, tiny


def built_counts(argv):
    from megatron.core.utils import unwrap_model

    from rsa_megatron.llava.model import PARTS, part_of

    trainer = layouts.Trainer(argv)
    (model,) = unwrap_model(trainer.model)
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name, parameter)] += parameter.numel()
    return counts


@pytest.mark.parametrize("name, flags", [
    ("tiny", []), ("tiny", ["--untie-embeddings-and-output-weights"]), ("tiny", ["--num-layers", "2"]), ("demo", []),
])  # fmt: skip
def test_counts_are_those_of_the_model(demo, name, flags):
    argv = ["--tokenizer-model", str(demo / "tokenizer"), "--data-path", str(demo / "data" / "captions")]
    (counts,) = processes.run(built_counts, 1, [*argv, "--model", name, "--seq-length", "64", *flags])
    architecture = {**ARCHITECTURES, "tiny": tiny.TINY}[name]
    sizes = architecture.megatron_defaults()
    sizes["untie_embeddings_and_output_weights"] |= "--untie-embeddings-and-output-weights" in flags
    sizes["num_layers"] = int(flags[1]) if "--num-layers" in flags else sizes["num_layers"]
    expected = architecture.with_arguments(sizes).parameter_counts()
    assert counts == {part: sum(pieces.values()) for part, pieces in expected.items()}


def test_the_demo_is_small():
    assert 1e6 < total("demo") < 3e6


def total(name, parts=("vision", "projector", "embeddings", "language")) -> int:
    counts = get_architecture(name).parameter_counts()
    return sum(count for part in parts for count in counts[part].values())


@pytest.mark.parametrize("name, stage_1, full", [("llava-ov-1.5b", 635.4, 2.2), ("llava-ov-7b", 960.0, 8.0)])
def test_the_papers_table_of_parameters(name, stage_1, full):
    """Table B.1 names them "trainable"; its stage 1 counts the word embeddings, of 152,000 and 152,128 rows."""
    assert round(total(name, ("vision", "projector", "embeddings")) / 1e6, 1) == stage_1
    assert round(total(name) / 1e9, 1) == full
    # The figures tell the sizes apart: with SigLIP's 27th layer, without the embeddings' added rows, or with tied
    # embeddings they would be others.
    architecture = get_architecture(name)
    one_layer = architecture.parameter_counts()["vision"]["26 layers"] / 26
    assert round((total(name, ("vision", "projector", "embeddings")) + one_layer) / 1e6, 1) != stage_1
    fewer_rows = 64 * architecture.decoder.hidden_size
    assert round((total(name, ("vision", "projector", "embeddings")) - fewer_rows) / 1e6, 1) != stage_1
    assert round((total(name) - architecture.parameter_counts()["language"]["output layer"]) / 1e9, 1) != full


def num_layers(argv):
    from megatron.core.utils import unwrap_model

    trainer = layouts.Trainer(argv)
    (model,) = unwrap_model(trainer.model)
    return len(model.vision_model.decoder.layers) if model.pre_process else None, len(model.language_model.decoder.layers)


def test_an_uneven_pipeline_leaves_the_tower_whole(demo):
    argv = ["--tokenizer-model", str(demo / "tokenizer"), "--data-path", str(demo / "data" / "captions"),
            "--pipeline-model-parallel-size", "2", "--decoder-first-pipeline-num-layers", "1"]  # fmt: skip
    assert processes.run(num_layers, 2, argv) == [(2, 1), (None, 3)]


@pytest.mark.parametrize("layout, message", [
    (dict(tensor=3, pipeline=1), "--tensor-model-parallel-size 3 does not divide the tower's attention heads, 4"),
    (dict(tensor=4, pipeline=1), "--tensor-model-parallel-size 4 does not divide the decoder's query groups, 2"),
    (dict(tensor=1, pipeline=8), "--pipeline-model-parallel-size 8 with 1 chunk.* tiny has 4"),
    (dict(tensor=1, pipeline=2, chunks=4), "--pipeline-model-parallel-size 2 with 4 chunk.* tiny has 4"),
])  # fmt: skip
def test_impossible_layouts_are_named(layout, message):
    with pytest.raises(ValueError, match=message):
        tiny.TINY.check_layout(**layout)


def test_an_unknown_architecture_is_named_with_the_known():
    with pytest.raises(ValueError, match="--model llava: neither a folder with a config.json nor one of demo, llava-ov-0.5b"):
        get_architecture("llava")
