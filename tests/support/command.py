"""Runs a command's main() in this process, as its users would in one of its own: what it prints, and how it ends."""

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ended:
    """As subprocess.run returns it."""

    returncode: int
    stdout: str
    stderr: str


def run(main: Callable, *arguments) -> Ended:
    """`main` takes the arguments in sys.argv; a SystemExit is its exit code, a message in it the last line of stderr."""
    argv, out, err, code = sys.argv, io.StringIO(), io.StringIO(), 0
    sys.argv = [main.__module__, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            code = 1
            print(end.code, file=err)
    finally:
        sys.argv = argv
    return Ended(code, out.getvalue(), err.getvalue())
