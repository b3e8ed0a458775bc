"""Embeddings from anywhere, read piece by piece: however many rows a file has, one piece of them is in memory.

    FOLDER, FOLDER:LAYER          features stored by rsa-megatron measure or realign, with their keys
    x.npy                         numpy's format, [N, D]
    x.safetensors, x.safetensors:TENSOR    a tensor of [N, D]

Rows are returned as stored, of any length. A row that has no direction (NaN, infinity, zero) is an error that counts
such rows of each kind and names the first, by key where there are keys; alignment/ knows rows only by number.

Shapes: N rows of a source, n of a piece; D width.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rsa_megatron.evaluation.feature_store import FeatureStore

# A piece of 1280 numbers a row in float32 is 3276 rows; what is made of it in float64 is twice as much.
_PIECE_BYTES = 16 * 2**20
# Why a row has no direction, seen from its largest number; at most _NAMED rows of each kind are named.
_FAULTS = {"hold NaN": torch.isnan, "hold infinity": torch.isinf, "are zero": torch.logical_not}
_NAMED = 5
_FORMS = "name a folder of stored features (FOLDER:LAYER), an .npy, or a .safetensors (FILE:TENSOR)"


class Embeddings:
    """Rows of a source, or a shard of them. Iterate it, as often as you like, for its pieces, [n, D], in order.

    Args:
        description: the source and what of it, for messages.
        keys: of all rows of the source, if it has any.
        about: what is known of the rows: "model", "revision", "data", ...
        read: the rows from one number to before another, in pieces.
    """

    def __init__(
        self,
        description: str,
        *,
        rows: range,
        width: int,
        keys: list[str] | None,
        about: dict[str, str],
        read: Callable[[int, int], Iterator[Tensor]],
    ):
        self.description, self.width, self.about = description, width, about
        self._rows, self._all_keys, self._read = rows, keys, read

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def keys(self) -> list[str] | None:
        """Of each row; None where the source has none."""
        return self._all_keys and self._all_keys[self._rows.start : self._rows.stop]

    def __iter__(self) -> Iterator[Tensor]:
        for piece_nD in self._read(self._rows.start, self._rows.stop):
            if not _has_direction(piece_nD).all():
                self._raise_for_rows()
            yield piece_nD

    def take_share(self, rank: int, size: int) -> "Embeddings":
        """Take the rank's contiguous shard of the rows: all ranks' together are all rows, each once."""
        first, last = (self._rows.start + self.num_rows * number // size for number in (rank, rank + 1))
        return Embeddings(
            self.description,
            rows=range(first, last),
            width=self.width,
            keys=self._all_keys,
            about=self.about,
            read=self._read,
        )

    def _raise_for_rows(self) -> None:
        bad, first = {kind: [] for kind in _FAULTS}, self._rows.start
        for piece_nD in self._read(self._rows.start, self._rows.stop):
            largest_n = _find_largest(piece_nD)
            for kind, is_bad in _FAULTS.items():
                bad[kind] += (first + is_bad(largest_n).nonzero()[:, 0]).tolist()
            first += len(piece_nD)
        kinds = ", ".join(f"{len(rows)} {kind} ({self._format_names(rows)})" for kind, rows in bad.items() if rows)
        raise ValueError(
            f"{self.description}: {sum(map(len, bad.values()))} of {self.num_rows} embeddings have no direction: {kinds}; "
            "remove them, or embed them again"
        )

    def _format_names(self, rows: list[int]) -> str:
        names = ", ".join(self._all_keys[number] if self._all_keys else f"row {number}" for number in rows[:_NAMED])
        return names + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")


def _has_direction(x_nD: Tensor) -> Tensor:
    # A piece's lengths take a twentieth of the time of its largest numbers, but overflow and underflow.
    length_n = torch.linalg.vector_norm(x_nD, dim=1)
    is_usual_n = length_n.isfinite() & (length_n > 0)
    if is_usual_n.all():
        return is_usual_n
    largest_n = _find_largest(x_nD)
    return largest_n.isfinite() & (largest_n > 0)


def _find_largest(x_nD: Tensor) -> Tensor:
    """Return each row's largest magnitude; NaN where there is one."""
    return torch.linalg.vector_norm(x_nD, torch.inf, dim=1)


