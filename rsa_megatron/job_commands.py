"""Command lines of jobs, their environment and the names of their folders."""

import os
import re
import sys
from pathlib import Path


def python(*words) -> tuple[str, ...]:
    """Return the command of a script with its flags, or "-m", a module and its flags, in this interpreter."""
    return sys.executable, *map(str, words)


def torchrun(*words, processes: int = 1) -> tuple[str, ...]:
    """Return the same under torchrun."""
    return python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *words)


def get_checkpoint_flags(folder: Path, iterations: int) -> tuple:
    """Return flags for two checkpoints on the way, so that a run that is killed loses at most a third of itself."""
    return "--save", folder, "--load", folder, "--save-interval", -(-iterations // 3)


def get_evaluation_interval(iterations: int, times: int) -> int:
    """Return the interval for a number of evaluations, the end included.

    Megatron evaluates once more at the end: an interval that divides the iterations would do it twice there.
    """
    return iterations // times + 1


def environment(threads: int = 1) -> dict[str, str]:
    """Return the environment of jobs whose processes have `threads` threads each."""
    root = Path(__file__).parents[1]  # beside this package lies checkpoint_conversion
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    # Memory is held, not given back after every operation: of the time on a CPU that is a tenth, with AnyRes a quarter.
    memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_ARENA_MAX": "1"}
    # By default one thread a run: on two cores, two runs of one thread do more than one of two.
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}  # a log is no place for progress bars
    return {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, **quiet, **memory}


def folder_name(arm: str) -> str:
    """Return an arm's name in small letters, digits, dots and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", arm.lower())
