"""Writes a Megatron checkpoint (torch_dist) without Megatron, tensor by tensor.

torch.distributed.checkpoint asks for a chunk when it is about to write it; the chunk is read and joined then. What a
Megatron checkpoint holds beside tensors was seen in one that Megatron 0.19 had saved: the common state, and for each
linear layer an "extra state", which is where Transformer Engine would keep FP8 scales.
"""

import io
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from checkpoint_conversion.hf_weights import Readable, split_rows
from checkpoint_conversion.weight_map import Row, Shape, join, walk

# What load_checkpoint of Megatron reads. There are no arguments of a run, as there has been none: they would be
# compared with those of the run that loads.
_COMMON_STATE = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    # singleton_local_shards False: the layers of a stack are stored as one tensor
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}
_WITH_EXTRA_STATE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "final_layernorm")


def save_checkpoint(
    folder: Path, rows: list[Row], tensors: dict[str, Readable], on_written: Callable[[int], object]
) -> None:
    """Write the tensors of the table.

    Args:
        folder: to be made.
        rows: the table.
        tensors: by their names on the hub; checked.
        on_written: called with the bytes of each chunk.
    """
    planner = _Planner(rows, tensors, on_written)
    # No copies ahead: they are for tensors on a GPU, and would start CUDA where there is one.
    writer = _Writer(folder, per_thread_copy_ahead=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            save({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:
            ((first, _),) = error.failures.values()  # of the one rank
            raise first from None
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # neither the folder's temporary name nor a random id


class _Planner(SavePlanner):
    """What is written, and each piece when it is asked for."""

    def __init__(self, rows: list[Row], tensors: dict[str, Readable], on_written: Callable[[int], object]):
        self._tensors, self._on_written = tensors, on_written
        self._items: list[WriteItem] = []
        self._contents: dict[MetadataIndex, Callable[[], Tensor | io.BytesIO]] = {}
        for row, layer in walk(rows):
            dtype = tensors[row.part_names(layer)[0]].dtype
            if layer is not None:
                self._add_chunk(row, dtype, layer, (1, *row.shape), partial(self._join, row, layer))
            else:
                for block in split_rows(row.shape, dtype):
                    sizes = (block.stop - block.start, *row.shape[1:])
                    self._add_chunk(row, dtype, block.start, sizes, partial(self._copy, row, block))
        self._add_object("common_state", (1,), (0,), _COMMON_STATE)
        for owner, num_layers in _list_extra_states(rows):
            for layer in range(max(1, num_layers)):
                self._add_object(f"{owner}._extra_state", (max(1, num_layers),), (layer,), None)

    def _add_chunk(self, row: Row, dtype: torch.dtype, start: int, sizes: Shape, content: Callable[[], Tensor]) -> None:
        offsets = torch.Size([start] + [0] * (len(sizes) - 1))
        chunk = ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(sizes))
        data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=dtype), size=torch.Size(row.stored_shape))
        self._add(WriteItem(MetadataIndex(row.key, offsets), WriteItemType.SHARD, tensor_data=data), content)

    def _add_object(self, key: str, shape: Shape, offset: Shape, content) -> None:
        # As Megatron names and packs the pieces of its objects.
        name = f"{key}/shard_{'.'.join(map(str, offset))}_{'.'.join(map(str, shape))}"
        self._add(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO), partial(_pack, [content]))

    def _add(self, item: WriteItem, content: Callable[[], Tensor | io.BytesIO]) -> None:
        self._items.append(item)
        self._contents[item.index] = content

    def _join(self, row: Row, layer: int) -> Tensor:
        return join([self._tensors[name].read() for name in row.part_names(layer)], row.groups).unsqueeze(0)

    def _copy(self, row: Row, block: slice) -> Tensor:
        (name,) = row.parts
        return self._tensors[name].read(block)

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self._items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        content = self._contents[write_item.index]()
        if isinstance(content, Tensor):
            self._on_written(content.nbytes)
        return content


def _list_extra_states(rows: list[Row]) -> dict[tuple[str, int], None]:
    """List owner and number of layers of each extra state, once and in order."""
    owners = ((row.key.rpartition(".")[0], row.num_layers) for row in rows)
    return {(owner, num): None for owner, num in owners if owner.rpartition(".")[2] in _WITH_EXTRA_STATE}


def _pack(content) -> io.BytesIO:
    packed = io.BytesIO()
    torch.save(content, packed)
    return packed
