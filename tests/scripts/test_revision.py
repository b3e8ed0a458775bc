"""ReVision's stage on embeddings as a user runs it, what goes on from it, and what does not go together."""

import json
import re

import pytest
import torch

from checkpoint_conversion import __main__ as conversion
from tests.support import embedding_data, measurement_runs, processes, script, tiny
from tests.support.processes import Failed

WIDTH = 48  # the tiny tower's
PROJECTOR = "vision_projection.encoder."
FLAGS = (
    "--num-workers",
    0,
    "--micro-batch-size",
    4,
    "--eval-iters",
    0,
    "--mutual-knn-samples",
    0,
    "--save-interval",
    3,
)


@pytest.fixture(scope="module")
def shards(demo, tmp_path_factory):
    return embedding_data.write_shards(demo / "data" / "captions", tmp_path_factory.mktemp("shards") / "text", WIDTH)


@pytest.fixture(scope="module")
def pixels(demo, tmp_path_factory):
    """A run of stage 1 on pixels: the weights that the others begin from."""
    folder = tmp_path_factory.mktemp("pixels")
    script.run(1, demo, "--stage", 1, *FLAGS, "--train-iters", 3, "--save", folder)
    return folder


def revision(demo, shards, pixels, save, *more, world_size=2):
    begin = ("--stage", "revision", *FLAGS, "--image-positions", 4, "--pretrained-checkpoint", pixels, "--save", save)
    return script.run(world_size, demo, *begin, *more, data=shards)


@pytest.fixture(scope="module")
def stage(demo, shards, pixels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("revision")
    return folder, revision(demo, shards, pixels, folder, "--rsa-weight", "0.1")


def weights(folder, iteration=6):
    return script.plain_tensors(folder / f"iter_{iteration:07d}")


def test_the_projector_alone_learns_from_captions_and_rsa_is_beside_it(stage, pixels):
    folder, outputs = stage
    before, after = weights(pixels, 3), weights(folder)
    assert before.keys() == after.keys()  # the tower is there, as it was: any stage can go on
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.startswith(PROJECTOR)
    }
    figures = script.iterations(outputs)
    assert float(figures[6]["rsa pairs"]) == 8 and float(figures[6]["skipped samples"]) == 0
    assert json.loads((folder / "run.json").read_text()) == {
        "model": "tiny",
        "stage": "revision",
        "template": "plain",
        "image_aspect_ratio": "square",
        "finished": 6,
        "image_embedding_width": WIDTH,
    }


def test_it_goes_on_exactly_where_it_was_stopped(demo, shards, pixels, stage, tmp_path):
    more = ("--load", tmp_path, "--rsa-weight", "0.1")
    revision(demo, shards, pixels, tmp_path, *more, "--exit-interval", 3)
    resumed = script.losses(revision(demo, shards, pixels, tmp_path, *more))
    expected = script.losses(stage[1])
    assert resumed == {i: expected[i] for i in (4, 5, 6)}


STILL = ("--lr", 0, "--vision-lr", 0, "--projector-lr", 0, "--min-lr", 0, "--train-iters", 1, "--save-interval", 1)


@pytest.mark.parametrize("kind", ["embeddings", "pixels"])
def test_stages_with_real_images_go_on_from_it(demo, shards, stage, tmp_path, kind):
    """With embeddings of real images, as the paper's stage 2; or with pixels, whose tokens after the tower are as wide."""
    embeddings = (
        ("--image-positions", 4, "--trainable", "projector", "embeddings", "language") if kind == "embeddings" else ()
    )
    data = shards if kind == "embeddings" else demo / "data" / "captions"
    flags = ("--stage", "2", *FLAGS, *embeddings, "--load", stage[0])
    script.run(1, demo, *flags, *STILL, "--save", tmp_path / "still", data=data)
    before, after = weights(stage[0]), weights(tmp_path / "still", 1)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    script.run(1, demo, *flags, "--train-iters", 3, "--save", tmp_path / "learns", data=data)
    learnt = weights(tmp_path / "learns", 3)
    moved = {name for name in before if not torch.equal(before[name], learnt[name])}
    assert any(name.startswith(PROJECTOR) for name in moved) and any(
        name.startswith("language_model.decoder") for name in moved
    )
    assert any(name.startswith("vision_model.decoder") for name in moved) == (kind == "pixels")


OTHER_WIDTH = 20


@pytest.fixture(scope="module")
def other_shards(demo, tmp_path_factory):
    return embedding_data.write_shards(
        demo / "data" / "captions", tmp_path_factory.mktemp("shards") / "other", OTHER_WIDTH
    )


