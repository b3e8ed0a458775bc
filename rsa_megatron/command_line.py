"""What all commands have in common: one line for an error, a suggestion for a misspelt flag, and these exit statuses.

      0    done
      2    an error that the user can mend (a flag, a file, a model, a full disk): the last line is `error: ...`
    130    interrupted by Ctrl-C
    141    the reader of the output, such as head, has gone

Any other exception is a fault of this package: Python shows its traceback and ends with 1.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from rsa_megatron import screen

ERROR, INTERRUPTED, NO_READER = 2, 130, 141
# A flag, not a negative number. What follows a flag as its value never begins like this: argparse takes it for a flag.
_FLAG = re.compile(r"--?[A-Za-z]")


class Parser(argparse.ArgumentParser):
    """argparse's parser, without abbreviations; its errors are one line, and an unknown flag comes with the likely one."""

    def __init__(self, *args, allow_abbrev: bool = False, **options):
        super().__init__(*args, allow_abbrev=allow_abbrev, **options)
        #: whether flags that it does not know are left to another parser
        self.passes_unknown_flags = False

    def parse_known_args(self, args=None, namespace=None):
        # argparse would first name what is missing, and that may be what was misspelt.
        words = [str(word) for word in (sys.argv[1:] if args is None else args)]
        words = words[: words.index("--")] if "--" in words else words
        flags = [word.partition("=")[0] for word in words if _FLAG.match(word)]
        commands = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        if commands and (not words or (flags[:1] == words[:1] and flags[0] not in self._option_string_actions)):
            self.error(f"name one of {', '.join(commands[0].choices)}" + ", before its flags" * bool(words))
        unknown = [flag for flag in flags if not commands and flag not in self._option_string_actions]
        if unknown and not self.passes_unknown_flags:
            close = difflib.get_close_matches(unknown[0], self._option_string_actions, n=1, cutoff=0.7)
            likely = f"; did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown[:1] if close else unknown)}{likely}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End the process with one line."""
        exit_with_error(message if message.endswith("?") else f"{message}; see {self.prog} --help")


@contextmanager
def report_errors(
    *, end: Callable[[str], NoReturn] | None = None, interrupted: str = "interrupted; nothing was written"
) -> Iterator[None]:
    """End the process with one line where the user can mend what is wrong, and at Ctrl-C.

    Args:
        end: called with the message of an error; default: `exit_with_error`.
        interrupted: the line of Ctrl-C.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # main() ends quietly
    except (ValueError, OSError) as error:
        (end or exit_with_error)(format_error(error))
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            screen.show_last(f"\n{interrupted}" if sys.stderr.isatty() else interrupted)
        sys.exit(INTERRUPTED)


class ErrorExit(SystemExit):
    """Ends the process with status ERROR; its text is the line that has been printed."""

    def __init__(self, line: str):
        super().__init__(ERROR)
        self.line = line

    def __str__(self) -> str:
        return self.line


def exit_with_error(message: str) -> NoReturn:
    """End the process with one line `error: ...`; of a rank as rsa_megatron/ranks.py does."""
    message = " ".join(message.split())
    if "RANK" in os.environ:
        from rsa_megatron import ranks  # imports torch, which takes seconds

        ranks.exit_with_error(message)
    print(f"error: {message}", file=sys.stderr)
    raise ErrorExit(f"error: {message}")


def format_error(error: Exception) -> str:
    """Format an exception in one line; one of the system as "FILE: what is wrong"."""
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([*filter(None, [" -> ".join(names)]), error.strerror[0].lower() + error.strerror[1:]])
    return " ".join(str(error).split()) or type(error).__name__


def end_output() -> None:
    """Write what is buffered for the standard output.

    Raises:
        OSError: nothing takes it; what is left of it is dropped, so that Python does not try again and complain.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            error.filename = "standard output"
        raise
