"""Runs examples/pretrain_llava_rsa.py on the tiny model, as a user would, and reads its log."""

import contextlib
import io
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from tests.support import processes, tiny


def run(
    world_size: int,
    demo: Path,
    *flags,
    data: Path | None = None,
    sabotage=None,
    without: tuple[str, ...] = (),
    **options,
) -> list[str]:
    """The script's output on each rank.

    `data`: another data set than the demo's captions; `without`: flags that are left to their defaults; options: processes.run.
    """
    argv = _tiny(demo, data or demo / "data" / "captions")
    for flag in without:
        place = argv.index(flag)
        del argv[place : place + 2]
    argv += map(str, flags)
    return processes.run(_main, world_size, argv, sabotage, **options)


def parse_errors(demo: Path, command_lines: list, *, world_size: int = 2) -> list[str]:
    """What the script says to each command line before anything is built: its `error:` line, or "" where it takes it.

    One process reads them all, as rank 0 of so many.
    """
    data = demo / "data" / "captions"
    runs = [([*_tiny(demo, data), *map(str, flags)], None) for flags in command_lines]
    (found,) = processes.run(parse_each, 1, runs, world_size)
    return [line if isinstance(line, str) else "" for line in found]


def error_line(world_size: int, demo: Path, *flags) -> str:
    """The one `error:` line of a run that ends with it, on all its ranks."""
    with pytest.raises(processes.Failed) as failed:
        run(world_size, demo, *flags)
    (line,) = [line for line in failed.value.output.splitlines() if re.search("error: ", line)]
    return line


def parse_each(runs: list[tuple[list[str], dict | None]], world_size: int = 1) -> list:
    """For processes.run: of each command line (and the recipe in the place of --stage's, or None) what parse() makes of it,
    Megatron's arguments by name and the RSAConfig; or the line that it ends with."""
    import pretrain_llava_rsa
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.training.global_vars import unset_global_variables

    tiny.register()
    os.environ["WORLD_SIZE"] = str(world_size)
    found = []
    for argv, settings in runs:
        sys.argv, rsa = ["pretrain_llava_rsa.py", *argv], pretrain_llava_rsa.RSAPlugin()
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                found.append((vars(pretrain_llava_rsa.parse(rsa, settings=settings)), rsa.config))
        except SystemExit as end:
            assert end.code == 2, end
            (line,) = said.getvalue().splitlines()
            found.append(line)
        unset_global_variables()
        unset_num_microbatches_calculator()
    return found


def _tiny(demo: Path, data: Path) -> list[str]:
    return [
        "--model",
        "tiny",
        "--seq-length",
        "128",
        "--log-interval",
        "1",
        "--train-iters",
        "6",
        "--global-batch-size",
        "8",
        "--shuffle-buffer-size",
        "8",  # not 1000: what it holds is read before the first iteration
        "--data-path",
        str(data),
        "--tokenizer-model",
        str(demo / "tokenizer"),
    ]


def _main(argv, sabotage) -> str:
    import pretrain_llava_rsa

    tiny.register()
    if sabotage:
        sabotage()
    sys.argv = ["pretrain_llava_rsa.py", *argv]
    try:
        pretrain_llava_rsa.main()
    except SystemExit as end:  # Megatron's way to end at --exit-interval
        if end.code:
            raise
    return processes.output()


def iterations(outputs: list[str]) -> dict[int, dict[str, str]]:
    """The figures of each iteration's log line, as printed; of the rank that prints them."""
    output = next(output for output in outputs if re.search(r"iteration +\d+/", output))
    found = {}
    for line in re.findall(r"iteration +(\d+)/.*", output, flags=re.MULTILINE) and output.splitlines():
        match = re.search(r"iteration +(\d+)/", line)
        if match:
            found[int(match[1])] = {
                name.strip(): value for name, value in re.findall(r"\| ([a-z ]+): +([-+.\dEe]+|nan|inf) (?=\|)", line)
            }
    return found


def losses(outputs: list[str]) -> dict[int, tuple[str, ...]]:
    """What must not change from run to run: the figures of the loss, as printed."""
    names = ("lm loss", "rsa loss", "rsa pairs", "rsa dist vision", "rsa dist text", "grad norm")
    return {i: tuple(figures[name] for name in names if name in figures) for i, figures in iterations(outputs).items()}


def plain_tensors(folder, prefix: str | None = None) -> dict[str, torch.Tensor]:
    """A torch_dist checkpoint's tensors but the optimizer's, whole, by name; or those with a prefix."""
    reader = FileSystemReader(folder)
    tensors = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in reader.read_metadata().state_dict_metadata.items()
        if hasattr(item, "size") and (name.startswith(prefix) if prefix else not name.startswith("optimizer"))
    }
    load(tensors, storage_reader=reader)
    return tensors
