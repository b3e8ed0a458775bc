"""What a training run shows of Megatron's output, and how it ends at a signal: screen.py, applied to pretrain().

Shown are Megatron's line of an iteration and of an evaluation, and why the program exits.
"""

import argparse
import functools
import os
import re
import signal
from pathlib import Path

from megatron.training import training
from megatron.training.utils import is_last_rank

from rsa_megatron import screen
from rsa_megatron.ranks import get_rank, print_once


def add_arguments(group) -> None:
    group.add_argument(
        "--verbose", action="store_true", help="show all that Megatron and the libraries print, instead of a log file"
    )


def shorten_help(parser, ours: set[str]) -> None:
    """Let --help print this project's flags alone, and --help-megatron all."""
    parser.usage = "torchrun [of torchrun] examples/pretrain_llava_rsa.py [flags of this script and of Megatron]"
    parser.formatter_class = functools.partial(argparse.HelpFormatter, width=screen.get_width() - 2)
    parser.print_help = lambda file=None: print_once(parser.format_help())  # standard output is the log's by now
    everything = parser.format_help
    parser.add_argument(
        "--help-megatron", action=_PrintHelp, format_help=everything, help="print Megatron's flags too, and exit"
    )
    groups = [group for group in parser._action_groups if group.title in ours]

    def format_help() -> str:
        formatter = parser._get_formatter()
        formatter.add_usage(parser.usage, [], [])
        for group in groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        formatter.add_text(
            "Every flag of Megatron works as well and overrides what --model and --stage set: see --help-megatron."
        )
        return formatter.format_help()

    parser.format_help = format_help


class _PrintHelp(argparse.Action):
    """Prints all flags."""

    def __init__(self, *args, format_help, **kwargs):
        super().__init__(*args, nargs=0, **kwargs)
        self.format_help = format_help

    def __call__(self, parser, *args):
        print_once(self.format_help())
        parser.exit()


def open_log(args) -> None:
    """Keep the log beside the checkpoints of --save, or with the temporary files, and say where it is.

    Before the ranks meet: a run may hang there, or be killed.
    """
    if not screen.is_redirected():
        return
    log = _choose_log(args)
    if log:
        screen.move_log(log)
    else:
        log = screen.name_log()
    print_once(f"log: {log} (Megatron's settings and what else is printed; --verbose shows it here)")


def choose_log_of_failure(args) -> None:
    """As soon as --save is known: the traceback of a run that fails before `open_log` belongs there too, where there is a run already."""
    log = _choose_log(args)
    if log and not args.dry_run and log.parent.is_dir():
        screen.prefer_log(log)


def _choose_log(args) -> Path | None:
    return Path(args.save, "logs", f"rank-{get_rank()}.log") if args.save and not args.skip_train else None


def end_at_signals(args) -> None:
    """Right after Megatron has read the arguments: until training begins there is nothing to save, and a signal ends the run.

    SIGINT by an exception, so that run.lock goes; the other at once, also where a rank waits for another.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(args.exit_signal, signal.SIG_DFL)


def apply(args) -> None:
    """Before pretrain(): training.py calls these by their names."""
    handler = _SignalHandler(args)
    training.train = handler.wrap(training.train)
    training.print_rank_last = _show_on_last_rank
    training.evaluate_and_print_results = _once_an_iteration(training.evaluate_and_print_results)
    training.print_datetime = _with_reason_shown(training.print_datetime, handler)


def _show_on_last_rank(line: str) -> None:
    if is_last_rank() and line.strip("-"):
        # Megatron gives every figure of a validation a perplexity, and only the LM loss has one.
        screen.show(re.sub(r"(?<=\| )(?!lm loss)[^|]* PPL: [^|]*\| ?", "", line))


def _once_an_iteration(evaluate):
    """Megatron evaluates once more at the end of training, also where --eval-interval has just had it done: to the same figures."""
    done = None

    @functools.wraps(evaluate)
    def evaluate_once(prefix, forward_step, data, model, iteration, *args, **kwargs):
        nonlocal done
        if iteration != done:
            evaluate(prefix, forward_step, data, model, iteration, *args, **kwargs)
        done = iteration

    return evaluate_once


def _with_reason_shown(print_datetime, handler: "_SignalHandler"):
    @functools.wraps(print_datetime)
    def with_reason_shown(text, *args, **kwargs):
        print_datetime(text, *args, **kwargs)
        if get_rank() == 0 and text.startswith("exiting program"):
            # Megatron calls every signal SIGTERM.
            screen.show_last(f"stopped by {handler.received}; {_explain_rest()}" if handler.received else text)

    return with_reason_shown


def _explain_rest() -> str:
    args = training.get_args()
    if not args.save:
        return "nothing was saved, as there is no --save"
    return "the same command resumes" if args.load == args.save else f"to go on, add --load {args.save}"


class _SignalHandler:
    """Ends training at Ctrl-C as at Megatron's exit signal: after the iteration, with a checkpoint where there is --save."""

    def __init__(self, args):
        self._args, self._process = args, os.getpid()
        self.received: str | None = None

    def wrap(self, train):
        @functools.wraps(train)
        def train_until_signal(*args, **kwargs):
            before = {
                number: signal.signal(number, self._receive) for number in (self._args.exit_signal, signal.SIGINT)
            }
            try:
                return train(*args, **kwargs)
            finally:  # what follows, the last checkpoint and evaluation, has no more iterations to wait for
                for number, handler in before.items():
                    signal.signal(number, handler)

        return train_until_signal

    def _receive(self, number: int, frame) -> None:
        if os.getpid() != self._process:  # Slurm signals data workers too: they end with this process
            return
        if not self.received and get_rank() == 0:
            save = self._args.save
            saves = f"with a checkpoint in {save}" if save else "without a checkpoint, as there is no --save"
            if "TORCHELASTIC_RUN_ID" in os.environ:
                seconds = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
                saves += f" (torchrun kills after {seconds} s; TORCH_ELASTIC_SHUTDOWN_TIMEOUT sets more)"
            screen.show_from_handler(f"{signal.Signals(number).name}: the run ends after this iteration, {saves}")
        self.received = self.received or signal.Signals(number).name
        training.get_signal_handler()._signal_received = True
