"""Parquet files as tables of captions: texts are read a batch at a time, images when they are opened."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow
from PIL import Image
from pyarrow.parquet import ParquetFile

from rsa_megatron.data.image_references import list_references
from rsa_megatron.data.media_names import FILE_FIELDS, IMAGE_FIELDS, may_name_medium
from rsa_megatron.data.sources.pairs import ImageFile, Row, Table, decode, find_image
from rsa_megatron.data.sources.record import Unusable

# Rows that are in memory at once, without their images; and where another column may hold media, which are large.
_ROWS, _ROWS_WITH_MEDIA = 4096, 32
# Wikimedia's WIT has a row an image; its texts in each language are in this column.
_NESTED = "wit_features"


def open_parquet(path: Path, name: str, root: Path | None, wanted: set[str]) -> Table:
    """Open a file's rows, of which the columns `wanted` are read.

    Args:
        name: of the file among others.
        root: resolved folder that paths of images are relative to.
    """
    try:
        with ParquetFile(path) as file:
            schema = file.schema_arrow
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}; fetch it again") from error
    columns = [column for column in schema.names if column != _NESTED]
    if _NESTED in schema.names:
        inner = schema.field(_NESTED).type
        inner = inner.value_type if pyarrow.types.is_list(inner) else inner
        columns += [field.name for field in inner]
    image_column = next(
        (n for n in (*IMAGE_FIELDS, *FILE_FIELDS) if n in schema.names and _holds_images(schema.field(n).type)), None
    )
    read = wanted | {_NESTED} | {column for column in schema.names if may_name_medium(column)}
    texts = [column for column in schema.names if {column, column.lower()} & read and column != image_column]
    return Table(path, columns, image_column, _read_rows(path, name, root, texts, image_column))


def _holds_images(kind: pyarrow.DataType) -> bool:
    """Return whether a column holds bytes, or Hugging Face's {bytes, path}, or lists of these."""
    types = pyarrow.types
    if types.is_list(kind) or types.is_large_list(kind):
        return _holds_images(kind.value_type)
    return types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind)


def _read_rows(path: Path, name: str, root: Path | None, columns: list[str], image_column: str | None) -> Iterator[Row]:
    try:
        with ParquetFile(path) as file:
            # Of {bytes, path} only the path: it says how many images a row has without reading them.
            paths = [
                leaf for leaf in _list_leaves(file) if leaf.startswith(f"{image_column}.") and leaf.endswith(".path")
            ]
            is_large = any(n != _NESTED and _holds_images(file.schema_arrow.field(n).type) for n in columns)
            num_rows = _ROWS_WITH_MEDIA if is_large else _ROWS
            for group in range(file.metadata.num_row_groups):
                number = 0
                for batch in file.iter_batches(num_rows, row_groups=[group], columns=columns + paths):
                    for content in batch.to_pylist():
                        place = f"{name}, row group {group}, row {number}"
                        found = content.pop(image_column, None) if paths else {} if image_column else None
                        count = sum(item is not None for item in (found if isinstance(found, list) else [found]))
                        image = ImageOfRow(path, image_column, group, number, root) if count else None
                        yield from (Row(place, texts, image, count) for texts in _split_languages(content))
                        number += 1
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; fetch it again") from error


def _list_leaves(file: ParquetFile) -> list[str]:
    return [file.schema.column(number).path for number in range(len(file.schema))]


def _split_languages(content: dict) -> list[dict]:
    nested = content.pop(_NESTED, None)
    if nested is None:
        return [content]
    if isinstance(nested, dict):  # a list a field, instead of a list of fields
        nested = [dict(zip(nested, values)) for values in zip(*nested.values())]
    return [content | texts for texts in nested]


@dataclass(frozen=True)
class ImageOfRow:
    """Opens the image of a row: its bytes, or the file that it names."""

    file: Path
    column: str
    group: int
    number: int
    root: Path | None

    def read(self) -> bytes:
        return self._find()[0]

    def __call__(self) -> Image.Image:
        return decode(*self._find())

    def _find(self) -> tuple[bytes, str]:
        place = f"{self.file}, row group {self.group}, row {self.number}"
        value = _read_images(self.file, self.column, self.group)[self.number].as_py()
        try:
            references = list_references(value)
        except Unusable as fault:
            raise ValueError(f"{place}: {fault}") from fault
        if len(references) > 1:
            raise ValueError(f"{place}: it has {len(references)} images")
        (reference,) = references or [""]
        if isinstance(reference, bytes):
            return reference, place
        try:
            path = find_image(self.root, reference)
        except Unusable as fault:
            raise ValueError(
                f"{place}: it has no image of its own, and its path {fault} is not in {self.root}"
            ) from fault
        return ImageFile(path).read(), str(path)


@lru_cache(maxsize=1)
def _read_images(path: Path, column: str, group: int) -> pyarrow.ChunkedArray:
    """Read the images of a row group, the unit of reading; samples come in the data's order, so each is read once."""
    try:
        with ParquetFile(path) as file:
            return file.read_row_group(group, columns=[column]).column(column)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}, row group {group} cannot be read: {error}; fetch the file again") from error
