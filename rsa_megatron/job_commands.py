"""Command lines of jobs, their environment and the names of their folders."""

import os
import re
import sys
from pathlib import Path


def python(*words) -> tuple[str, ...]:
    """A script with its flags, or "-m", a module and its flags, in this interpreter."""
    return sys.executable, *map(str, words)


def torchrun(*words) -> tuple[str, ...]:
    """The same under torchrun, as one process."""
    return python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", *words)


def environment() -> dict[str, str]:
    """For jobs that run side by side on a core each."""
    root = Path(__file__).parents[1]  # beside this package lies checkpoint_conversion
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    # Memory is kept, not given back after every operation: of the time on a CPU that is a tenth, with AnyRes a quarter.
    memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_ARENA_MAX": "1"}
    # One thread a run: on two cores, two runs of one thread do more than one of two.
    return {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", **memory}


def folder_name(arm: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", arm.lower())
