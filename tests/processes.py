"""Real processes over gloo: a plain function, run on each rank, its results brought back.

The processes are forked from one that has Megatron loaded (warm.py): a launch takes half a second.
"""

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["warm"])


class Failed(RuntimeError):
    """A rank failed; the message is its traceback, `output` what it had printed."""

    def __init__(self, message: str, output: str):
        super().__init__(message)
        self.output = output


def run(function: Callable, world_size: int, *args, timeout: float = 120.0, kill_when: Callable | None = None) -> list:
    """Call function(*args) in `world_size` processes that form a gloo group; what each returned, by rank.

    Args:
        kill_when: given what rank 0 has printed so far; once it says True, all ranks are killed (SIGKILL) and the
            outputs of the ranks are returned instead.

    Raises:
        Failed: with the traceback of the rank that failed first, or naming the ranks that did not end.
    """
    with tempfile.TemporaryDirectory() as folder:
        # By file: as arguments of a process, each tensor would take a file descriptor.
        torch.save(args, Path(folder) / "arguments")
        processes = [
            _CONTEXT.Process(target=_rank, args=(function, rank, world_size, folder)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            killed = _wait(processes, folder, timeout, kill_when)
        finally:
            for process in processes:
                process.kill()
                process.join()
        if killed:
            return [_output(folder, rank) for rank in range(world_size)]
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def output() -> str:
    """What this rank has printed so far; for functions that `run` calls."""
    sys.stdout.flush(), sys.stderr.flush()
    return Path("/proc/self/fd/1").read_text()


def _output(folder, rank) -> str:
    path = Path(folder) / f"output-{rank}"
    return path.read_text() if path.exists() else ""


def _wait(processes, folder, timeout, kill_when) -> bool:
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        _raise_errors(folder)
        if kill_when and kill_when(_output(folder, 0)):
            return True
        if time.monotonic() > deadline:
            alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
            raise Failed(f"ranks {alive} did not end within {timeout:.0f} s", _output(folder, 0))
        time.sleep(0.02)
    _raise_errors(folder)
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise Failed(f"exit codes {codes}", _output(folder, 0))
    return False


def _raise_errors(folder):
    for error in sorted(Path(folder).glob("error-*"), key=lambda path: path.stat().st_mtime):
        rank = error.name.removeprefix("error-")
        raise Failed(f"rank {rank}:\n{error.read_text()}", _output(folder, rank))


def _rank(function, rank, world_size, folder):
    log = open(Path(folder) / f"output-{rank}", "w+")
    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
        )
        result = function(*torch.load(Path(folder) / "arguments", weights_only=False))
        torch.save(result, Path(folder) / f"result-{rank}.part")
        Path(folder, f"result-{rank}.part").rename(Path(folder) / f"result-{rank}")
        torch.distributed.barrier()
        # Ends at once: data workers, if there are any, would be waited for.
        os._exit(0)
    except BaseException:
        part = Path(folder) / f"part-{rank}"
        part.write_text(traceback.format_exc())
        part.rename(Path(folder) / f"error-{rank}")
        os._exit(1)
