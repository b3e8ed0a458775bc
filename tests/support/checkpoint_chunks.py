"""Writes torch_dist checkpoints whose tensors are cut into any chunks, as the ranks of a training would have."""

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner, save
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Chunks = list[tuple[tuple[int, ...], Tensor]]


def cut(tensor: Tensor, num: int, dim: int, offset: tuple[int, ...] = ()) -> Chunks:
    """A tensor in `num` pieces along a dimension, each with its place; stacked in front of `offset`'s dimensions."""
    pieces, start = [], 0
    for piece in tensor.tensor_split(num, dim):
        place = [0] * tensor.ndim
        place[dim], start = start, start + piece.shape[dim]
        pieces.append(((*offset, *place), piece[(None,) * len(offset)]))
    return pieces


def write(folder: Path, tensors: dict[str, tuple[tuple[int, ...], Chunks]]) -> None:
    """Write a checkpoint of {key: (shape of the whole, chunks)}."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save({}, storage_writer=FileSystemWriter(folder), planner=_Planner(tensors), no_dist=True)


class _Planner(SavePlanner):
    def __init__(self, tensors):
        self.data = {(key, offset): data for key, (_, chunks) in tensors.items() for offset, data in chunks}
        self.shapes = {key: shape for key, (shape, _) in tensors.items()}

    def create_local_plan(self):
        items = []
        for (key, offset), data in self.data.items():
            chunk = ChunkStorageMetadata(torch.Size(offset), data.shape)
            written = TensorWriteData(chunk, TensorProperties(data.dtype), torch.Size(self.shapes[key]))
            items.append(WriteItem(MetadataIndex(key, offset), WriteItemType.SHARD, tensor_data=written))
        return SavePlan(items)

    def create_global_plan(self, all_plans):
        return create_default_global_save_plan(all_plans)

    def resolve_data(self, write_item):
        return self.data[write_item.index.fqn, tuple(write_item.index.offset)].contiguous()

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False):
        pass

    def finish_plan(self, new_plan):
        return new_plan
