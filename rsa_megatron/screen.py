"""The screen of a run on Megatron: what a person reads there. All else that a rank prints goes to a log file.

`begin()` sends the standard output and error of this process into a log: Megatron's list of arguments, warnings of libraries,
what data workers print. `show()` writes on the screen, and into the log. Without `begin()`, and with --verbose, nothing is
redirected.

    first rank   our lines, `error:` lines           screen and log
    last rank    Megatron's line of an iteration     screen and log
    every rank   everything else, tracebacks         log: SAVE/logs/rank-N.log; without --save a temporary file

An exception that nobody caught is shown as one line, by the rank that failed first on its node; its traceback is in the log. So is
Ctrl-C while modules are imported.

The line that a run ends with comes after torchrun's report, so that it is the last one. torchrun may be gone by then, and with it, under
Slurm or in a container, all that has been started with it: so the line also stands in the report itself, as the cause of the failure.
"""

import atexit
import contextlib
import json
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO

#: file descriptors that were standard output and error, once these lead into the log
_screen: tuple[int, int] | None = None
#: where these lead: a file without a name until the run is known to begin, or fails
_log: IO[bytes] | None = None
#: where the log of a run that fails before `move_log` is kept; None: with the temporary files
_preferred_log: Path | None = None

#: whether an exception ended this process: then a temporary log stays
_has_failed = False

#: Seconds that a rank which lost another one leaves it to say why.
_PATIENCE = 3.0
#: What a rank says that ends because of another one, and knows no more.
ANOTHER_RANK = "another rank says why"
#: What torch.distributed says on the ranks that another one has left.
_LOST_ANOTHER = (
    ANOTHER_RANK,
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "ProcessGroupNCCL",
    "NCCL error",
    "timed out",
)


class Explained(Exception):
    """An exception whose text says all that a person needs, and has another as its cause."""


#: Exceptions that are shown without their names, and whole: FatalSampleError is Energon's for a fault of the data.
_SENTENCES = ("Explained", "FatalSampleError")


def begin() -> None:
    """Send what this process prints into a log from here on (not with --verbose), and let Ctrl-C end it in one line."""
    global _screen, _log
    if _screen:
        return
    # Also where it is ignored, as in a background job of a script: torchrun sends it on all the same, and waits.
    signal.signal(signal.SIGINT, _end_at_ctrl_c)
    sys.excepthook = _end_with_exception
    if "--verbose" in sys.argv:
        return
    _flush()
    _screen = os.dup(1), os.dup(2)
    _log = tempfile.TemporaryFile("w+b")
    _redirect(_log)
    sys.stdout.reconfigure(line_buffering=True)


def move_log(path: Path) -> None:
    """Go on with the log in the file `path`, after what earlier runs have left there."""
    global _log
    path.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    file = path.open("ab")
    _log.seek(0)
    shutil.copyfileobj(_log, file)
    file.flush()
    _redirect(file)
    _log = file


def prefer_log(path: Path) -> None:
    """Keep the log in the file `path` should the run fail before its log has a name."""
    global _preferred_log
    _preferred_log = path


def name_log() -> str:
    """Give the log a name in the folder of temporary files, where it stays unless the run ends well."""
    name = _get_named_log()
    atexit.register(_remove_after_success, name)
    return name


def is_redirected() -> bool:
    return _screen is not None


def get_width() -> int:
    """Return the columns of the screen; 80 where it is none."""
    try:
        return os.get_terminal_size(_screen[0] if _screen else 1).columns or 80
    except OSError:
        return 80


def show(line: str) -> None:
    """Write a line on the screen, and into the log."""
    if _screen:
        _write(_screen[0], line)
    _log_line(line, sys.stdout)


def show_aside(line: str) -> None:
    """Write a line beside the results, on the standard error, and into the log."""
    if _screen:
        _write(_screen[1], line)
    _log_line(line, sys.stderr)


def show_from_handler(line: str) -> None:
    """Write a line on the screen from a signal handler, which must not print: what it interrupts may be printing."""
    _write(_screen[0] if _screen else 1, line)


def show_last(line: str) -> None:
    """Write the line that a run ends with on the standard error, and into the log.

    torchrun ends with a report of its own, of some twenty lines: the line comes after it, from a process that waits for that. It may
    come after torchrun's end too, where nobody may read it any more: the report has it as well.
    """
    _report_to_torchrun(line.removeprefix("error: "))
    _log_line(line, sys.stderr)
    if _screen:
        _write_last(_screen[1], line)


