"""Imported before torch, by conftest.py and by what runs without pytest: where the code lies, and one thread a process."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BENCHMARKS = ROOT / "benchmarks"
#: the interpreter itself, where a test starts its commands in one that has loaded them (preloaded.py)
PYTHON = sys.executable

# In every process started from here too: with several on two cores, a thread pool in each is slower than none, and
# forking is safe only without one.
os.environ["OMP_NUM_THREADS"] = "1"
_FOLDERS = [str(ROOT), *(str(EXAMPLES / folder) for folder in (".", "demo", "reproduce", "revision"))]
sys.path[:0] = _FOLDERS
# The process that ranks are forked from finds them here: early 3.12 does not hand sys.path on to it.
os.environ["PYTHONPATH"] = os.pathsep.join([*_FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])

import torch

torch.set_num_threads(1)
