"""The position of the training data on disk.

Megatron writes it beside each checkpoint, one file a data-parallel rank; it says exactly which sample comes next. It
holds for the same data, number of data-parallel ranks and of data workers, micro-batch, shuffle buffer and packing; anything else
raises an error with the remedy; the data never silently starts again.
"""

import dataclasses
import re
from pathlib import Path

import numpy
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import (
    FlexState,
    SavableDataLoaderState,
    SavableDatasetCheckpoint,
    SavableDatasetState,
)

# What an Energon state is made of beside plain values.
_STATE_CLASSES = {
    cls.__name__: cls
    for cls in (
        SavableDataLoaderState,
        SavableDatasetCheckpoint,
        SavableDatasetState,
        SystemRngState,
        SliceState,
        FlexState,
    )
}


@dataclasses.dataclass(frozen=True)
class DataLayout:
    """What must be the same for a saved position to mean the same samples."""

    data_parallel_size: int
    num_workers: int
    micro_batch_size: int
    shuffle_buffer_size: int
    #: iterations of a single pass over the data; 0 where it never ends
    one_epoch: int
    #: of the shards' names and sizes (`fingerprint`)
    data_fingerprint: str
    #: of packed rows; 0 where a row is one sample
    packing_buffer_size: int = 0
    row_length: int = 0
    max_tiles_per_row: int = 0
    copies_captions: bool = False

    #: The Megatron flag behind each, for messages.
    FLAGS = {
        "data_parallel_size": "the data-parallel size (processes / TP / PP / CP)",
        "num_workers": "--num-workers",
        "micro_batch_size": "--micro-batch-size",
        "shuffle_buffer_size": "--shuffle-buffer-size",
        "one_epoch": "iterations of a single pass over the data (by --global-batch-size and --drop-last; 0: a run of --train-iters)",
        "packing_buffer_size": "--packing-buffer-size",
        "row_length": "--seq-length, a packed row's,",
        "max_tiles_per_row": "--packing-max-tiles",
        "copies_captions": "copies of captions in the row (--rsa-text-source caption)",
    }

    def check_same_data(self, then: dict, path_then: str | None, path: str) -> None:
        """Raise ValueError where a position was saved in other data than that behind `path`, naming both.

        Args:
            path_then: that of the data when it was saved; None where that is not known (of an earlier version).
        """
        if then["data_fingerprint"] == self.data_fingerprint:
            return
        if path_then == path:
            fault, remedy = f"--data-path {path}: its shards are others than when the run read them", "restore them"
        else:
            there = path_then or f"other shards (fingerprint {then['data_fingerprint']})"
            fault = f"--data-path {path}: the run that is resumed has read {there}"
            remedy = f"set it back{f' to {path_then}' if path_then else ''}"
        raise ValueError(f"{fault}; {remedy}, or pass --restart-data to read this data from its beginning")

    def check_same(self, then: dict, state_file: Path) -> None:
        """Raise ValueError unless a position saved with the layout `then` means the same samples here."""
        for name, what in self.FLAGS.items():
            # Without the key: a run from before single passes, whose data never ended, or from before packed rows.
            saved, current = then.get(name, 0), getattr(self, name)
            if saved != current:
                raise ValueError(
                    f"{state_file}: the data position was saved with {what} = {saved}, this run has {current}; an exact "
                    f"resume is impossible. Set it back to {saved}, or pass --restart-data to read the data from the beginning"
                )


def find_train_state(folder: str | Path, iteration: int, rank: int, world_size: int) -> Path:
    """Return the state file of a data-parallel rank, as Megatron wrote it for that iteration.

    Raises:
        FileNotFoundError: no file found, or files of another number of ranks.
    """
    # Megatron puts them under the name of the first model-parallel rank, whose digits depend on the layout.
    files = sorted(Path(folder).glob(f"iter_{iteration:07d}/mp_rank_*/train_dataloader_dprank*.pt"))
    ranks = {int(re.search(r"dprank(\d+)", file.name)[1]): file for file in files}
    remedy = "pass --restart-data to read the data from the beginning"
    if not ranks:
        raise FileNotFoundError(f"{folder}: no data position is saved for iteration {iteration}; {remedy}")
    if len(ranks) != world_size:
        raise FileNotFoundError(
            f"{folder}: the data position of iteration {iteration} was saved with a data-parallel size of {len(ranks)}, "
            f"this run has {world_size}; an exact resume is impossible. Set it back to {len(ranks)}, or {remedy}"
        )
    return ranks[rank]


# A state is kept as plain dictionaries, lists and tensors, which torch.load reads without running anybody's code.


def to_plain(value):
    if isinstance(value, numpy.ndarray):
        return {"class": "ndarray", "value": torch.from_numpy(value.copy())}
    name = type(value).__name__
    if dataclasses.is_dataclass(value):
        assert name in _STATE_CLASSES, f"an Energon state with a {name} in it, which could not be read back"
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"class": name, "value": {key: to_plain(v) for key, v in fields.items()}}
    if isinstance(value, dict):
        return {"class": name, "value": {key: to_plain(v) for key, v in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"class": name, "value": [to_plain(v) for v in value]}
    return value


def from_plain(value):
    if not isinstance(value, dict):
        return value
    name, value = value["class"], value["value"]
    if name == "ndarray":
        return value.numpy()
    if name in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[name](from_plain(v) for v in value)
    value = {key: from_plain(v) for key, v in value.items()}
    return value if name == "dict" else _STATE_CLASSES[name](**value)
