"""What surrounds Megatron's saving and loading of a checkpoint: what is not written, what it says, what a signal or a fault does to it."""

import contextlib
import functools
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker

from megatron.training import get_args, training

from rsa_megatron.ranks import print_once
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
        with explained_by(functools.partial(explain_save, iteration)), _signals_kept_from_helpers(settings):
            save(iteration, *args, non_persistent_ckpt=non_persistent_ckpt, **kwargs)
        if not non_persistent_ckpt:
            is_written = "is being written to" if settings.async_save else "is in"
            print_once(f"checkpoint of iteration {iteration} {is_written} {settings.save}")

    return save_checkpoint


@contextlib.contextmanager
def _signals_kept_from_helpers(args) -> Iterator[None]:
    """The processes that Megatron starts to write a checkpoint do not get the signals that end a run.

    A terminal and torchrun send these to all of them: without its helpers a rank would have no checkpoint to end with. What a
    thread blocks, the processes that it starts do not get; what comes for this process meanwhile it gets afterwards.
    """
    resource_tracker.ensure_running()  # which unblocks them as it starts
    signals = {signal.SIGINT, args.exit_signal}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
