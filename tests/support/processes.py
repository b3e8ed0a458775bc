"""Real processes over gloo: a plain function, run on each rank, its results brought back.

The processes are forked from one that has Megatron loaded (warm.py): a launch takes half a second.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.warm"])


class Failed(RuntimeError):
    """A rank failed; the message is its traceback, `output` what it had printed."""

    def __init__(self, message: str, output: str):
        super().__init__(message)
        self.output = output


def run(
    function: Callable,
    world_size: int,
    *args,
    timeout: float = 120.0,
    kill_when: Callable | None = None,
    kill_with: signal.Signals = signal.SIGKILL,
) -> list:
    """Call function(*args) in `world_size` processes that form a gloo group; what each returned, by rank.

    Args:
        kill_when: given what all ranks have printed so far; once it says True, all ranks and their children are sent
            `kill_with`.
        kill_with: by default the end: what the ranks had printed is returned. Another signal they answer as they like.

    Raises:
        Failed: with the traceback of the rank that failed first, or naming the ranks that did not end.
    """
    sys.audit("tests.processes.run")  # refused in a unit test
    with tempfile.TemporaryDirectory() as folder:
        # By file: as arguments of a process, each tensor would take a file descriptor.
        torch.save(args, Path(folder) / "arguments")
        processes = [
            CONTEXT.Process(target=_rank, args=(function, rank, world_size, folder)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            killed = _wait(processes, folder, timeout, kill_when, kill_with)
        finally:
            for process in processes:
                _kill_with_children(process)
        if killed:
            return [_output(folder, rank) for rank in range(world_size)]
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _kill_with_children(process):
    # A rank leads a process group: data workers and Megatron's checkpoint writers are in it.
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.join()


_kept = []


def kept(iterator):
    """The iterator, held until this rank ends at once: one that is let go waits five seconds for each data worker."""
    _kept.append(iterator)
    return iterator


def output() -> str:
    """What this rank has printed so far; for functions that `run` calls."""
    sys.stdout.flush(), sys.stderr.flush()
    return Path("/proc/self/fd/1").read_text()


def _output(folder, rank) -> str:
    path = Path(folder) / f"output-{rank}"
    return path.read_text() if path.exists() else ""


def _wait(processes, folder, timeout, kill_when, kill_with) -> bool:
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        _raise_errors(folder, processes)
        if kill_when and kill_when("".join(_output(folder, rank) for rank in range(len(processes)))):
            if kill_with == signal.SIGKILL:
                return True
            kill_when = None
            for process in processes:
                os.killpg(process.pid, kill_with)  # data workers too, as Slurm does it
        if time.monotonic() > deadline:
            alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
            raise Failed(f"ranks {alive} did not end within {timeout:.0f} s", _output(folder, 0))
        time.sleep(0.02)
    _raise_errors(folder, processes)
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise Failed(f"exit codes {codes}", _output(folder, 0))
    return False


def _raise_errors(folder, processes):
    if not list(Path(folder).glob("error-*")):
        return
    # The others fail too, or wait for this one: give them a moment to say what they have to say.
    deadline = time.monotonic() + 1
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
    first = min(Path(folder).glob("error-*"), key=lambda path: path.stat().st_mtime)
    rank = first.name.removeprefix("error-")
    raise Failed(f"rank {rank}:\n{first.read_text()}", "".join(_output(folder, r) for r in range(len(processes))))


def _rank(function, rank, world_size, folder):
    os.setpgrp()
    log = open(Path(folder) / f"output-{rank}", "w+")
    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
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
