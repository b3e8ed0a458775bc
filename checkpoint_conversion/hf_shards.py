"""Writes safetensors files under the hub's names, tensor by tensor.

The format is a header of JSON, with each tensor's place, and the tensors' bytes after it
(https://github.com/huggingface/safetensors#format). The library writes a file from tensors that are all in memory; here
one is enough.
"""

import json
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_conversion.hf_weights import DTYPES
from checkpoint_conversion.weight_map import Row, Shape, walk

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """The tensors that one tensor of Megatron's is split into; they go to one file."""

    row: Row
    layer: int | None
    dtype: torch.dtype

    @property
    def shapes(self) -> dict[str, Shape]:
        return dict(zip(self.row.part_names(self.layer), self.row.parts.values()))

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.row.shape)


def write_folder(
    folder: Path,
    rows: list[Row],
    dtypes: dict[str, torch.dtype],
    split: Callable[[Row, int | None], list[Tensor]],
    max_bytes: int,
) -> None:
    """Write model.safetensors, or several files of at most so many bytes and their index.

    Args:
        folder: to write to.
        rows: the table.
        dtypes: by the keys of the rows.
        split: gives the parts of one tensor, in the order of row.parts.
        max_bytes: of a file; a row that is larger has one to itself.
    """
    files = _divide([Piece(row, layer, dtypes[row.key]) for row, layer in walk(rows)], max_bytes)
    if len(files) == 1:
        return _write(folder / "model.safetensors", files[0], split)
    weight_map = {}
    for number, pieces in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write(folder / name, pieces, split)
        weight_map |= {part: name for piece in pieces for part in piece.shapes}
    total = sum(piece.num_bytes for pieces in files for piece in pieces)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_rows(
    path: Path, rows: list[Row], dtypes: dict[str, torch.dtype], split: Callable[[Row, int | None], list[Tensor]]
) -> None:
    """Write one file of some rows; arguments as of write_folder."""
    _write(path, [Piece(row, layer, dtypes[row.key]) for row, layer in walk(rows)], split)


def _divide(pieces: list[Piece], max_bytes: int) -> list[list[Piece]]:
    files, room = [], 0
    for piece in pieces:
        if not files or piece.num_bytes > room:
            files.append([])
            room = max_bytes
        files[-1].append(piece)
        room -= piece.num_bytes
    return files


def _write(path: Path, pieces: list[Piece], split: Callable[[Row, int | None], list[Tensor]]) -> None:
    # Wide dtypes first: each tensor then begins at a multiple of its item size, as readers expect.
    pieces = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        for name, shape in piece.shapes.items():
            start, end = end, end + piece.dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": _DTYPE_NAMES[piece.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in pieces:
            for part in split(piece.row, piece.layer):
                file.write(part.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
