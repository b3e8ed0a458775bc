"""A disk that fills up during a conversion leaves nothing half-written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint_conversion import torch_dist_save
from tests.support import hf_checkpoints
from tests.support.hf_checkpoints import there


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, direction):
    """The kernel refuses to let a file grow, in the middle of it, as it does when a disk is full."""
    hf_checkpoints.write(tmp_path / "hf")
    there(tmp_path / "hf", tmp_path / "megatron")
    source = ["--hf", tmp_path / "hf"] if direction == "hf-to-megatron" else ["--checkpoint", tmp_path / "megatron"]
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "from checkpoint_conversion.__main__ import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, direction, *source, "--out", tmp_path / "out"]
    root = str(Path(torch_dist_save.__file__).parents[1])
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root})
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"error: --out {tmp_path}/out: file too large; nothing is left there" in result.stderr
    assert not list(tmp_path.glob("out*"))
