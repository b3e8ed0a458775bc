"""The training script evaluates the same, and trains on texts, under every layout."""

import re

import pytest

from tests.support import script
from tests.support.layouts import PP, TP, VPP


def validation_figures(outputs):
    text = "\n".join(outputs)
    scores = re.findall(r"((?:mutual-knn|unbiased-cka)(?: -?\d+:-?\d+)?) value: (-?[\d.]+)", text)
    return {name: float(score) for name, score in scores} | {
        name: float(value)
        for name, value in re.findall(r"\| ([a-z ]+) value: ([\d.E+-]+)", text.split("validation loss")[1])
    }


@pytest.fixture(scope="module")
def initial_weights(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("initial")
    script.run(1, demo, "--train-iters", 1, "--save", folder, "--save-interval", 1)
    return folder


LAYOUTS = ((2, TP), (2, (*TP, "--sequence-parallel")), (2, PP), (2, VPP), (4, TP + PP))


# Without RSA the measure alone reads states of inner layers: in a pipeline with one and with several chunks a stage.
@pytest.mark.parametrize(
    "rsa, layouts",
    [
        ((), LAYOUTS),
        (("--rsa-weight", 0), ((2, VPP), (4, TP + PP))),
    ],
    ids=["with RSA", "without"],
)
def test_evaluation_gives_the_same_under_every_layout(demo, initial_weights, rsa, layouts):
    flags = (
        "--skip-train",
        "--pretrained-checkpoint",
        initial_weights,
        "--eval-iters",
        2,
        "--mutual-knn-samples",
        64,
        "--mutual-knn-layers=-1:-1,0:0,1:3,2:4,-2:1",
        "--eval-metrics",
        "mutual-knn",
        "unbiased-cka",
        "--micro-batch-size",
        2,
        *rsa,
    )
    expected = validation_figures(script.run(1, demo, *flags))
    layers = [name for name in expected if name.startswith("mutual-knn")]
    assert layers == ["mutual-knn", "mutual-knn 0:0", "mutual-knn 1:3", "mutual-knn 2:4", "mutual-knn -2:1"]
    assert all(expected[name] > 0 for name in layers) and ("rsa loss" in expected) == (not rsa)
    # -1 is the last of 2 and of 4; the others are other spaces.
    assert expected["mutual-knn 2:4"] == expected["mutual-knn"] and len({expected[name] for name in layers}) >= 4
    cka = [name for name in expected if name.startswith("unbiased-cka")]
    assert len(cka) == 5 and len({expected[name] for name in cka}) >= 4
    for world_size, layout in layouts:
        actual = validation_figures(script.run(world_size, demo, *flags, *layout))
        assert actual.keys() == expected.keys()
        assert all(actual[name] == expected[name] for name in layers)  # counts of neighbours
        # The log has four digits of a score.
        assert all(
            value == pytest.approx(expected[name], rel=2e-5, abs=2e-4 * (name in cka)) for name, value in actual.items()
        )
    # Two data-parallel ranks read other batches, but all 64 pairs: the measure is the same.
    parallel = validation_figures(script.run(2, demo, *flags))
    assert all(parallel[name] == expected[name] for name in layers)


def test_interleaved_pipelines_measure_an_odd_number_of_micro_batches(demo, initial_weights):
    flags = (
        "--skip-train",
        "--pretrained-checkpoint",
        initial_weights,
        "--eval-iters",
        2,
        "--mutual-knn-samples",
        30,
        "--micro-batch-size",
        2,
    )
    expected, actual = (script.run(size, demo, *flags, *layout) for size, layout in ((1, ()), (2, VPP)))
    assert validation_figures(actual)["mutual-knn"] == validation_figures(expected)["mutual-knn"]
    assert "| 30 pairs" in "".join(actual)


def test_a_micro_batch_of_text_alone_trains_on_every_layout_and_that_it_has_no_pair_is_said(demo, tmp_path):
    mixture = tmp_path / "m.yaml"
    mixture.write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n"
        f"      - {{weight: 1, path: {demo}/data/texts, subflavors: {{rsa: true}}}}\n"
    )
    flags = ("--train-iters", 2, "--eval-iters", 0, "--mutual-knn-samples", 0)
    for world_size, layout in ((1, ()), (2, ()), (2, PP), (2, VPP), (2, (*TP, "--sequence-parallel"))):
        outputs = script.run(world_size, demo, *layout, *flags, data=mixture)
        # One line an interval, here an iteration, on one rank.
        assert "".join(outputs).count("in the last 1 iterations there was no pair: look for samples") == 2
        for line in script.iterations(outputs).values():
            assert float(line["rsa pairs"]) == float(line["rsa loss"]) == float(line["rsa dist vision"]) == 0
            assert float(line["lm loss"]) > 0 and int(line["number of nan iterations"]) == 0
