"""Energon loaders as Megatron's `--dataloader-type external` takes them."""

import contextlib
import dataclasses
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.energon import (
    TaskEncoder,
    WorkerConfig,
    get_loader,
    get_savable_loader,
    get_val_dataset,
)
from megatron.energon.savable_loader import SavableDataLoader
from megatron.energon.wrappers.base import BaseWrapperDataset
from torch.utils.data import DataLoader

from rsa_megatron.batch import LlavaBatch
from rsa_megatron.data.dataset_checks import fingerprint
from rsa_megatron.data.epoch_length import CountingEncoder, build_train_dataset
from rsa_megatron.data.loader_state import DataLayout, from_plain, to_plain
from rsa_megatron.data.packed_task_encoder import PackingTaskEncoder
from rsa_megatron.data.random_generators import keep_generators
from rsa_megatron.data.task_encoder import LlavaTaskEncoder

logger = logging.getLogger(__name__)


class TrainLoader:
    """Batches of the training split, with a position that can be saved and resumed.

    Args:
        one_epoch: iterations of a single pass over the data (`count_epoch_iterations`), after which there are empty batches: ranks
            end together, whatever each has read. 0: the data never ends.
        last_batch: with one_epoch, the number of the batch after which the run ends, if data may be left then (packed_epoch.py).
        drop_last: with one_epoch, skip samples that do not fill a micro-batch.
        packing_buffer_size: samples among which those of a row are chosen, by a PackingTaskEncoder; 0: a row is one sample.

    Raises:
        ValueError: one epoch of data that has none.
    """

    def __init__(
        self,
        path: str,
        task_encoder: LlavaTaskEncoder | PackingTaskEncoder,
        worker_config: WorkerConfig,
        micro_batch_size: int,
        shuffle_buffer_size: int,
        *,
        one_epoch: int = 0,
        drop_last: bool = False,
        last_batch: int = 0,
        packing_buffer_size: int = 0,
    ):
        if one_epoch:
            task_encoder = task_encoder.of_one_epoch(micro_batch_size, shuffle_buffer_size)
        self.layout = DataLayout(
            data_parallel_size=worker_config.world_size,
            num_workers=worker_config.num_workers,
            micro_batch_size=micro_batch_size,
            shuffle_buffer_size=shuffle_buffer_size,
            one_epoch=one_epoch,
            data_fingerprint=fingerprint(path),
            **_describe_packing(task_encoder, packing_buffer_size),
        )
        dataset = build_train_dataset(
            path,
            task_encoder,
            worker_config,
            micro_batch_size,
            None if one_epoch else shuffle_buffer_size,
            one_epoch=one_epoch > 0,
            drop_last=drop_last,
            packing_buffer_size=packing_buffer_size,
        )
        self._path = str(Path(path).resolve())
        self._task_encoder = task_encoder
        self._loader: SavableDataLoader = _isolate_workers(get_savable_loader(dataset))
        self._batches: Iterator[LlavaBatch] | None = None
        self._ended = False
        self._num_read, self._last_batch = 0, last_batch

    def __iter__(self):
        return self

    def __next__(self) -> LlavaBatch:
        batch = self._read_next()
        self._num_read += 1
        is_last = self._num_read == self._last_batch
        if is_last and self._read_next() is not None and self._task_encoder.say_skipped:
            logger.warning(
                "the pass over the data ends before this rank has read all of it: it has more rows than the bound at the start; "
                "what is left is not trained on"
            )
        return self._task_encoder.batch([]) if batch is None else batch

    def _read_next(self) -> LlavaBatch | None:
        if self._batches is None:
            self._batches = _read(self._loader)
        batch = None if self._ended else next(self._batches, None)
        self._ended = batch is None
        return batch

    def save_state(self) -> dict:
        """Return the position; called by Megatron when it writes a checkpoint."""
        energon = None if self._ended else to_plain(self._loader.save_state_rank())
        return {
            "layout": dataclasses.asdict(self.layout),
            "data": self._path,
            "energon": energon,
            "num_read": self._num_read,
        }

    @keep_generators()
    def restore_state(self, state_file: Path) -> None:
        """Resume at the position of a state file; before the first batch.

        Raises:
            ValueError: the file is of another layout.
        """
        state = torch.load(state_file, weights_only=True)["dataloader_state_dict"]
        self.layout.check_same_data(state["layout"], state.get("data"), self._path)
        self.layout.check_same(state["layout"], state_file)
        self._ended = state["energon"] is None
        self._num_read = state.get("num_read", 0)  # without it: from before packed rows, where it does not count
        if not self._ended:
            self._loader.restore_state_rank(from_plain(state["energon"]))


def _describe_packing(task_encoder: LlavaTaskEncoder | PackingTaskEncoder, packing_buffer_size: int) -> dict:
    if not packing_buffer_size:
        return {}
    return dict(
        packing_buffer_size=packing_buffer_size,
        row_length=task_encoder.row_length,
        max_tiles_per_row=task_encoder.max_tiles_per_row,
        copies_captions=task_encoder.copies_captions,
    )


