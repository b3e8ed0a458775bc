"""Tensors of Hugging Face folders, by their names on the hub, read one at a time.

A file is opened again for each tensor: the pages of a mapped file count as this process's memory until it is closed.
Which files a folder's weights are: weight_files.py. Of a .bin file, which is a pickle, torch.load(weights_only=True) reads
tensors and nothing else.
"""

import math
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint_conversion.key_aliases import to_hub_name
from checkpoint_conversion.weight_files import find_weight_files
from checkpoint_conversion.weight_map import EMBEDDINGS, LM_HEAD, Row, Shape, expected_shapes

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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


class PickledTensor(StoredTensor):
    """A tensor of a .bin file."""

    def read(self, rows: slice = slice(None)) -> Tensor:
        return _load_pickle(self.file)[self.name][rows].clone(memory_format=torch.contiguous_format)


def open_folder(folder: Path) -> dict[str, Readable]:
    """Open the model's tensors in a folder, by their names on the hub; those known not to belong to it are skipped.

    Prints one line where the folder holds other weights too, which are not read.

    Raises:
        ValueError: naming file or tensor, for files that are missing, broken or of another format.
    """
    files = find_weight_files(folder)
    if files.not_read:
        print(
            f"weights of {folder}: {files.describe_chosen()} (as transformers chooses); not read: "
            f"{files.describe_others()}"
        )
    found: dict[str, Readable] = {}
    for file in files.chosen:
        for tensor in _list_pickled(file) if file.suffix == ".bin" else _list_tensors(file):
            name = to_hub_name(tensor.name)
            if name in found:
                raise ValueError(f"{tensor.source} and {found[name].source} are both {name}; remove one of them")
            if name is not None:
                found[name] = tensor
    return found


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
        _check_dtype(file, name, dtype, DTYPES)
    return [StoredTensor(file, name, shape, DTYPES[dtype]) for name, shape, dtype in tensors if dtype in DTYPES]


def _list_pickled(file: Path) -> list[PickledTensor]:
    tensors = _load_pickle(file)
    wrong = [name for name, tensor in tensors.items() if not (isinstance(name, str) and isinstance(tensor, Tensor))]
    if wrong:
        raise ValueError(
            f"{file}: its entry {wrong[0]!r} is a {type(tensors[wrong[0]]).__name__}, not a tensor: save the state_dict alone"
        )
    for name, tensor in tensors.items():
        _check_dtype(file, name, tensor.dtype, DTYPES.values())
    return [
        PickledTensor(file, name, tuple(tensor.shape), tensor.dtype)
        for name, tensor in tensors.items()
        if tensor.dtype in DTYPES.values()
    ]


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """Map a .bin file into memory."""
    if not zipfile.is_zipfile(file):
        raise ValueError(
            f"{file} is not in the format of torch 1.6 and later: download it again, or, if it is older, load the model with "
            "transformers and save_pretrained(folder)"
        )
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{file} is not read: it names {found[1] if found else 'code'}, which no tensor needs and which could run "
            "anything; do not use a file like that"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {str(error).partition(chr(10))[0]}; download it again") from error
    if not isinstance(tensors, dict):
        raise ValueError(
            f"{file} holds a {type(tensors).__name__}, not tensors by their names: save the state_dict alone"
        )
    return tensors


def _check_dtype(file: Path, name: str, dtype, readable) -> None:
    if dtype not in readable and to_hub_name(name) is not None:
        raise ValueError(
            f"{file}, tensor {name}: its dtype {dtype} is quantised or not a float; convert it to bfloat16"
        )


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
