"""A checkpoint that cannot be read or written ends the run in one line with the remedy; the traceback is in the log."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from megatron.training import get_args

from rsa_megatron.screen import Explained

TRACKER = "latest_checkpointed_iteration.txt"


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
        return explain_unreadable(args.load, error)
    return (
        f"--pretrained-checkpoint {args.pretrained_checkpoint} cannot be loaded ({_find_reason(error)}): name another"
    )


def explain_unreadable(folder: str, error: BaseException) -> str:
    """Return the line for a checkpoint in `folder` that --load has failed on."""
    failed = get_args().ckpt_step or int(Path(folder, TRACKER).read_text())
    others = [str(iteration) for iteration in list_checkpoints(folder) if iteration != failed]
    others = f"; --ckpt-step takes another (there are {', '.join(others)})" if others else ""
    return f"--load {folder}: its checkpoint cannot be loaded ({_find_reason(error)}){others}"


def explain_save(iteration: int, error: BaseException) -> str:
    args = get_args()
    tracker = Path(args.save, TRACKER)
    reached = tracker.read_text().strip() if tracker.is_file() else None
    whole = f"that of iteration {reached} is whole" if reached else "there is no other"
    free = shutil.disk_usage(args.save).free / 1e9  # what a process that writes has met does not always come here
    return (
        f"--save {args.save}: the checkpoint of iteration {iteration} could not be written ({_find_reason(error)}; {free:.1f} GB are "
        f"free there); {whole}"
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
        if failures:
            error = next(iter(failures.values()))[0]
        elif error.__cause__ is not None:
            error = error.__cause__
        else:
            break
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
