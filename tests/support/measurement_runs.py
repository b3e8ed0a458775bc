"""rsa-megatron measure on a checkpoint, and the features that it stored."""

import sys

import torch
from safetensors.torch import load_file

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
    sys.argv = ["rsa-megatron measure"]
    try:
        measure_command.main(argv)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(processes.output()) from end
    return processes.output()


def stored(folder) -> dict[str, dict[str, torch.Tensor]]:
    """Each side's layers."""
    found = {}
    for part in sorted(folder.rglob("part-*.safetensors")):
        found[part.parent.name.rsplit("-", 1)[1]] = load_file(part)
    return found
