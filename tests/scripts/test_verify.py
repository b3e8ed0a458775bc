"""verify compares the whole way from pixels to loss, and names the first part that differs."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.environment import ROOT


def run(hf: Path, checkpoint: Path) -> subprocess.CompletedProcess:
    # In a process of its own: it makes Megatron run on the CPU, for good.
    command = [
        sys.executable,
        "-m",
        "checkpoint_conversion",
        "verify",
        "--hf",
        str(hf),
        "--checkpoint",
        str(checkpoint),
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_a_converted_checkpoint_is_the_same(models):
    result = run(models.hf, models.megatron)
    assert result.returncode == 0, result.stderr
    columns = [[line[:16].strip(), *line[16:].split()] for line in result.stdout.splitlines() if "image" in line[:16]]
    pixels = {name: figures[0] for name, *figures in columns}
    assert pixels == {
        "one image": "0.0e+00",
        "a wide image": "0.0e+00",
        "a tall image": "0.0e+00",
        "two images": "0.0e+00",
        "no image": "-",
    }
    assert all(float(figure) < 1e-5 for _, *figures in columns for figure in figures if figure != "-")
    assert "the same, to 1e-04 of the largest value" in result.stdout


pytestmark = pytest.mark.usefixtures("preloaded_commands")

# Once: neither is about the embeddings, which is what tying changes.
UNTIED = pytest.mark.parametrize("models", ["untied"], indirect=True)


@UNTIED
@pytest.mark.parametrize(
    "tensor, part",
    [
        ("vision_tower.vision_model.encoder.layers.2.mlp.fc2.bias", "vision features"),
        ("multi_modal_projector.linear_2.bias", "projected tokens"),
    ],
)
def test_the_first_part_that_differs_is_named(models, tmp_path, tensor, part):
    tensors = load_file(models.hf / "model.safetensors")
    tensors[tensor] += 0.01
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in models.hf.iterdir():
        (changed / file.name).symlink_to(file)
    (changed / "model.safetensors").unlink()
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    result = run(changed, models.megatron)
    assert result.returncode == 1
    assert f"error: {part} differ by" in result.stderr and "--tolerance 1e-04" in result.stderr


@UNTIED
def test_code_in_a_checkpoints_metadata_is_not_run(models, tmp_path):
    shutil.copytree(models.megatron, tmp_path / "bad")
    (tmp_path / "bad" / "release" / ".metadata").write_bytes(pickle.dumps(MakesAFolder(tmp_path / "made")))
    result = run(models.hf, tmp_path / "bad")
    assert result.returncode == 2 and "mkdir" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "made").exists()
    pickle.loads((tmp_path / "bad" / "release" / ".metadata").read_bytes())  # it would have been
    assert (tmp_path / "made").exists()


class MakesAFolder:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