@pytest.fixture(scope="module")
def other(demo, other_shards, pixels, tmp_path_factory):
    """A run on embeddings of another width, in which nothing learns: its weights are those it begins with."""
    folder = tmp_path_factory.mktemp("other") / "run"
    flags = ("--image-embedding-width", OTHER_WIDTH, *STILL, "--tensor-model-parallel-size", 2)
    return folder, revision(demo, other_shards, pixels, folder, *flags)


def test_embeddings_of_another_width_begin_with_a_new_projector(demo, other_shards, pixels, other, tmp_path):
    width, (run, outputs) = OTHER_WIDTH, other
    assert (
        f"the projector is re-initialised: that of {pixels} is for the tower's {WIDTH} numbers, the embeddings have {width}"
        in outputs[0]
    )
    before, after = weights(pixels, 3), weights(run, 1)
    assert before.keys() == after.keys() and after[PROJECTOR + "linear_fc1.weight"].shape[1] == width
    projector = {name for name in before if name.startswith("vision_projection.")}
    assert all(torch.equal(before[name], after[name]) for name in before if name not in projector)
    # That projector is then loaded as any other part.
    resume = (
        "--image-embedding-width",
        width,
        "--load",
        run,
        *STILL,
        "--train-iters",
        2,
        "--override-opt-param-scheduler",
    )
    revision(demo, other_shards, pixels, tmp_path / "again", *resume, world_size=1)
    again = weights(tmp_path / "again", 2)
    assert all(torch.equal(after[name], again[name]) for name in after)
    with pytest.raises(
        Failed, match=f"its projector takes embeddings of {width} numbers, this run's is to take {WIDTH}"
    ):
        script.run(1, demo, "--stage", 1, *FLAGS, "--load", run, "--save", tmp_path / "other")


@pytest.mark.parametrize(
    "layout",
    [
        ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
        ("--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2),
    ],
    ids=lambda layout: layout[0],
)
def test_a_new_projector_learns_beside_the_checkpoints_weights(demo, other_shards, pixels, tmp_path, layout):
    revision(demo, other_shards, pixels, tmp_path, "--image-embedding-width", OTHER_WIDTH, "--train-iters", 3, *layout)
    before, after = weights(pixels, 3), weights(tmp_path, 3)
    differs = {
        name for name in before if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])
    }
    # The newline, of which embeddings have none, is drawn anew with the rest of the projector.
    assert differs == {name for name in before if name.startswith("vision_projection.")}


def test_a_new_projector_goes_on_exactly_with_the_distributed_optimizer(demo, other_shards, pixels, tmp_path):
    flags = ("--image-embedding-width", OTHER_WIDTH, "--use-distributed-optimizer", "--save-interval", 3)
    expected = script.losses(revision(demo, other_shards, pixels, tmp_path / "whole", *flags))
    stopped = (*flags, "--load", tmp_path / "stopped")
    assert (
        "re-initialised"
        in revision(demo, other_shards, pixels, tmp_path / "stopped", *stopped, "--exit-interval", 3)[0]
    )
    outputs = revision(demo, other_shards, pixels, tmp_path / "stopped", *stopped)
    resumed = script.losses(outputs)
    assert "re-initialised" not in outputs[0] and list(resumed) == [4, 5, 6]
    assert (resumed[4], resumed[6]) == (expected[4], expected[6])  # for the line between see above


