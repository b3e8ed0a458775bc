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


def run(hf: Path, checkpoint: Path, *flags: str) -> subprocess.CompletedProcess:
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
        *flags,
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
    assert "\noutputs: the same, to 1e-04 of the largest value\n" in result.stdout
    count = len(load_file(models.hf / "model.safetensors"))
    assert f"tensors: {count} of {count} the same, bit for bit\n" in result.stdout


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
    changed = change(models.hf, tmp_path / "changed", tensor, lambda values: values + 0.01)
    result = run(changed, models.megatron)
    assert result.returncode == 1
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f" tensors differ: {tensor} (" in error and f"; and {part} differ by" in error
    assert "--tolerance 1e-04" in error


@UNTIED
def test_rows_of_tokens_that_the_samples_lack_are_compared_too(models, tmp_path):
    """Outputs alone cannot show them: --outputs-only passes."""
    name = "language_model.model.embed_tokens.weight"
    changed = change(
        models.hf, tmp_path / "changed", name, lambda rows: rows[[*range(1030), 1031, 1030, *range(1032, 1043)]]
    )
    result = run(changed, models.megatron)
    assert result.returncode == 1 and "outputs: the same, to" in result.stdout
    assert (
        f"tensors differ: {name} (language_model.embedding.word_embeddings.weight): 2 of 1043 rows, 120 of"
        in result.stderr
    )
    result = run(changed, models.megatron, "--outputs-only")
    assert result.returncode == 0 and "tensors" not in result.stdout


def change(hf: Path, folder: Path, name: str, new) -> Path:
    """A folder with one other tensor."""
    tensors = load_file(hf / "model.safetensors")
    tensors[name] = new(tensors[name]).contiguous()
    folder.mkdir()
    for file in hf.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


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