def open_embeddings(source: str | Path) -> Embeddings:
    """Open FOLDER[:LAYER], x.npy or x.safetensors[:TENSOR].

    Raises:
        ValueError: it is none of these, has no such layer or tensor, or no rows of floating-point numbers.
    """
    path, name = Path(source), None
    if not path.exists() and ":" in str(source):
        before, _, name = str(source).rpartition(":")
        path = Path(before)
    if path.is_dir() or path.with_name(path.name + ".unfinished").is_dir():
        return open_store(FeatureStore.open(path), name)
    if not path.is_file():
        raise ValueError(f"{path} not found; {_FORMS}")
    if path.suffix == ".npy":
        if name is not None:
            raise ValueError(f"{source}: an .npy holds one array; omit :{name}")
        return _open_npy(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path, name)
    raise ValueError(f"{path} has an unsupported format; {_FORMS}")


def open_store(store: FeatureStore, layer: str | None = None) -> Embeddings:
    """Open the features of a layer; of a store with one layer it need not be named.

    Raises:
        ValueError: no such layer, or none is named and there are several.
    """
    layers = ", ".join(store.layers)
    if layer is None and len(store.layers) > 1:
        raise ValueError(f"{store.folder} has the layers {layers}: name one, as {store.folder}:{store.layers[-1]}")
    if layer is not None and layer not in store.layers:
        raise ValueError(f"{store.folder} has no layer {layer}; its layers are {layers}")
    layer = layer or store.layers[0]
    about = {
        name: str(store.manifest[name])
        for name in ("model", "revision", "side", "pooling", "data")
        if name in store.manifest
    }
    return Embeddings(
        f"{store.folder}, layer {layer}",
        rows=range(len(store.keys)),
        width=store.read_width(layer),
        keys=store.keys,
        about=about | {"layer": layer},
        read=lambda start, stop: store.read_pieces(layer, start, stop),
    )


def _open_npy(path: Path) -> Embeddings:
    try:
        x_ND = numpy.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as a numpy array of numbers: {error}; write it with numpy.save"
        ) from error
    if x_ND.dtype.kind != "f" or x_ND.dtype.itemsize > 8:
        raise ValueError(f"{path} holds {x_ND.dtype}: save it as float32, float16 or float64")

    def read(start: int, stop: int) -> Iterator[Tensor]:
        # Opened for each pass: pages that have been read leave the memory with it.
        rows_ND = numpy.load(path, mmap_mode="r", allow_pickle=False)
        step = _count_piece_rows(rows_ND.shape[1], rows_ND.itemsize)
        for first in range(start, stop, step):
            piece_nD = rows_ND[first : min(first + step, stop)]
            yield torch.from_numpy(numpy.array(piece_nD, dtype=rows_ND.dtype.newbyteorder("="), order="C"))

    return _make_embeddings(path, None, x_ND.shape, read)


def _open_safetensors(path: Path, name: str | None) -> Embeddings:
    try:
        with safe_open(path, "pt") as file:
            names = sorted(file.keys())
            if name is None and len(names) != 1:
                raise ValueError(
                    f"{path} has the tensors {', '.join(names)}: name one, as {path}:{names[0] if names else 'TENSOR'}"
                )
            if name is not None and name not in names:
                raise ValueError(f"{path} has no tensor {name}; its tensors are {', '.join(names)}")
            name = name or names[0]
            shape, dtype = file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if dtype not in ("F16", "BF16", "F32", "F64"):
        raise ValueError(f"{path}, tensor {name} holds {dtype}: save it as float32, float16, bfloat16 or float64")

    def read(start: int, stop: int) -> Iterator[Tensor]:
        step = _count_piece_rows(shape[1], 8)
        with safe_open(path, "pt") as file:
            rows_ND = file.get_slice(name)
            for first in range(start, stop, step):
                yield rows_ND[first : min(first + step, stop)]

    return _make_embeddings(path, name, shape, read)


def _make_embeddings(path: Path, name: str | None, shape: tuple[int, ...], read: Callable) -> Embeddings:
    description = f"{path}, tensor {name}" if name else str(path)
    if len(shape) != 2 or not all(shape):
        raise ValueError(
            f"{description} has the shape {list(shape)}: it must be at least one row of embeddings, [N, D]"
        )
    return Embeddings(
        description, rows=range(shape[0]), width=shape[1], keys=None, about={"file": path.name}, read=read
    )


def _count_piece_rows(width: int, itemsize: int) -> int:
    return max(1, _PIECE_BYTES // (width * itemsize))
