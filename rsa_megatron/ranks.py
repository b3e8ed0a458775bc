"""What the ranks of a job do as one: a line on the screen once, an error that ends all, one rank's result for all.

Until torch.distributed is initialised, a rank knows itself by torchrun's environment.
"""

import contextlib
import itertools
import os
import pickle
import platform
import select
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch.distributed

from rsa_megatron import screen

Result = TypeVar("Result")

SECONDS_FOR_THE_FIRST_RANK = 10.0
TIME_FOR_A_RESULT = timedelta(hours=1)

# The store of a job, which stays: the first rank may be the one that keeps it; and the results that have gone through it.
_stores: list[torch.distributed.Store] = []
_numbers = itertools.count()


def get_rank() -> int:
    return torch.distributed.get_rank() if get_group() else int(os.environ.get("RANK", "0"))


def count_ranks() -> int:
    return torch.distributed.get_world_size() if get_group() else int(os.environ.get("WORLD_SIZE", "1"))


def get_group() -> torch.distributed.ProcessGroup | None:
    """Return the group of all ranks; None until it is there."""
    return torch.distributed.group.WORLD if torch.distributed.is_initialized() else None


def print_once(message: str) -> None:
    """Print on the first rank only. (Megatron's print_rank_0 prints on every rank until the ranks know each other.)"""
    if get_rank() == 0:
        screen.show(message)


def exit_with_error(message: str) -> NoReturn:
    """End a rank with exit status 2 for what every rank finds: one line, and one from each other node, where it may differ."""
    rank = get_rank()
    if rank == 0:
        screen.show_last(f"error: {message}")
    elif int(os.environ.get("LOCAL_RANK", "0")) == 0:
        screen.show_last(f"error on {platform.node()}: {message}")
    elif "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PROCID" in os.environ:
        # These end all ranks as soon as one has ended: the first is left the time to say it. If it does not, it has not found it.
        time.sleep(SECONDS_FOR_THE_FIRST_RANK)
        screen.show_last(f"error on rank {rank}: {message}")
    sys.exit(2)


def exit_with_own_error(message: str) -> NoReturn:
    """End a rank with exit status 2 for what it may have found alone."""
    rank = get_rank()
    screen.show_last(f"error{f' on rank {rank}' if rank else ''}: {message}")
    sys.exit(2)


def print_error_once(message: str) -> None:
    """Print an error's line on the first rank, for ranks that are about to end anyway."""
    if get_rank() == 0:
        screen.show_last(f"error: {message}")


def gather_objects(value: object) -> list:
    """Return every rank's value, on all ranks."""
    values = [value]
    if get_group():
        values = [None] * count_ranks()
        torch.distributed.all_gather_object(values, value)
    return values


def end_process(message: str) -> NoReturn:
    """End a rank at once and from any of its threads, whatever the others wait for, with one line and exit status 1."""
    with contextlib.suppress(OSError, ValueError):  # who would read it may have gone
        screen.show_last(f"error: {message}; this run ends")
    os._exit(1)


def end_with_launcher() -> None:
    """End this rank when the torchrun that has started it is gone; do nothing where something else has.

    A torchrun that is told to end ends its ranks. One that is killed (kill -9, out of memory) cannot: they would train on, unseen,
    and write to a folder that the same command, started again, writes to as well. It is watched for in a thread: the rank itself
    may wait for others.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()


def _end_after(launcher: int) -> None:
    try:
        poll = select.poll()
        poll.register(os.pidfd_open(launcher), select.POLLIN)
        while os.getppid() == launcher and not poll.poll(60_000):
            pass
    except (AttributeError, OSError):  # a system without these calls, or it is gone already
        while os.getppid() == launcher:
            time.sleep(1)
    if int(os.environ.get("LOCAL_RANK", "0")):
        os._exit(1)
    end_process(f"torchrun (process {launcher}) is gone")


def run_on_first_rank(function: Callable[[], Result]) -> Result:
    """Return the first rank's result on all ranks, or raise its ValueError there."""
    found = [None, None]
    if get_rank() == 0:
        try:
            found = [function(), None]
        except (ValueError, OSError) as error:
            found = [None, str(error)]
    if get_group():
        torch.distributed.broadcast_object_list(found, src=0)
    elif count_ranks() > 1:
        found = _share_by_store(found)
    if found[1]:
        raise ValueError(found[1])
    return found[0]


def _share_by_store(found: list) -> list:
    """Return the first rank's `found` on all ranks, through the store by which they will find one another."""
    if not _stores:
        _stores.append(next(torch.distributed.rendezvous("env://"))[0])
    # (A torchrun that starts its ranks again goes on with the same store.)
    key = f"rsa_megatron/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_numbers)}"
    if get_rank() == 0:
        _stores[0].set(key, pickle.dumps(found))
        return found
    _stores[0].wait([key], TIME_FOR_A_RESULT)
    return pickle.loads(_stores[0].get(key))


def run_on_all_ranks(function: Callable[[], Result]) -> Result:
    """Return each rank's own result, or raise any rank's ValueError on all: none waits for one that has ended."""
    found, fault = None, None
    try:
        found = function()
    except (ValueError, OSError) as error:
        fault = str(error)
    faults = gather_objects(fault)
    if any(faults):
        raise ValueError(next(fault for fault in faults if fault))
    return found
