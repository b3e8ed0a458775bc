"""The model that is built has the parameters and layers that its architecture counts."""

import pytest

from rsa_megatron.models.architectures import ARCHITECTURES
from tests.support import layouts, processes, tiny


def built_counts(argv):
    from megatron.core.utils import unwrap_model

    from rsa_megatron.models.llava_onevision import PARTS, get_part

    trainer = layouts.Trainer(argv)
    (model,) = unwrap_model(trainer.model)
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[get_part(name, parameter)] += parameter.numel()
    return counts


@pytest.mark.parametrize(
    "name, flags",
    [
        ("tiny", []),
        ("tiny", ["--untie-embeddings-and-output-weights"]),
        ("tiny", ["--num-layers", "2"]),
        ("demo", []),
    ],
)
def test_counts_are_those_of_the_model(demo, name, flags):
    argv = ["--tokenizer-model", str(demo / "tokenizer"), "--data-path", str(demo / "data" / "captions")]
    (counts,) = processes.run(built_counts, 1, [*argv, "--model", name, "--seq-length", "64", *flags])
    architecture = {**ARCHITECTURES, "tiny": tiny.TINY}[name]
    sizes = architecture.megatron_defaults()
    sizes["untie_embeddings_and_output_weights"] |= "--untie-embeddings-and-output-weights" in flags
    sizes["num_layers"] = int(flags[1]) if "--num-layers" in flags else sizes["num_layers"]
    expected = architecture.with_arguments(sizes).parameter_counts()
    assert counts == {part: sum(pieces.values()) for part, pieces in expected.items()}


def num_layers(argv):
    from megatron.core.utils import unwrap_model

    trainer = layouts.Trainer(argv)
    (model,) = unwrap_model(trainer.model)
    return len(model.vision_model.decoder.layers) if model.pre_process else None, len(
        model.language_model.decoder.layers
    )


def test_an_uneven_pipeline_leaves_the_tower_whole(demo):
    argv = [
        "--tokenizer-model",
        str(demo / "tokenizer"),
        "--data-path",
        str(demo / "data" / "captions"),
        "--pipeline-model-parallel-size",
        "2",
        "--decoder-first-pipeline-num-layers",
        "1",
    ]
    assert processes.run(num_layers, 2, argv) == [(2, 1), (None, 3)]
