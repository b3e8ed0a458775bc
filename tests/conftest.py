"""What all tests share: one thread a process, a small data set made once, and the warm process that others fork from."""

import os
import subprocess
import sys
from pathlib import Path

# Before torch is imported, here and in every process started from here: with several processes on two cores, a
# thread pool in each is slower than none, and forking is safe only without one.
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parent.parent
# The root first: its checkpoint_conversion, not the folder of that name here.
FOLDERS = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests")]
sys.path[:0] = FOLDERS
# The process that others fork from finds them here: early 3.12 does not hand sys.path on to it.
os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])

import pytest
import torch

torch.set_num_threads(1)


def make_demo(out: Path) -> Path:
    """The demo's data sets, small, and its tokenizer, as examples/prepare_demo.py writes them."""
    command = [sys.executable, str(ROOT / "examples" / "prepare_demo.py"), "--out", str(out),
               "--train", "240", "--validation", "64", "--shard-size", "60"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return out


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"))
