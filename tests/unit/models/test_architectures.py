"""Sizes, counts and layouts are those of the model that is built."""

import pytest

from rsa_megatron.models.architectures import get_architecture
from tests.support import tiny


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


@pytest.mark.parametrize(
    "layout, message",
    [
        (dict(tensor=3, pipeline=1), "--tensor-model-parallel-size 3 does not divide the tower's attention heads, 4"),
        (dict(tensor=4, pipeline=1), "--tensor-model-parallel-size 4 does not divide the decoder's query groups, 2"),
        (dict(tensor=1, pipeline=8), "--pipeline-model-parallel-size 8 with 1 chunk.* tiny has 4"),
        (dict(tensor=1, pipeline=2, chunks=4), "--pipeline-model-parallel-size 2 with 4 chunk.* tiny has 4"),
    ],
)
def test_impossible_layouts_are_named(layout, message):
    with pytest.raises(ValueError, match=message):
        tiny.TINY.check_layout(**layout)


def test_an_unknown_architecture_is_named_with_the_known():
    with pytest.raises(
        ValueError, match="--model llava: neither a folder with a config.json nor one of demo, llava-ov-0.5b"
    ):
        get_architecture("llava")
