"""Tensors of Hugging Face folders, by their names on the hub, read one at a time.

A file is opened again for each tensor: the pages of a mapped file count as this process's memory until it is closed.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint_conversion.key_aliases import to_hub_name
from checkpoint_conversion.weight_map import EMBEDDINGS, LM_HEAD, Row, Shape, expected_shapes

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PICKLES = ("*.bin", "*.pt", "*.pth")


class Readable(Protocol):
    """A tensor that is not in memory yet."""

    shape: Shape
    dtype: torch.dtype
    #: where it comes from, for messages
    source: str

    def read(self, rows: slice = slice(None)) -> Tensor:
        """Read some of its rows, or all."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file."""

    file: Path
    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def source(self) -> str:
        return f"{self.file}, tensor {self.name}"

    def read(self, rows: slice = slice(None)) -> Tensor:
        with safe_open(self.file, "pt") as file:
            return file.get_slice(self.name)[rows]


def open_folder(folder: Path) -> dict[str, Readable]:
    """Open the model's tensors in a folder, by their names on the hub; those known not to belong to it are skipped.

    Raises:
        ValueError: naming file or tensor, for files that are missing, broken or not safetensors.
    """
    found: dict[str, Readable] = {}
    for file in find_weight_files(folder):
        for tensor in _list_tensors(file):
            name = to_hub_name(tensor.name)
            if name in found:
                raise ValueError(f"{tensor.source} and {found[name].source} are both {name}; remove one of them")
            if name is not None:
                found[name] = tensor
    return found


def find_weight_files(folder: Path) -> list[Path]:
    """Find the safetensors files of a folder: the one, or those that the index lists."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of tensors and files ({error!r}); download it again") from error
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{index} lists files outside its folder; they are not read")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder / missing[0]} is missing, which {index.name} lists; download the folder again")
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    pickles = [file.name for pattern in _PICKLES for file in sorted(folder.glob(pattern))]
    if pickles:
        raise ValueError(
            f"{folder}/{pickles[0]}: pickle files are not read, as they can run any code; convert them to safetensors: load "
            "them with transformers on a machine that may run them, and save_pretrained(folder)"
        )
    raise ValueError(f"{folder}: neither model.safetensors nor model.safetensors.index.json found")


def _list_tensors(file: Path) -> list[StoredTensor]:
    tensors = []
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                piece = opened.get_slice(name)
                tensors.append((name, tuple(piece.get_shape()), piece.get_dtype()))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}; download it again") from error
    for name, _, dtype in tensors:
        if dtype not in DTYPES and to_hub_name(name) is not None:
            raise ValueError(
                f"{file}, tensor {name}: its dtype {dtype} is quantised or not a float; convert it to bfloat16"
            )
    return [StoredTensor(file, name, shape, DTYPES[dtype]) for name, shape, dtype in tensors if dtype in DTYPES]


def drop_tied_head(tensors: dict[str, Readable]) -> None:
    """Drop a tied model's output layer, which repeats the word embeddings."""
    if LM_HEAD not in tensors:
        return
    head, embeddings = tensors[LM_HEAD], tensors.get(EMBEDDINGS)
    if embeddings is not None and not _are_equal(head, embeddings):
        raise ValueError(
            f"{head.source} differs from the word embeddings, yet config.json has tie_word_embeddings true; set that to "
            "false to keep it, or remove the tensor to use the embeddings"
        )
    del tensors[LM_HEAD]


def _are_equal(a: Readable, b: Readable) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and all(
        torch.equal(a.read(rows), b.read(rows)) for rows in split_rows(a.shape, a.dtype)
    )


def split_rows(shape: Shape, dtype: torch.dtype, block_bytes: int = 64 * 2**20) -> list[slice]:
    """Split a tensor's rows into slices of about `block_bytes` each: word embeddings can be gigabytes."""
    bytes_per_row = dtype.itemsize * math.prod(shape[1:])
    step = max(1, block_bytes // bytes_per_row)
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def check(tensors: dict[str, Readable], rows: list[Row], where: str) -> None:
    """Raise ValueError, naming tensor and file, unless the tensors are those of the table, each in its shape."""
    expected = expected_shapes(rows)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ValueError(
            f"{where}: {_format_names(missing)} missing; config.json requires shape {list(expected[missing[0]])}"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{tensors[name].source} has shape {list(tensors[name].shape)}; config.json requires {list(shape)}"
            )
    unknown = [tensor.source for name, tensor in tensors.items() if name not in expected]
    if unknown:
        raise ValueError(
            f"{_format_names(unknown)} not part of the model that config.json describes; remove, or correct config.json"
        )
    for row in rows:
        # Layers are stored as one tensor, and parts are joined: neither may silently change a dtype.
        dtypes = {tensors[name].dtype: name for layer in row.layers for name in row.part_names(layer)}
        if len(dtypes) > 1:
            (dtype, name), (other_dtype, other) = list(dtypes.items())[:2]
            raise ValueError(f"{where}: {name} is {dtype} and {other} {other_dtype}; convert them to one dtype")


def _format_names(names: list[str]) -> str:
    more = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
    return names[0] + more
