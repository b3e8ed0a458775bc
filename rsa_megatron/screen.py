"""The screen of a training run: what a person reads there. All else that a rank prints goes to a log file.

`begin()` sends the standard output and error of this process into a log: Megatron's list of arguments, warnings of libraries,
what data workers print. `show()` writes on the screen, and into the log. Without `begin()`, and with --verbose, nothing is
redirected.

    first rank   our lines, `error:` lines           screen and log
    last rank    Megatron's line of an iteration     screen and log
    every rank   everything else, tracebacks         log: SAVE/logs/rank-N.log, or a temporary file without --save

An exception that nobody caught is shown as one line, by the rank that failed first on its node; its traceback is in the log.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

#: file descriptors that were standard output and error, once these lead into the log
_screen: tuple[int, int] | None = None
_log: Path | None = None
_is_temporary = False

#: Seconds that a rank which lost another one leaves it to say why.
_PATIENCE = 3.0
#: What torch.distributed says on the ranks that another one has left.
_LOST_ANOTHER = (
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "ProcessGroupNCCL",
    "NCCL error",
    "timed out",
)


def begin() -> None:
    """Send what this process prints into a log from here on; not with --verbose or --help."""
    global _screen, _log, _is_temporary
    if _screen or not {"--verbose", "--help", "-h"}.isdisjoint(sys.argv):
        return
    _log, _is_temporary = Path(tempfile.mkdtemp(prefix="rsa-megatron-"), _name_file()), True
    _flush()
    _screen = os.dup(1), os.dup(2)
    _redirect(_log)
    sys.stdout.reconfigure(line_buffering=True)
    sys.excepthook = _end_with_exception
    end_at_signal(signal.SIGTERM)


def end_at_signal(number: int) -> None:
    """Let a signal end this process at once, with a line on the first rank: there is nothing to save yet."""
    process = os.getpid()

    def end(number, frame):
        if os.getpid() != process:  # a data worker: it ends with its parent
            return
        if os.environ.get("RANK", "0") == "0":
            show_from_handler(f"stopped by {signal.Signals(number).name} before training began")
        os._exit(128 + number)

    signal.signal(number, end)


def move_log(folder: Path) -> Path | None:
    """Go on with the log in `folder`, after what earlier runs have left there; return its file, None where nothing is redirected."""
    global _log, _is_temporary
    if not _screen:
        return None
    path = folder / _name_file()
    folder.mkdir(parents=True, exist_ok=True)
    _flush()
    with _log.open("rb") as old, path.open("ab") as new:
        shutil.copyfileobj(old, new)
    _redirect(path)
    shutil.rmtree(_log.parent)
    _log, _is_temporary = path, False
    return path


def end() -> None:
    """Remove a temporary log, as a run that ended well without --save needs none."""
    if _screen and _is_temporary:
        shutil.rmtree(_log.parent, ignore_errors=True)


def show(line: str) -> None:
    """Write a line on the screen, and into the log."""
    print(line, flush=True)
    if _screen:
        _write(_screen[0], line)


def show_from_handler(line: str) -> None:
    """Write a line on the screen from a signal handler, which must not print: what it interrupts may be printing."""
    _write(_screen[0] if _screen else 1, line)


def show_last(line: str) -> None:
    """Write the line that a run ends with on the standard error, and into the log.

    torchrun ends with a report of its own, of some twenty lines: the line comes after it, from a process that waits for that.
    """
    print(line, file=sys.stderr, flush=True)
    errors = _screen[1] if _screen else None
    launcher = os.getppid()
    # As process 1, or where it starts the ranks again, torchrun has no end that could be waited for.
    if "TORCHELASTIC_RUN_ID" in os.environ and launcher > 1 and os.environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":
        if errors is not None:
            _write_after(launcher, errors, line)
    elif errors is not None:
        _write(errors, line)


def _write_after(launcher: int, descriptor: int, line: str) -> None:
    try:
        ends = os.pidfd_open(launcher)
    except OSError:  # it has ended, or the system has no such thing
        return _write(descriptor, line)
    if os.fork():
        return None
    # The child does nothing but wait: another thread of the parent may hold any lock.
    os.setsid()
    select.select([ends], [], [])
    _write(descriptor, line)
    os._exit(0)


def _end_with_exception(kind: type, error: BaseException, trace) -> None:
    traceback.print_exception(kind, error, trace)
    _flush()
    if issubclass(kind, KeyboardInterrupt):
        text = "stopped by Ctrl-C before training began"
    else:
        said = " ".join(str(error).split())
        text = f"error: {kind.__name__}{': ' * bool(said)}{said[:300]}; the traceback is in {_log}"
        if any(words in said for words in _LOST_ANOTHER):
            time.sleep(_PATIENCE)
    if _is_first_to_fail():
        show_last(text)


def _is_first_to_fail() -> bool:
    """Return whether no other rank of this launch on this node has said why it ends; without torchrun each rank says it."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt_0/RANK/error.json, in a folder of this launch
    if not error_file:
        return True
    try:
        Path(error_file).parents[1].joinpath("said").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def _name_file() -> str:
    return f"rank-{os.environ.get('RANK', '0')}.log"


def _redirect(path: Path) -> None:
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _write(descriptor: int, line: str) -> None:
    with contextlib.suppress(OSError):  # a reader that has gone; the log has the line
        os.write(descriptor, f"{line}\n".encode())
