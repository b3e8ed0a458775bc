"""Reads tensors of a Megatron checkpoint (torch_dist) without Megatron, one layer at a time.

However a run was split over ranks, its chunks make up the tensors of the table. Nothing in the files is run: the
chunks are read by torch.load(weights_only=True), and `.metadata`, a pickle, may name only a few harmless classes.
"""

import math
import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from checkpoint_conversion.hf_weights import DTYPES
from checkpoint_conversion.weight_map import Row, walk
from rsa_megatron.models.folder_kinds import explain_hf_folder

_MODEL = ("language_model.", "vision_model.", "vision_projection.")
_CHECKPOINT = "torch.distributed.checkpoint."
_ALLOWED = {
    _CHECKPOINT + "metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    _CHECKPOINT + "planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"},
    _CHECKPOINT + "filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # the same, as Python 3.13 calls it
}


def find_checkpoint(folder: Path, iteration: int | None) -> Path:
    """Find the folder of one checkpoint: `folder` itself, or that of an iteration (or the latest) below it."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    if (folder / ".metadata").is_file():
        if iteration is not None:
            raise ValueError(f"--iteration {iteration}: {folder} is one checkpoint already; name the folder above it")
        found = folder
    elif iteration is not None:
        found = folder / f"iter_{iteration:07d}"
    elif tracker.is_file():
        latest = tracker.read_text().strip()
        if latest != "release" and not latest.isdecimal():
            raise ValueError(f"{tracker} holds {latest!r}, which is not an iteration")
        found = folder / ("release" if latest == "release" else f"iter_{int(latest):07d}")
    else:
        raise ValueError(
            explain_hf_folder("--checkpoint ", folder, "rsa-megatron convert hf-to-megatron makes one of it")
            or f"{folder}: not a Megatron checkpoint: neither .metadata nor {tracker.name} found"
        )
    if not found.is_dir():
        raise ValueError(
            f"{found} is missing; found: {', '.join(sorted(path.name for path in folder.glob('iter_*'))) or 'none'}"
        )
    if not (found / ".metadata").is_file():
        raise ValueError(
            f"{found}: not a checkpoint of the format torch_dist; save with Megatron's --ckpt-format torch_dist"
        )
    return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which no checkpoint needs; do not use a file like that"
        )


class _Reader(FileSystemReader):
    def read_metadata(self, *args, **kwargs) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _Unpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not read: {error}") from error
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise ValueError(f"{path} is not read: not a checkpoint's metadata")
        return metadata


class MegatronCheckpoint:
    """The model's tensors in a checkpoint.

    Args:
        folder: of one checkpoint.
        rows: the table, which all of the checkpoint's model is checked against.

    Raises:
        ValueError: naming the tensor or file, where the checkpoint does not fit the table or is broken.
    """

    def __init__(self, folder: Path, rows: list[Row]):
        self._folder = folder
        self._reader = _Reader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, True)
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: item
            for key, item in metadata.state_dict_metadata.items()
            if isinstance(item, TensorStorageMetadata) and key.startswith(_MODEL)
        }
        self._check(rows)

    def dtype(self, row: Row) -> torch.dtype:
        return self._tensors[self._locate(row, row.layers[0])[0]].properties.dtype

    def count_padding(self, row: Row) -> int:
        """Count the rows that a vocabulary's tensor has beyond the model's."""
        return self._tensors[row.key].size[0] - row.shape[0]

    def read(self, row: Row, layer: int | None) -> Tensor:
        """Read one tensor, of row.shape; without padding rows."""
        key, first = self._locate(row, layer)
        stored = self._tensors[key]
        wanted = ChunkStorageMetadata(
            offsets=torch.Size([*first, *[0] * len(row.shape)]), sizes=torch.Size([*[1] * len(first), *row.shape])
        )
        target = torch.empty(wanted.sizes, dtype=stored.properties.dtype)
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        if sum(math.prod(item.lengths) for item in items) != target.numel():
            raise ValueError(f"{self._folder}: the chunks of {key} do not cover it; the checkpoint is incomplete")
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self._folder}: {key} cannot be read: {error}") from error
        return target.view(row.shape)

    def _locate(self, row: Row, layer: int | None) -> tuple[str, tuple[int, ...]]:
        """Return the key of a tensor, and where in it: a stack's layers are stored as one tensor or, by some runs, separately."""
        if layer is None:
            return row.key, ()
        if row.key in self._tensors:
            return row.key, (layer,)
        return row.key.replace(".layers.", f".layers.{layer}."), ()

    def _check(self, rows: list[Row]) -> None:
        unknown = set(self._tensors)
        for row, layer in walk(rows):
            key, first = self._locate(row, layer)
            if key not in self._tensors:
                raise ValueError(f"{self._folder}: {key} is missing; config.json requires shape {list(row.shape)}")
            if key not in unknown:
                continue  # a stack, which its first layer has had checked
            unknown.discard(key)
            stored = self._tensors[key]
            expected = row.stored_shape if first else row.shape
            padded = (max(stored.size[0], expected[0]), *expected[1:]) if row.is_vocabulary else expected
            if tuple(stored.size) != padded:
                at_least = "at least " if row.is_vocabulary else ""
                raise ValueError(
                    f"{self._folder}: {key} has shape {list(stored.size)}; config.json requires "
                    f"{at_least}{list(expected)}"
                )
            if stored.properties.dtype not in DTYPES.values():
                raise ValueError(f"{self._folder}: {key} is {stored.properties.dtype}; that cannot be exported")
            self._check_files(key, stored)
        if unknown:
            first, more = min(unknown), len(unknown) - 1
            raise ValueError(
                f"{self._folder}: {first} is not a tensor of the model that config.json describes, nor are {more} more"
            )

    def _check_files(self, key: str, stored: TensorStorageMetadata) -> None:
        for chunk in stored.chunks:
            place = self._reader.storage_data.get(MetadataIndex(key, chunk.offsets))
            if place is None or Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"{self._folder}/.metadata names no file in it for {key}; copy the checkpoint again")
            file = self._folder / place.relative_path
            if not file.is_file() or file.stat().st_size < place.offset + place.length:
                raise ValueError(f"{file} is missing or truncated: it must hold {key}; copy the checkpoint again")


class _Into(LoadPlanner):
    """Takes what is read into one tensor."""

    def __init__(self, target: Tensor):
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        where = tuple(slice(start, start + size) for start, size in zip(read_item.dest_offsets, read_item.lengths))
        return self._target[where]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        pass

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value) -> None:
        pass
