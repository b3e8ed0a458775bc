"""Features of every layer of a backbone, on disk: written once, part by part, and read a layer at a time.

    FOLDER/manifest.json             what they are of: model, data, pooling, ..., the keys of the pairs and the layers' names
    FOLDER/part-00000.safetensors    [n, D] of every layer for the next n pairs; in its header their keys, and which were skipped
    FOLDER/part-00001.safetensors    ...

While they are written the folder is called FOLDER.unfinished. A part appears under its name when it is on disk as a
whole, and lists its own pairs. So a run that was killed resumes after the last part, and ends with the bytes of a run
that was not: nothing in them depends on the clock or on the machine's state.

Shapes: N pairs in a store, n of them in a part; D width of a layer.
"""

import fcntl
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rsa_megatron import atomic

STORE_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_MANIFEST = "manifest.json"


class FeatureStore:
    """Made by `create` to be written, or by `open` to be read."""

    def __init__(self, folder: Path, manifest: dict, *, final: Path | None):
        self.folder = folder
        #: as `create` was given it
        self.manifest = manifest
        #: of the pairs that have features, in the manifest's order
        self.keys: list[str] = []
        #: pairs that have none, and why
        self.left_out: dict[str, str] = {}
        self._final = final
        #: each part and how many pairs have features in it
        self._parts: list[tuple[Path, int]] = []
        for part in sorted(folder.glob("part-*.safetensors")):
            self._count(part, *_read_contents(part))

    @classmethod
    def create(cls, folder: str | Path, manifest: dict) -> "FeatureStore":
        """Open the store of that name: a finished one, or one to resume, or an empty one.

        Args:
            manifest: what can be written as JSON; `keys`, `layers` and `store_dtype` must be in it.

        Raises:
            ValueError: it exists with another manifest (the message names what differs), or is being written.
        """
        folder = Path(folder)
        manifest = json.loads(json.dumps(manifest))  # as it is read back: tuples are lists
        if folder.exists():
            store = cls.open(folder)
            _check_same(folder, store.manifest, manifest)
            return store
        unfinished = _get_unfinished_path(folder)
        atomic.make_folder(unfinished)
        lock = _lock(unfinished)
        try:
            if (unfinished / _MANIFEST).exists():
                _check_same(unfinished, _read_manifest(unfinished), manifest)
            else:
                atomic.write_text(unfinished / _MANIFEST, json.dumps(manifest, indent=1) + "\n")
            atomic.remove_unfinished_files(unfinished)  # those of a killed run; nobody else writes here
            store = cls(unfinished, manifest, final=folder)
        except BaseException:
            os.close(lock)
            raise
        store._unlock = weakref.finalize(store, os.close, lock)
        return store

    @classmethod
    def open(cls, folder: str | Path) -> "FeatureStore":
        """Open a finished store.

        Raises:
            ValueError: not found.
        """
        folder = Path(folder)
        if not folder.exists() and _get_unfinished_path(folder).exists():
            raise ValueError(f"{_get_unfinished_path(folder)} is not finished: rerun the command that writes it")
        if not (folder / _MANIFEST).is_file():
            raise ValueError(f"{folder} holds no features ({_MANIFEST} is missing); name a folder of stored features")
        store = cls(folder, _read_manifest(folder), final=None)
        if store.num_done != len(store.manifest["keys"]):
            total = len(store.manifest["keys"])
            raise ValueError(f"{folder} lacks a part: it has {store.num_done} of {total} pairs; remove it")
        return store

    @property
    def finished(self) -> bool:
        return self._final is None

    @property
    def num_done(self) -> int:
        """Number of the manifest's keys that are done: they have features, or were skipped."""
        return len(self.keys) + len(self.left_out)

    @property
    def layers(self) -> list[str]:
        return self.manifest["layers"]

    def append(self, keys: list[str], features: dict[str, Tensor], left_out: dict[str, str] | None = None) -> None:
        """Write the next part.

        Args:
            keys: n of them, the next ones of the manifest but for those skipped.
            features: [n, D] of every layer. With n = 0 it may be empty.
            left_out: keys among them that have no features, each with the reason.

        Raises:
            ValueError: a feature is not finite, or too large for the store's dtype.
        """
        left_out = left_out or {}
        assert not self.finished, "a finished store is not written to"
        expected = self.manifest["keys"][self.num_done : self.num_done + len(keys) + len(left_out)]
        assert [key for key in expected if key not in left_out] == list(keys), "pairs come in the order of the manifest"
        assert not keys or list(features) == self.layers, "features of every layer, in the manifest's order"
        dtype = STORE_DTYPES[self.manifest["store_dtype"]]
        tensors = {name: _convert(name, rows_nD, dtype) for name, rows_nD in features.items()} if keys else {}
        # One entry: safetensors writes several in any order, and the bytes would differ from run to run.
        metadata = {"pairs": json.dumps({"keys": list(keys), "left_out": left_out})}
        part = self.folder / f"part-{len(self._parts):05d}.safetensors"
        with atomic.new_file(part) as file:
            save_file(tensors, file, metadata=metadata)
        self._count(part, list(keys), left_out)

    def finish(self) -> None:
        """Give the folder its name; from then on it is read."""
        assert self.num_done == len(self.manifest["keys"]), "every pair is dealt with first"
        self.folder.rename(self._final)
        self._parts = [(self._final / part.name, size) for part, size in self._parts]
        self.folder, self._final = self._final, None
        self._unlock()

    def read_layer(self, name: str) -> Tensor:
        """Read the features of one layer, [N, D], float32, in the order of `keys`; no other layer is read."""
        assert name in self.layers, name
        if not self.keys:
            raise ValueError(f"{self.folder} holds no features: each of its {len(self.left_out)} pairs was skipped")
        x_ND = None
        row = 0
        for part, size in self._parts:
            if not size:
                continue
            with safe_open(part, "pt") as file:
                rows_nD = file.get_tensor(name)
            if x_ND is None:
                x_ND = torch.empty(len(self.keys), rows_nD.shape[1])
            x_ND[row : row + size] = rows_nD
            row += size
        return x_ND

    def read_width(self, name: str) -> int:
        """Read the width of one layer's features."""
        for part, size in self._parts:
            if size:
                with safe_open(part, "pt") as file:
                    return file.get_slice(name).get_shape()[1]
        raise ValueError(f"{self.folder} holds no features: each of its {len(self.left_out)} pairs was skipped")

    def read_pieces(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Yield the features of one layer for pairs `start` to before `stop`, [n, D] of a part at a time, in the store's dtype."""
        assert name in self.layers, name
        stop = len(self.keys) if stop is None else stop
        first = 0
        for part, size in self._parts:
            begin, end = max(start - first, 0), min(stop - first, size)
            if begin < end:
                with safe_open(part, "pt") as file:
                    yield file.get_slice(name)[begin:end]
            first += size

    def _count(self, part: Path, keys: list[str], left_out: dict[str, str]) -> None:
        self._parts.append((part, len(keys)))
        self.keys += keys
        self.left_out |= left_out


def _read_contents(part: Path) -> tuple[list[str], dict[str, str]]:
    try:
        with safe_open(part, "pt") as file:
            metadata = file.metadata()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{part} cannot be read ({error}); remove {part.parent}") from error
    pairs = json.loads(metadata["pairs"])
    return pairs["keys"], pairs["left_out"]


def _convert(name: str, rows_nD: Tensor, dtype: torch.dtype) -> Tensor:
    stored_nD = rows_nD.to("cpu", dtype).contiguous()
    if not rows_nD.isfinite().all():
        raise ValueError(f"layer {name} gives a feature that is not finite; with --dtype bfloat16, try float32")
    if not stored_nD.isfinite().all():
        largest = rows_nD.abs().max().item()
        raise ValueError(
            f"layer {name} has a feature of {largest:.3g}, too large for {dtype}: pass --store-dtype float32"
        )
    return stored_nD


def _get_unfinished_path(folder: Path) -> Path:
    return folder.with_name(folder.name + ".unfinished")


def _lock(folder: Path) -> int:
    """Lock the folder until the process ends, or the store is finished: two writers would corrupt each other's parts."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ValueError(
            f"{folder} is being written by another process; wait for it, or name another --store"
        ) from error
    except OSError:
        pass  # a file system without locks
    return handle


def _read_manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if not manifest.keys() >= {"keys", "layers", "store_dtype"}:
            raise ValueError("keys, layers or store_dtype is missing")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / _MANIFEST} cannot be read ({error}); remove {folder}") from error
    return manifest


def _check_same(folder: Path, then: dict, now: dict) -> None:
    for name in [*now, *then]:
        if name not in then or name not in now or then[name] != now[name]:
            before, here = (_format_value(manifest.get(name)) for manifest in (then, now))
            differs = f"{name} {before}, this run has {here}" if before != here else f"other {name}"
            raise ValueError(f"{folder} has features with {differs}: name another --store, or remove that folder")


def _format_value(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
