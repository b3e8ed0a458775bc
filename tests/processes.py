"""Real processes over gloo: a plain function, run on each rank, its results brought back.

The processes are forked from one that has Megatron loaded (warm.py): a launch takes half a second.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["warm"])


def run(function: Callable, world_size: int, *args, timeout: float = 120.0) -> list:
    """Call function(*args) in `world_size` processes that form a gloo group; what each returned, by rank.

    Raises:
        RuntimeError: with the traceback of the rank that failed first, or naming the ranks that did not end.
    """
    with tempfile.TemporaryDirectory() as folder:
        # By file: as arguments of a process, each tensor would take a file descriptor.
        torch.save(args, Path(folder) / "arguments")
        processes = [
            _CONTEXT.Process(target=_rank, args=(function, rank, world_size, folder))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, folder, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _wait(processes, folder, timeout):
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        errors = sorted(Path(folder).glob("error-*"), key=lambda path: path.stat().st_mtime)
        if errors:
            raise RuntimeError(f"{errors[0].name.replace('error', 'rank')}:\n{errors[0].read_text()}")
        if time.monotonic() > deadline:
            alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
            raise RuntimeError(f"ranks {alive} did not end within {timeout:.0f} s")
        time.sleep(0.02)
    for error in sorted(Path(folder).glob("error-*")):
        raise RuntimeError(f"{error.name.replace('error', 'rank')}:\n{error.read_text()}")
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"exit codes {codes}")


def _rank(function, rank, world_size, folder):
    log = open(Path(folder) / f"output-{rank}", "w")
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
        torch.distributed.destroy_process_group()
    except BaseException:
        part = Path(folder) / f"part-{rank}"
        part.write_text(traceback.format_exc())
        part.rename(Path(folder) / f"error-{rank}")
        os._exit(1)
