"""An exported model captions a scene with transformers, shown as it was trained."""

import subprocess
import sys

import caption_image
import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from checkpoint_conversion import forward_comparison
from tests.support import tiny_hf
from tests.support.environment import ROOT

pytestmark = pytest.mark.usefixtures("preloaded_commands")


def test_the_script_prints_a_caption_beside_the_true_one(demo, tmp_path):
    hf = tiny_hf.write(tmp_path / "hf", demo / "tokenizer", tied=True)
    command = [
        sys.executable,
        ROOT / "examples" / "demo" / "caption_image.py",
        "--hf",
        hf,
        "--data",
        demo / "data" / "captions",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    true, ours = result.stdout.splitlines()[:2]
    _, caption = caption_image.held_out_scene(demo / "data" / "captions", 0)
    assert true == f"true caption: {caption}" and ours.startswith("transformers: ")
    result = subprocess.run([*command, "--index", "10000"], capture_output=True, text=True)
    assert result.returncode == 1 and "has no held-out scene 10000" in result.stderr


@pytest.fixture(scope="module")
def model(demo, tmp_path_factory):
    hf = tiny_hf.write(tmp_path_factory.mktemp("caption") / "hf", demo / "tokenizer", tied=True)
    return LlavaOnevisionForConditionalGeneration.from_pretrained(hf, dtype=torch.float32), tiny_hf.load_processor(hf)


def test_the_base_tile_is_the_first_of_the_processors(model):
    """The prompt of stage 1 is the beginning of transformers' own: the base tile's tokens come first."""
    llava, processor = model
    picture = forward_comparison.make_picture(80, 60)
    base = caption_image.base_tile(llava, processor, picture)["inputs_embeds"]
    inputs = caption_image.tiles(processor, picture)
    with torch.no_grad():
        (packed,) = llava.get_image_features(
            **{name: inputs[name] for name in ("pixel_values", "image_sizes")}
        ).pooler_output
    assert base.shape == (1, 16, 60) and len(packed) > 16
    assert torch.allclose(base[0], packed[:16], atol=1e-6)  # another batch of tiles: the last bit may differ
    assert not torch.allclose(base[0], packed[1:17], atol=1e-2)


def test_a_caption_ends_with_its_line(model):
    llava, processor = model
    for inputs in (
        caption_image.base_tile(llava, processor, forward_comparison.make_picture(80, 60)),
        caption_image.tiles(processor, forward_comparison.make_picture(80, 60)),
    ):
        text = caption_image.describe(llava, processor, inputs)
        assert "\n" not in text and "<image>" not in text
