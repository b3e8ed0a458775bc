"""What surrounds Megatron's saving and loading of a checkpoint: what is not written, what it says, that signals wait, what a fault ends in."""

import contextlib
import functools
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker

from megatron.training import get_args, training

from rsa_megatron import screen
from rsa_megatron.ranks import get_rank, print_once
from rsa_megatron.training.checkpoint_faults import explain_load, explain_save, explained_by
from rsa_megatron.training.run_folder import find_start


def surround_checkpoints() -> None:
    """Before pretrain(): training.py calls these by their names."""
    training.save_checkpoint_and_time = _surround_saving(training.save_checkpoint_and_time)
    load = training.load_checkpoint

    @functools.wraps(load)
    def load_checkpoint(*args, **kwargs):
        with explained_by(explain_load):
            return load(*args, **kwargs)

    training.load_checkpoint = load_checkpoint


def _surround_saving(save):
    @functools.wraps(save)
    def save_checkpoint(iteration, *args, non_persistent_ckpt: bool = False, **kwargs):
        settings = get_args()
        if iteration == settings.iteration == find_start(settings):
            # While it is written it would be no whole checkpoint, and it may be the only one.
            return print_once(
                f"{settings.save}: the checkpoint of iteration {iteration} is there already, and is not written again"
            )
        with explained_by(functools.partial(explain_save, iteration)), hold_signals(settings.exit_signal):
            save(iteration, *args, non_persistent_ckpt=non_persistent_ckpt, **kwargs)
        if not non_persistent_ckpt:
            is_written = "is being written to" if settings.async_save else "is in"
            print_once(f"checkpoint of iteration {iteration} {is_written} {settings.save}")

    return save_checkpoint


@contextlib.contextmanager
def hold_signals(exit_signal: int) -> Iterator[None]:
    """A checkpoint is written to its end: a signal that would end this process does so afterwards, and its helpers get none.

    A terminal and torchrun send signals to all the processes that a rank has started: without those that Megatron writes a checkpoint
    with there would be none to end with. What a thread blocks, the processes that it starts do not get.
    """
    resource_tracker.ensure_running()  # which unblocks them as it starts
    signals = {signal.SIGINT, exit_signal}
    # While iterations go on, the handler only takes note (console.py).
    ending = {number for number in signals if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)}
    received = []

    def receive(number: int, frame) -> None:
        if not received and get_rank() == 0:
            screen.show_from_handler(
                f"{signal.Signals(number).name}: the run ends as soon as its checkpoint is written"
            )
        received.append(number)

    handlers = {number: signal.signal(number, receive) for number in ending}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])