def explain_unread_validation(
    path: str,
    *,
    data_parallel_size: int,
    num_workers: int,
    micro_batch_size: int,
    micro_batches: int,
    pairs: int = 0,
    neighbours: int = 0,
) -> str | None:
    """Say which samples of the validation split no evaluation reads; None where it reads all of them, and scores them.

    Args:
        micro_batches: that a rank reads in an evaluation.
        pairs: of how many samples alignment is scored as well; 0: it is not.
        neighbours: which that needs more than; 0: its metrics need none.
    """
    num_readers = max(1, num_workers)
    config = WorkerConfig(rank=0, world_size=1, num_workers=data_parallel_size * num_readers)
    with contextlib.redirect_stdout(io.StringIO()):  # Energon says how it divides the data
        dataset = get_val_dataset(path, worker_config=config, batch_size=1, task_encoder=CountingEncoder())
    shares = [dataset.len_worker(worker) for worker in range(config.num_workers)]
    num_samples, of_worker = sum(shares), [share // micro_batch_size for share in shares]
    of_rank = [sum(of_worker[first : first + num_readers]) for first in range(0, len(of_worker), num_readers)]
    in_batches = sum(of_rank) * micro_batch_size
    num_read = sum(min(count, micro_batches) for count in of_rank) * micro_batch_size
    faults = []
    if num_read < num_samples:
        left_out = [
            f"{count} {why}"
            for count, why in (
                (
                    num_samples - in_batches,
                    f"that do not fill a micro-batch of {micro_batch_size} in their data worker",
                ),
                (in_batches - num_read, "beyond --eval-iters"),
            )
            if count
        ]
        faults.append(
            f"an evaluation reads {num_read} of the {num_samples} samples of the split val, each time the same; never read: "
            f"{' and '.join(left_out)}"
        )
    scored = min(pairs, min(of_rank) * micro_batch_size * data_parallel_size)
    if pairs and scored <= neighbours:
        faults.append(
            f"alignment is scored on {scored} samples at most, too few for {neighbours} neighbours, so that mutual-knn is nan: lower "
            "--mutual-knn-k, or hold out more samples"
        )
    return f"--data-path {path}: {'; '.join(faults)}" if faults else None


class ValidationLoader:
    """The validation split over and over, each time in the same order.

    Args:
        batches_per_evaluation: after how many batches it begins anew, so that each evaluation of a run, resumed or not, is on
            the same samples; 0: after its last one alone.
    """

    def __init__(
        self,
        path: str,
        task_encoder: TaskEncoder,
        worker_config: WorkerConfig,
        micro_batch_size: int,
        *,
        batches_per_evaluation: int = 0,
    ):
        dataset = get_val_dataset(
            path,
            worker_config=worker_config,
            batch_size=micro_batch_size,
            batch_drop_last=True,
            task_encoder=task_encoder,
        )
        dataset = _FromBeginning(dataset, worker_config=worker_config)
        self._loader = _isolate_workers(get_loader(dataset))
        self._batches: Iterator[LlavaBatch] = iter(())
        self._batches_per_evaluation, self._num_read = batches_per_evaluation, 0

    def __iter__(self):
        return self

    def __next__(self) -> LlavaBatch:
        if self._batches_per_evaluation and self._num_read == self._batches_per_evaluation:
            self._batches, self._num_read = iter(()), 0
        batch = next(self._batches, None)
        if batch is None:
            self._batches = _read(self._loader)  # its data workers stay
            batch = next(self._batches, None)
        if batch is None:
            raise ValueError("the validation split does not fill one micro-batch in each data worker of each rank")
        self._num_read += 1
        return batch

    def one_pass(self) -> Iterator[LlavaBatch]:
        """Yield each batch of the split once; for a loader that has not been read from."""
        return _read(self._loader)


def _read(loader: DataLoader) -> Iterator[LlavaBatch]:
    """Yield the batches of a loader, each read without an effect on the training's random numbers."""
    with keep_generators():
        batches = iter(loader)
    while True:
        with keep_generators():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


class _FromBeginning(BaseWrapperDataset):
    """A data set that begins anew whenever it is read; Energon's go on where they were left."""

    def reset_state_own(self) -> None:
        pass

    def len_worker(self, worker_idx: int | None = None) -> int:
        return self.dataset.len_worker(worker_idx)

    def __iter__(self) -> Iterator:
        self.dataset.reset_state_deep()
        yield from self.dataset

    def config(self) -> dict:
        return self.dataset.config()


def _isolate_workers(loader: DataLoader) -> DataLoader:
    """Put data workers into process groups of their own.

    A scheduler's signal to end with a checkpoint may go to a rank's whole group, and ends data workers on the spot:
    the rank would fail before it has saved. Workers end by themselves when their rank is gone.
    """
    init = loader.worker_init_fn

    def start(worker_id: int):
        os.setpgrp()
        init(worker_id)

    loader.worker_init_fn = start
    return loader
