"""rsa-megatron measure on a checkpoint: what it shows, and the features that it stored."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from rsa_megatron import screen
from rsa_megatron.cli import measure as measure_command
from tests.support import processes

PAIRS = 24


def flags(demo, store, *more) -> list[str]:
    options = {
        "--data": demo / "data" / "captions",
        "--split": "val",
        "--num-samples": PAIRS,
        "--seeds": 1,
        "--batch-size": 7,
        "--store": store,
        "--out": store / "x.jsonl",
        "--k": 5,
    }
    return [str(word) for option in options.items() for word in option] + list(map(str, more))


def measure(argv) -> str:
    """Measure; return what this rank has shown."""
    begins = os.lseek(1, 0, os.SEEK_CUR)
    sys.argv = ["rsa-megatron measure"]
    try:
        measure_command.main(argv)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(processes.output()) from end
    shown = screen._screen[0] if screen.is_redirected() else 1
    return Path(f"/proc/self/fd/{shown}").read_bytes()[begins:].decode()


def stored(folder) -> dict[str, dict[str, torch.Tensor]]:
    """Each side's layers."""
    found = {}
    for part in sorted(folder.rglob("part-*.safetensors")):
        found[part.parent.name.rsplit("-", 1)[1]] = load_file(part)
    return found
