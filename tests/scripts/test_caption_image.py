"""An exported model captions a scene with transformers. (That it is shown as it was trained: test_trained_export.py.)"""

import subprocess
import sys

import caption_image
import pytest

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
