"""A checkpoint that cannot be read or written ends the run in one line with the remedy; the traceback is in the log."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from megatron.training import get_args
from torch.distributed.checkpoint import FileSystemReader

from rsa_megatron import screen
from rsa_megatron.atomic import find_full_disk
from rsa_megatron.screen import Explained

TRACKER = "latest_checkpointed_iteration.txt"

#: Bytes: with less free a disk counts as full, where what has failed does not say so. A checkpoint of any model needs more.
_FULL = 16e6


@contextlib.contextmanager
def explained_by(explain: Callable[[BaseException], str]) -> Iterator[None]:
    """Raise Explained, with the line that `explain` makes of it, for whatever reading or writing a checkpoint has met."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.distributed.DistError, SystemExit, KeyboardInterrupt):
        raise  # no fault of the checkpoint's
    except BaseException as error:  # as torch's CheckpointException is
        raise Explained(explain(error)) from error


def explain_load(error: BaseException) -> str:
    args = get_args()
    if list_checkpoints(args.load):
        return explain_unreadable(args, error)
    return (
        f"--pretrained-checkpoint {args.pretrained_checkpoint} cannot be loaded ({_find_reason(error)}): name another"
    )


def explain_unreadable(args, error: BaseException) -> str:
    """Return the line for a checkpoint in --load that could not be read."""
    iteration = args.ckpt_step or int(Path(args.load, TRACKER).read_text())
    return _explain_damage(args.load, iteration, f"cannot be loaded ({_find_reason(error)})")


def check_whole(args) -> None:
    """Raise ValueError where files of the checkpoint that the run begins with are missing or cut off: before anything is built."""
    for flag, folder in (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        file = Path(folder, TRACKER) if folder else None
        if not (file and file.is_file()):
            continue
        said = (str(args.ckpt_step) if args.ckpt_step and flag == "--load" else file.read_text()).strip()
        fault = find_fault(Path(folder, f"iter_{int(said):07d}" if said.isdecimal() else said))
        if fault and said.isdecimal() and flag == "--load":
            raise ValueError(_explain_damage(folder, int(said), f"is damaged: {fault}"))
        if fault:
            raise ValueError(f"{flag} {folder}: its checkpoint is damaged: {fault}; restore the file, or name another")


def find_fault(checkpoint: Path) -> str | None:
    """Name the first file of a torch_dist checkpoint that is missing or shorter than what lies in it; None where all are whole."""
    if not any(any(checkpoint.glob(name)) for name in ("metadata.json", ".metadata", "*.distcp")):
        return None  # of Megatron's older format, or not there
    named = checkpoint.name
    for name in ("metadata.json", ".metadata"):
        if not (checkpoint / name).is_file():
            return f"{named}/{name} is missing"
    try:
        stored = FileSystemReader(checkpoint).read_metadata().storage_data.values()
    except Exception as error:  # whatever unpickling comes upon
        return f"{named}/.metadata cannot be read ({_find_reason(error)})"
    ends: dict[str, int] = {}
    for piece in stored:
        ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
    for name, end in sorted(ends.items()):
        file = checkpoint / name
        if not file.is_file():
            return f"{named}/{name} is missing"
        if (size := file.stat().st_size) < end:
            return f"{named}/{name} has {size:,} of its {end:,} bytes"
    return None


def _explain_damage(folder: str, iteration: int, fault: str) -> str:
    whole = [
        other
        for other in list_checkpoints(folder)
        if other != iteration and not find_fault(Path(folder, f"iter_{other:07d}"))
    ]
    if whole:
        remedy = f"that of iteration {whole[-1]} is whole: --ckpt-step {whole[-1]} goes on from there"
    else:
        remedy = "there is no other that is whole: restore its files, or name another folder"
    return f"--load {folder}: its checkpoint of iteration {iteration} {fault}; {remedy}"


def explain_save(iteration: int, error: BaseException) -> str:
    args = get_args()
    tracker = Path(args.save, TRACKER)
    reached = tracker.read_text().strip() if tracker.is_file() else None
    whole = f"that of iteration {reached} is whole" if reached else "there is no other"
    free = shutil.disk_usage(args.save).free
    reason = find_full_disk(error)
    if reason is None and free < _FULL:  # what a process that writes has met does not always come here
        reason = os.strerror(errno.ENOSPC).lower()
    return (
        f"--save {args.save}: the checkpoint of iteration {iteration} could not be written ({reason or _find_reason(error)}; "
        f"{free / 1e9:.1f} GB are free there); {whole}"
    )


def list_checkpoints(folder: str | None) -> list[int]:
    """List the iterations of the checkpoints in a folder; of torch_dist those that were written to their end."""
    found = Path(folder).glob("iter_*") if folder else ()
    whole = (path for path in found if (path / "metadata.json").is_file() or any(path.glob("mp_rank_*")))
    return sorted(int(path.name[5:]) for path in whole if path.name[5:].isdecimal())


def _find_reason(error: BaseException) -> str:
    """Return what went wrong at first, in a line: of ranks that failed together, the first one's error."""
    while True:
        failures = getattr(error, "failures", None)  # torch.distributed.checkpoint's CheckpointException: of each rank
        if failures == {}:
            return screen.ANOTHER_RANK
        if failures:
            error = next(iter(failures.values()))[0]
        elif error.__cause__ is not None:
            error = error.__cause__
        else:
            break
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
