"""The training split as Energon gives it, and how many iterations one pass over it takes."""

import contextlib
import io

from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_train_dataset

from rsa_megatron.data.cookers import cook


def count_epoch_iterations(
    path: str,
    *,
    data_parallel_size: int,
    num_workers: int,
    micro_batch_size: int,
    global_batch_size: int,
    drop_last: bool,
) -> int:
    """Count the iterations of one pass over the training split behind `path`, as Energon divides it between workers.

    Each worker of each rank has a share of each data set, and its last micro-batch may be a partial one. The rank with
    the most micro-batches decides, or with drop_last (and without partial ones) the rank with the fewest.

    Raises:
        ValueError: the data is a blend by weight, which has no end.
    """
    num_readers = max(1, num_workers)  # without workers a rank reads for itself
    # All workers as those of one rank: Energon gives worker w of rank r what it gives number r * num_readers + w here.
    config = WorkerConfig(rank=0, world_size=1, num_workers=data_parallel_size * num_readers)
    dataset = build_train_dataset(
        path, CountingEncoder(), config, micro_batch_size, None, one_epoch=True, drop_last=drop_last
    )
    of_worker = [dataset.len_worker(worker) for worker in range(config.num_workers)]
    of_rank = [sum(of_worker[first : first + num_readers]) for first in range(0, len(of_worker), num_readers)]
    num_micro_batches = global_batch_size // (micro_batch_size * data_parallel_size)
    return min(of_rank) // num_micro_batches if drop_last else -(-max(of_rank) // num_micro_batches)


def count_epoch_samples(path: str, num_readers: int = 1) -> list[int]:
    """Count the samples that each reader reads in one pass over the training split behind `path`, each as often as it is repeated."""
    config = WorkerConfig(rank=0, world_size=1, num_workers=num_readers)
    with contextlib.redirect_stdout(io.StringIO()):  # Energon says how it divides the data
        dataset = build_train_dataset(path, CountingEncoder(), config, 1, None, one_epoch=True, drop_last=False)
    return [dataset.len_worker(reader) for reader in range(num_readers)]


class CountingEncoder(DefaultTaskEncoder):
    """A task encoder for a data set that is counted, not read."""

    cookers = [Cooker(cook)]


def build_train_dataset(
    path,
    task_encoder,
    worker_config,
    micro_batch_size,
    shuffle_buffer_size,
    *,
    one_epoch,
    drop_last,
    packing_buffer_size=0,
):
    """Build Energon's data set of the training split.

    Raises:
        ValueError: one epoch of a blend by weight, which has no end.
    """
    try:
        return get_train_dataset(
            path,
            worker_config=worker_config,
            batch_size=micro_batch_size,
            batch_drop_last=drop_last,
            shuffle_buffer_size=shuffle_buffer_size,
            packing_buffer_size=packing_buffer_size or None,
            max_samples_per_sequence=None,
            task_encoder=task_encoder,
            repeat=not one_epoch,
        )
    except AssertionError as error:
        if not one_epoch or "repeat" not in str(error):
            raise
        raise ValueError(
            f"--data-path {path}: a blend by weight has no end: set --train-iters, or write the mixture with "
            "blend_epochized and repetitions, of which a run without --train-iters is one pass"
        ) from error
