"""Energon loaders as Megatron's `--dataloader-type external` takes them, and their state on disk.

The state of the training loader is written by Megatron beside each checkpoint, one file a data-parallel rank,
and says exactly which sample comes next. It holds for the same data, number of data-parallel ranks and of data
workers, micro-batch and shuffle buffer; anything else is refused with the remedy, never answered with data from the
beginning.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy
import torch
from megatron.energon import DefaultTaskEncoder, TaskEncoder, WorkerConfig, get_loader, get_savable_loader, get_train_dataset, get_val_dataset
from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.metadataset import load_dataset
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import (
    FlexState,
    SavableDataLoader,
    SavableDataLoaderState,
    SavableDatasetCheckpoint,
    SavableDatasetState,
)
from torch.utils.data import DataLoader

from rsa_megatron.batch import LlavaBatch
from rsa_megatron.data.task_encoder import LlavaTaskEncoder

# What an Energon state is made of beside plain values.
_STATE_CLASSES = {
    cls.__name__: cls
    for cls in (SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState, SystemRngState, SliceState, FlexState)
}


@dataclasses.dataclass(frozen=True)
class DataLayout:
    """What must be the same for a saved position to mean the same samples."""

    data_parallel_size: int
    num_workers: int
    micro_batch_size: int
    shuffle_buffer_size: int
    #: whether the data is passed over once, then ends
    one_epoch: bool
    #: of the shards' names and sizes (`fingerprint`)
    data_fingerprint: str

    #: The Megatron flag behind each, for messages.
    FLAGS = {
        "data_parallel_size": "the data-parallel size (processes / TP / PP / CP)",
        "num_workers": "--num-workers",
        "micro_batch_size": "--micro-batch-size",
        "shuffle_buffer_size": "--shuffle-buffer-size",
        "one_epoch": "one pass over the data (a run without --train-iters)",
        "data_fingerprint": "the shards behind --data-path, with the fingerprint",
    }


class TrainLoader:
    """Batches of the training part, with a position that can be saved and taken up again.

    Args:
        one_epoch: pass over the data once, and give empty batches from then on: ranks end together, whatever each has
            read. The task encoder must fill its batches up (`fill_to`). Otherwise the data never ends.
        drop_last: with one_epoch, leave out samples that do not fill a micro-batch.

    Raises:
        ValueError: one epoch of data that has none.
    """

    def __init__(
        self,
        path: str,
        task_encoder: LlavaTaskEncoder,
        worker_config: WorkerConfig,
        micro_batch_size: int,
        shuffle_buffer_size: int,
        *,
        one_epoch: bool = False,
        drop_last: bool = False,
    ):
        assert not one_epoch or task_encoder.fill_to == micro_batch_size
        self.layout = DataLayout(
            data_parallel_size=worker_config.world_size,
            num_workers=worker_config.num_workers,
            micro_batch_size=micro_batch_size,
            shuffle_buffer_size=shuffle_buffer_size,
            one_epoch=one_epoch,
            data_fingerprint=fingerprint(path),
        )
        dataset = _train_dataset(
            path, task_encoder, worker_config, micro_batch_size, shuffle_buffer_size, one_epoch=one_epoch, drop_last=drop_last
        )
        self._task_encoder = task_encoder
        self._loader: SavableDataLoader = _with_workers_apart(get_savable_loader(dataset))
        self._batches: Iterator[LlavaBatch] | None = None
        self._ended = False

    def __iter__(self):
        return self

    def __next__(self) -> LlavaBatch:
        if self._batches is None:
            self._batches = iter(self._loader)
        batch = None if self._ended else next(self._batches, None)
        if batch is None:
            self._ended = True
            return self._task_encoder.batch([])
        return batch

    def save_state(self) -> dict:
        """Called by Megatron when it writes a checkpoint."""
        energon = None if self._ended else _to_plain(self._loader.save_state_rank())
        return {"layout": dataclasses.asdict(self.layout), "energon": energon}

    def restore_state(self, state_file: Path) -> None:
        """Take up the position of a state file; before the first batch.

        Raises:
            ValueError: when the file is of another layout.
        """
        state = torch.load(state_file, weights_only=True)["dataloader_state_dict"]
        # Before there was a choice, all runs went on for ever.
        then = DataLayout(**{"one_epoch": False} | state["layout"])
        for name, what in DataLayout.FLAGS.items():
            saved, current = getattr(then, name), getattr(self.layout, name)
            if saved != current:
                raise ValueError(
                    f"{state_file}: the data position was saved with {what} = {saved}, this run has {current}; an exact "
                    f"resume is impossible. Set it back to {saved}, or pass --restart-data to begin the data anew"
                )
        self._ended = state["energon"] is None
        if not self._ended:
            self._loader.restore_state_rank(_from_plain(state["energon"]))


def epoch_iterations(
    path: str,
    *,
    data_parallel_size: int,
    num_workers: int,
    micro_batch_size: int,
    global_batch_size: int,
    drop_last: bool,
) -> int:
    """Iterations of one pass over the training part behind `path`, as Energon divides it between ranks and workers.

    Each worker of each rank has a part of each data set, and its last micro-batch may be a partial one. The rank with
    the most micro-batches decides, or with drop_last (and without partial ones) the rank with the fewest.

    Raises:
        ValueError: the data is a blend by weight, which has no end.
    """
    num_readers = max(1, num_workers)  # without workers a rank reads for itself
    # All workers as those of one rank: Energon gives worker w of rank r what it gives number r * num_readers + w here.
    config = WorkerConfig(rank=0, world_size=1, num_workers=data_parallel_size * num_readers)
    dataset = _train_dataset(path, _Counter(), config, micro_batch_size, None, one_epoch=True, drop_last=drop_last)
    of_worker = [dataset.len_worker(worker) for worker in range(config.num_workers)]
    of_rank = [sum(of_worker[first : first + num_readers]) for first in range(0, len(of_worker), num_readers)]
    num_micro_batches = global_batch_size // (micro_batch_size * data_parallel_size)
    return min(of_rank) // num_micro_batches if drop_last else -(-max(of_rank) // num_micro_batches)


class _Counter(DefaultTaskEncoder):
    """For a data set that is counted, not read."""

    cookers = LlavaTaskEncoder.cookers


def _train_dataset(path, task_encoder, worker_config, micro_batch_size, shuffle_buffer_size, *, one_epoch, drop_last):
    try:
        return get_train_dataset(
            path,
            worker_config=worker_config,
            batch_size=micro_batch_size,
            batch_drop_last=drop_last,
            shuffle_buffer_size=shuffle_buffer_size,
            max_samples_per_sequence=None,
            task_encoder=task_encoder,
            repeat=not one_epoch,
        )
    except AssertionError as error:
        if not one_epoch or "repeat" not in str(error):
            raise
        raise ValueError(
            f"--data-path {path}: a blend by weight has no end: name --train-iters, or write the mixture with "
            "blend_epochized and repetitions, of which a run without --train-iters is one pass"
        ) from error


class ValidationLoader:
    """The validation part over and over, each time in the same order."""

    def __init__(self, path: str, task_encoder: TaskEncoder, worker_config: WorkerConfig, micro_batch_size: int):
        dataset = get_val_dataset(
            path,
            worker_config=worker_config,
            batch_size=micro_batch_size,
            batch_drop_last=True,
            task_encoder=task_encoder,
        )
        self._loader = _with_workers_apart(get_loader(dataset))
        self._batches: Iterator[LlavaBatch] = iter(())

    def __iter__(self):
        return self

    def __next__(self) -> LlavaBatch:
        batch = next(self._batches, None)
        if batch is None:
            self._batches = iter(self._loader)
            batch = next(self._batches, None)
        if batch is None:
            raise ValueError("the validation part does not fill one micro-batch in each data worker of each rank")
        return batch

    def one_pass(self) -> Iterator[LlavaBatch]:
        """Each batch of the part once; for a loader that has not been read from."""
        return iter(self._loader)


def _with_workers_apart(loader: DataLoader) -> DataLoader:
    """Its data workers in process groups of their own.

    A scheduler's signal to end with a checkpoint may go to a rank's whole group, and ends data workers on the spot:
    the rank would fail before it has saved. Workers end by themselves when their rank is gone.
    """
    init = loader.worker_init_fn

    def start(worker_id: int):
        os.setpgrp()
        init(worker_id)

    loader.worker_init_fn = start
    return loader


def check_data(path: str, parts: Iterable[str], *, num_readers: int, micro_batch_size: int) -> None:
    """Raise ValueError, naming file and remedy, unless the data sets behind `path` are whole, and large enough.

    Args:
        path: a prepared data set, or a mixture of such.
        parts: the parts that will be read: train, val.
        num_readers: data workers of all data-parallel ranks, between which a part's samples are divided.
        micro_batch_size: which each of them must fill at least once in an evaluation.
    """
    for part in parts:
        shards = _shards(path, part)
        num_samples = sum(shard.count for shard in shards)
        if part == "val" and shards and num_samples // num_readers < micro_batch_size:
            raise ValueError(
                f"--data-path {path}: the {num_samples} samples of its validation part, divided between {num_readers} data "
                f"workers (data-parallel ranks x --num-workers), do not fill a micro-batch of {micro_batch_size} each; add "
                "samples, lower --num-workers or --micro-batch-size, or leave out the evaluation (--eval-iters 0)"
            )
        for shard in shards:
            if shard.path.is_local() and not shard.path.is_file():
                raise ValueError(
                    f"--data-path {path}: shard {shard.path} is missing, which its index lists; restore the file, or "
                    "run `energon prepare --force-overwrite` to index what is there"
                )


def fingerprint(path: str) -> str:
    """A short name for what the training part behind `path` holds: the shards' names and sizes, and their folders'."""
    shards = [(shard.path.parent.name, shard.name, shard.count) for shard in _shards(path, "train")]
    return hashlib.blake2b(repr(shards).encode(), digest_size=6).hexdigest()


def _shards(path: str, part: str) -> list:
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    try:
        found = load_dataset(path).get_datasets(training=part == "train", split_part=part, worker_config=config)
        return [shard for loaded in found.datasets for shard in getattr(loaded.dataset, "shards", [])]
    except (ValueError, KeyError, OSError, EmptyDatasetError) as error:
        raise ValueError(
            f"--data-path {path}, part {part!r}: {error}; name a folder that `energon prepare` has been run on, or a "
            "MetadatasetV2 .yaml of such folders"
        ) from error


def find_train_state(folder: str | Path, iteration: int, rank: int, world_size: int) -> Path:
    """The state file of a data-parallel rank, as Megatron has laid it down for that iteration.

    Raises:
        FileNotFoundError: there is none, or there are files of another number of ranks.
    """
    # Megatron puts them under the name of the first model-parallel rank, whose digits depend on the layout.
    files = sorted(Path(folder).glob(f"iter_{iteration:07d}/mp_rank_*/train_dataloader_dprank*.pt"))
    ranks = {int(re.search(r"dprank(\d+)", file.name)[1]): file for file in files}
    remedy = "pass --restart-data to begin the data anew"
    if not ranks:
        raise FileNotFoundError(f"{folder}: no data position is saved for iteration {iteration}; {remedy}")
    if len(ranks) != world_size:
        raise FileNotFoundError(
            f"{folder}: the data position of iteration {iteration} was saved with a data-parallel size of {len(ranks)}, "
            f"this run has {world_size}; an exact resume is impossible. Set it back to {len(ranks)}, or {remedy}"
        )
    return ranks[rank]


# A state is kept as plain dictionaries, lists and tensors, which torch.load reads without running anybody's code.


def _to_plain(value):
    if isinstance(value, numpy.ndarray):
        return {"class": "ndarray", "value": torch.from_numpy(value.copy())}
    name = type(value).__name__
    if dataclasses.is_dataclass(value):
        assert name in _STATE_CLASSES, f"an Energon state with a {name} in it, which could not be read back"
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"class": name, "value": {key: _to_plain(v) for key, v in fields.items()}}
    if isinstance(value, dict):
        return {"class": name, "value": {key: _to_plain(v) for key, v in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"class": name, "value": [_to_plain(v) for v in value]}
    return value


def _from_plain(value):
    if not isinstance(value, dict):
        return value
    name, value = value["class"], value["value"]
    if name == "ndarray":
        return value.numpy()
    if name in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[name](_from_plain(v) for v in value)
    value = {key: _from_plain(v) for key, v in value.items()}
    return value if name == "dict" else _STATE_CLASSES[name](**value)
