"""rsa-megatron measure --checkpoint: a Megatron checkpoint gives what its Hugging Face export gives, in every layout."""

import re
import shutil

import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from rsa_megatron.cli import measure as measure_command
from rsa_megatron.data.sources.open_pairs import open_pairs, sample
from rsa_megatron.data.tiles import ImageTiler
from rsa_megatron.evaluation.hf_models import fingerprint
from tests.support import hf_parity, processes
from tests.support.measurement_runs import PAIRS, flags, measure, stored

TP, PP = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")
LAYOUTS = {
    "one process": (1, ()),
    "TP=2": (2, TP),
    "TP=2 SP": (2, (*TP, "--sequence-parallel")),
    "PP=2": (2, PP),
    "TP=2 PP=2": (4, TP + PP),
}


@pytest.fixture(scope="module")
def models(demo, tmp_path_factory):
    return hf_parity.Models(tmp_path_factory.mktemp("models"), demo, tied=True)


@pytest.fixture(scope="module")
def of_export(models, demo, tmp_path_factory):
    store = tmp_path_factory.mktemp("hugging-face")
    measure_command.main(flags(demo, store, "--model", models.hf))
    return stored(store)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_gives_what_its_export_gives(models, demo, of_export, tmp_path, name):
    world_size, layout = LAYOUTS[name]
    argv = flags(demo, tmp_path, "--checkpoint", models.megatron, *layout)
    shown, *of_others = processes.run(measure, world_size, argv)
    # Nothing of Megatron's: a line for each side, and the table.
    assert [re.split("[: ]", line)[0] for line in shown.splitlines()[3:]] == ["metric", "mutual-knn", "shuffled"]
    assert len(shown.splitlines()) == 6 and "24 of 24 samples" in shown and not any(of_others)
    of_checkpoint = stored(tmp_path)
    assert of_checkpoint.keys() == of_export.keys() == {"vision", "text"}
    for side, layers in of_export.items():
        assert of_checkpoint[side].keys() == layers.keys() and len(layers) > 2
        for layer, expected in layers.items():
            # States of size 1: some tens of roundings of 6e-8, in another order.
            torch.testing.assert_close(
                of_checkpoint[side][layer], expected, atol=1e-6, rtol=1e-6, msg=f"{side} {layer}"
            )
        # The comparison can fail: a layer is not its neighbour.
        assert (layers["1"] - layers["2"]).abs().max() > 1e-2


@pytest.fixture(scope="module")
def of_projector(models, demo):
    """By transformers: each of the pairs' images through tower and projector, and the mean of its tokens."""
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(models.hf, dtype=torch.float32).model
    size = model.config.vision_config.image_size
    tiler = ImageTiler(image_size=size, image_aspect_ratio="square", grid_pinpoints=[])
    pairs = sample(open_pairs(demo / "data" / "captions", split="val"), PAIRS, 0)
    with torch.no_grad():
        states = model.vision_tower(
            torch.cat([tiler.tiles([pair.image()]) for pair in pairs]), output_hidden_states=True
        ).hidden_states
        return model.multi_modal_projector(states[model.config.vision_feature_layer]).mean(1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_images_after_the_projector_lie_in_the_decoders_space(models, demo, of_export, of_projector, tmp_path, name):
    world_size, layout = LAYOUTS[name]
    processes.run(measure, world_size, flags(demo, tmp_path, "--checkpoint", models.megatron, "--projected", *layout))
    found = stored(tmp_path)
    torch.testing.assert_close(found["projector"]["projector"], of_projector, atol=1e-6, rtol=1e-6)  # as above
    torch.testing.assert_close(found["text"]["0"], of_export["text"]["0"], atol=1e-6, rtol=1e-6)
    assert found["projector"]["projector"].shape == found["text"]["0"].shape  # one space: realign.py takes both


@pytest.mark.parametrize(
    "world_size, more, message",
    [
        (1, ("--checkpoint", "/nowhere"), "error: --checkpoint /nowhere is not a folder"),
        (2, (), "error: 2 processes and 1 of TP x PP: start torchrun with as many processes as the layout has"),
        (1, ("--no-such-flag",), "error: unrecognized arguments: --no-such-flag"),
    ],
)
def test_what_is_wrong_is_one_line(models, demo, tmp_path, world_size, more, message):
    checkpoint = () if "--checkpoint" in more else ("--checkpoint", models.megatron)
    with pytest.raises(processes.Failed) as failed:
        processes.run(measure, world_size, flags(demo, tmp_path, *checkpoint, *more))
    lines = [line for line in (str(failed.value) + failed.value.output).splitlines() if line.startswith("error:")]
    assert lines and lines[0].startswith(message)


def fail_in_the_middle(argv):
    from rsa_megatron.evaluation import megatron_features

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("made up")

    if torch.distributed.get_rank() == 0:
        megatron_features._run_decoder = out_of_memory
    return measure(argv)


def test_an_error_within_the_model_ends_the_first_rank_at_once(models, demo, tmp_path):
    argv = flags(demo, tmp_path, "--checkpoint", models.megatron, *PP)
    with pytest.raises(processes.Failed, match="rank 0:") as failed:
        processes.run(fail_in_the_middle, 2, argv, timeout=60)
    assert "error: --batch-size 7 is too large for the device: made up" in str(failed.value) + failed.value.output


def test_checkpoints_of_other_weights_have_other_features(models, demo, tmp_path):
    """Their metadata are alike; what is stored of one must not be taken for the other."""
    folder = models.megatron / "release"
    other = tmp_path / "release"
    shutil.copytree(folder, other)
    weights = max(other.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 1
    weights.write_bytes(content)
    assert fingerprint(other) != fingerprint(folder)
