"""Hugging Face's parquet files, read row group by row group.

A row is a record, with the fields that data/records.py reads as columns. Lists of numbers (embeddings, tokens) are not read.
"""

import os
from collections import Counter
from collections.abc import Iterator
from itertools import compress
from pathlib import Path

import pyarrow
from pyarrow.parquet import ParquetFile

from rsa_megatron.data.media_names import may_name_medium
from rsa_megatron.data.records import CONVERSATION_FIELDS
from rsa_megatron.data.sources.record import Record, Unusable
from rsa_megatron.data.sources.row_choice import RowChoice

# Rows that are in memory at once; a row group of pictures can be gigabytes.
_ROWS = 32


class Parquet:
    """The rows of one or more files, in the files' order; of one split, where they have a column `split`."""

    def __init__(self, files: list[Path], image_root: Path, split: str, left_out: Counter[str] | None = None):
        self.image_root = image_root
        self._files = files
        #: of each group of each file, of each of its rows whether it is read
        self._groups: list[list[bytes]] = []
        choice = RowChoice(split=split)
        for path in files:
            try:
                with ParquetFile(path) as file:
                    names = file.schema_arrow.names
                    self._groups.append([_choose(file, group, choice) for group in range(file.num_row_groups)])
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(f"{path} is not a readable parquet file: {error}; fetch it again") from error
            if not set(CONVERSATION_FIELDS) & set(names):
                raise ValueError(f"{path} has no column conversations or messages; its columns are {', '.join(names)}")
        #: rows, and files of the same folder, that are not read, by why
        self.left_out = (left_out or Counter()) + choice.count_others()

    def __len__(self) -> int:
        return sum(sum(map(sum, groups)) for groups in self._groups)

    def records(self, start: int = 0) -> Iterator[Record]:
        number = 0
        for path, groups in zip(self._files, self._groups):
            if start >= number + sum(map(sum, groups)):
                number += sum(map(sum, groups))
                continue
            name = os.path.relpath(path, self.image_root)
            with ParquetFile(path) as file:
                first = 0
                for group, taken in enumerate(groups):
                    if start >= number + sum(taken):
                        number += sum(taken)
                    else:
                        for row, content in compress(enumerate(_read_rows(file, group, len(taken)), first), taken):
                            if number >= start:
                                yield Record(number, f"{name}, row {row}", content)
                            number += 1
                    first += len(taken)


def _choose(file: ParquetFile, group: int, choice: RowChoice) -> bytes:
    """Return of each row of a group whether it is read."""
    num_rows = file.metadata.row_group(group).num_rows
    columns = [name for name in choice.wanted if name in file.schema_arrow.names]
    try:
        rows = file.read_row_group(group, columns=columns).to_pylist() if columns else []
    except (pyarrow.ArrowException, OSError):  # reading its rows says so
        rows = []
    return bytes(choice.takes(row, columns) for row in rows) if rows else b"\1" * num_rows


def _read_rows(file: ParquetFile, group: int, num_rows: int) -> Iterator:
    fields = file.schema_arrow
    columns = [field.name for field in fields if may_name_medium(field.name) or not _holds_numbers(field.type)]
    done = 0
    try:
        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns):
            for index in range(batch.num_rows):
                yield _read_row(batch.slice(index, 1))
                done += 1
    except (pyarrow.ArrowException, OSError) as error:
        for _ in range(done, num_rows):
            yield Unusable("broken row group", f"its row group {group} cannot be read: {error}")


def _read_row(batch: pyarrow.RecordBatch):
    try:
        (row,) = batch.to_pylist()
    except UnicodeDecodeError as error:
        return Unusable("not UTF-8", f"its text is not UTF-8: {error}")
    return row


def _holds_numbers(kind: pyarrow.DataType) -> bool:
    """Return whether a column holds lists of numbers: embeddings, token ids."""
    types = pyarrow.types
    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        return False
    inner = kind.value_type
    return types.is_integer(inner) or types.is_floating(inner) or _holds_numbers(inner)