def _report_to_torchrun(line: str) -> None:
    """Leave the line where torchrun looks for why a rank has failed, in torch.distributed.elastic's format; its report shows it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file or os.path.exists(file):
        return
    said = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}
    with contextlib.suppress(OSError):
        # Under its name only when it is whole: torchrun does not survive half of one.
        unfinished = f"{file}.unfinished"
        Path(unfinished).write_text(json.dumps(said))
        os.replace(unfinished, file)


def _write_last(descriptor: int, line: str) -> None:
    launcher = os.getppid()
    if _is_torchrun(launcher):
        _write_after(launcher, descriptor, line)
    else:
        _write(descriptor, line)


def _is_torchrun(process: int) -> bool:
    """Return whether a process is a torchrun whose end can be waited for: not process 1, and it does not start ranks again."""
    if process == 1 or os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0":
        return False
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    return b"torchrun" in command or b"torch.distributed.run" in command


def _write_after(launcher: int, descriptor: int, line: str) -> None:
    try:
        ends = os.pidfd_open(launcher)
    except (AttributeError, OSError):  # it has ended, or the system has no such thing
        return _write(descriptor, line)
    if os.fork():
        return None
    # The child does nothing but wait, and never goes on as a rank: another thread of the parent may hold any lock.
    try:
        os.setsid()
        poll = select.poll()
        poll.register(ends, select.POLLIN)
        poll.poll()
        _write(descriptor, line)
    finally:
        os._exit(0)


def _end_at_ctrl_c(number: int, frame) -> None:
    """End this process by the signal, as it would end without a handler, and say so.

    Not by an exception: what is imported just then could catch it, or print it.
    """
    signal.signal(number, signal.SIG_DFL)
    if _is_first_to_fail():
        _write_last(_screen[1] if _screen else 2, "stopped by SIGINT")
    os.kill(os.getpid(), number)


def _end_with_exception(kind: type, error: BaseException, trace) -> None:
    global _has_failed
    _has_failed = True
    is_ctrl_c = issubclass(kind, KeyboardInterrupt)
    if not _screen and not is_ctrl_c:  # --verbose
        return sys.__excepthook__(kind, error, trace)
    if _screen:
        with contextlib.suppress(OSError):  # on a full disk the line is all that there can be
            traceback.print_exception(kind, error, trace)
            _flush()
    if is_ctrl_c:
        text = "stopped by SIGINT"
    else:
        text = f"error: {_describe(kind, error)}; the traceback is in {_get_named_log()}"
        said = str(error)
        if any(words in said for words in _LOST_ANOTHER):
            time.sleep(_PATIENCE)
    if _is_first_to_fail():
        show_last(text)


def _describe(kind: type, error: BaseException) -> str:
    """Return what an exception says, in a line: of one from a data worker, what it said there."""
    if kind.__name__ not in _SENTENCES:
        said = " ".join(_take_out_of_worker(kind, str(error)).split())
        return f"{kind.__name__}{': ' * bool(said)}{said[:300]}"
    while isinstance(error.__cause__, kind):  # Energon raises it again, in words of its own around it
        error = error.__cause__
    return " ".join(_take_out_of_worker(kind, str(error)).split())


def _take_out_of_worker(kind: type, said: str) -> str:
    """Return what an exception of this kind said first in a data worker; torch makes one of it whose text is the worker's traceback."""
    if not re.match(r"Caught \w+ in .*\.\nOriginal Traceback", said):
        return said
    # Each ends after its last frame, whose lines are indented, in "module.Name: what it says".
    tracebacks = re.split(r"\n\n(?:The above exception was|During handling of the above).*\n\n", said)
    ends = [re.split(r"^  File .*\n(?: .*\n)*", each, flags=re.MULTILINE)[-1].strip() for each in tracebacks]
    for end in ends if kind.__name__ in _SENTENCES else reversed(ends):
        name, colon, text = end.partition(": ")
        if colon and name.rpartition(".")[2] == kind.__name__:
            return text
    return ends[-1]


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


def _remove_after_success(name: str) -> None:
    if not _has_failed:
        with contextlib.suppress(OSError):
            os.unlink(name)


def _get_named_log() -> str:
    """Return the log's file; what has no name gets that of `prefer_log`, or one in the folder of temporary files."""
    if isinstance(_log.name, str):
        return _log.name
    if _preferred_log:
        with contextlib.suppress(OSError):
            move_log(_preferred_log)
            return str(_preferred_log)
    descriptor, name = tempfile.mkstemp(prefix="rsa-megatron-", suffix=".log")
    os.close(descriptor)
    move_log(Path(name))
    return name


def _redirect(file: IO[bytes]) -> None:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _log_line(line: str, stream) -> None:
    """Print a line; where it leads into a log, a full disk must not end a run nor keep a line from the screen."""
    with contextlib.suppress(OSError) if _screen else contextlib.nullcontext():
        print(line, file=stream, flush=True)


def _write(descriptor: int, line: str) -> None:
    with contextlib.suppress(OSError):  # a reader that has gone; the log has the line
        os.write(descriptor, f"{line}\n".encode())