def test_tower_and_decoder_are_measured_whatever_the_projector_takes(demo, stage, other, pixels, tmp_path):
    """Both are those of the run on pixels: nothing but the projector has learnt."""
    found = {}
    for name, (folder, layout) in {
        "pixels": (pixels, ()),
        "other": (other[0], ("--pipeline-model-parallel-size", 2)),
    }.items():
        argv = measurement_runs.flags(demo, tmp_path / name, "--checkpoint", folder, *layout)
        processes.run(measure, 2 if layout else 1, argv)
        found[name] = measurement_runs.stored(tmp_path / name)
    for side in ("vision", "text"):
        for layer, expected in found["pixels"][side].items():
            # States of size 1: some roundings of 6e-8, as the layers lie on two ranks.
            torch.testing.assert_close(found["other"][side][layer], expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(Failed) as failed:
        processes.run(
            measure, 1, measurement_runs.flags(demo, tmp_path / "projected", "--checkpoint", other[0], "--projected")
        )
    assert (
        f"takes embeddings of {OTHER_WIDTH} numbers, not the tower's tokens of {WIDTH}; leave it out"
        in failed.value.output
    )
    processes.run(
        measure, 1, measurement_runs.flags(demo, tmp_path / "same", "--checkpoint", stage[0], "--projected")
    )  # as wide: it can
    assert list(measurement_runs.stored(tmp_path / "same")["projector"]) == ["projector"]


def measure(argv):
    tiny.register()
    return measurement_runs.measure(argv)


def test_what_has_no_place_in_hugging_faces_model_is_not_exported(stage, other, pixels, tmp_path):
    def export(folder, name):
        return ["megatron-to-hf", "--checkpoint", str(folder), "--out", str(tmp_path / name)]

    (said,) = processes.run(convert, 1, export(other[0], "other"))
    assert (
        f"error: {other[0]}: its projector takes precomputed embeddings of width {OTHER_WIDTH}, Hugging Face's" in said
    )
    assert not (tmp_path / "other").exists()
    (said,) = processes.run(convert, 1, ["verify", "--hf", str(pixels / "hf"), "--checkpoint", str(other[0])])
    assert f"error: {other[0]}: its projector takes precomputed embeddings" in said
    (said,) = processes.run(convert, 1, export(stage[0], "stage"))
    assert "was trained on precomputed embeddings" in said and (tmp_path / "stage" / "config.json").is_file()
    (said,) = processes.run(convert, 1, export(pixels, "pixels"))
    assert "precomputed embeddings" not in said and (tmp_path / "pixels" / "config.json").is_file()


def convert(argv) -> str:
    try:
        conversion.main(argv)
    except SystemExit as end:
        assert end.code == 2
    return processes.output()


def test_validation_measures_the_embeddings(demo, shards, pixels, tmp_path):
    flags = ("--eval-iters", 2, "--eval-interval", 3, "--mutual-knn-samples", 48, "--train-iters", 3)
    outputs = revision(demo, shards, pixels, tmp_path, *flags, "--pipeline-model-parallel-size", 2)
    text = "".join(outputs)
    assert re.search(r"mutual-knn@10 at iteration 3 \| mutual-knn value: 0\.\d+ \| 48 pairs", text)
    assert re.search(r"validation loss at iteration 3 .*lm loss value", text)


def test_samples_without_an_embedding_are_skipped_and_counted(demo, pixels, tmp_path):
    def kept(key, part):
        return None if int(key[-6:]) % 4 == 0 else part

    shards = embedding_data.write_shards(demo / "data" / "captions", tmp_path / "shards", WIDTH, change=kept)
    outputs = revision(demo, shards, pixels, tmp_path / "run")
    assert "the sample 0 precomputed embedding(s) (.npy)" in "".join(outputs)
    assert sum(float(figures["skipped samples"]) for figures in script.iterations(outputs).values()) > 0


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--image-positions", 200), "--image-positions 200 must be from 1 to below --seq-length 128"),
        (("--image-positions", -1), "--image-positions -1 must be from 1"),
        (("--image-embedding-width", 0), "--image-embedding-width 0 must be at least 1"),
        (("--trainable", "vision"), "--trainable vision: images that come as embeddings pass the tower by"),
        (
            ("--mutual-knn-layers=1:-1",),
            "--mutual-knn-layers: a precomputed image embedding has no vision layer but -1",
        ),
        (("--rsa-layers=1:-1",), "--rsa-layers: a precomputed image embedding has no vision layer but -1"),
        (("--stage", "1", "--image-positions", 0, "--image-embedding-width", 20), "name --image-positions too"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_does_not_go_together_is_one_line(demo, shards, pixels, tmp_path, flags, says):
    with pytest.raises(Failed, match=re.escape(says)):
        revision(demo, shards, pixels, tmp_path, *flags, world_size=1)


@pytest.mark.parametrize(
    "width, kind, says",
    [
        (20, "embeddings", r"npy: float16 array of shape \[48\]; it must be .* of --image-embedding-width 20"),
        (48, "pixels", r"it has no embedding \(.npy\); name data that rsa-megatron realign transform has written"),
    ],
)
def test_data_of_another_kind_is_seen_before_anything_is_trained(demo, shards, pixels, tmp_path, width, kind, says):
    data = shards if kind == "embeddings" else demo / "data" / "captions"
    with pytest.raises(Failed, match=f"--data-path {data}: sample .* of split train: {says}"):
        revision(demo, data, pixels, tmp_path, "--image-embedding-width", width, world_size=1)


def test_a_second_run_into_the_same_folder_is_refused(demo, shards, pixels, stage):
    folder, _ = stage
    with pytest.raises(Failed) as failed:
        revision(demo, shards, pixels, folder, "--train-iters", 1, world_size=1)
    assert f"error: --save {folder} holds checkpoints (the last: 6), and without --load" in failed.value.output
