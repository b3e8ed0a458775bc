"""Pairs of tables: a column with captions, and one with images or what names them.

    flickr_annotations_30k.csv   raw (a JSON list of sentences), split, filename, ...      Flickr30k, Karpathy's splits
    results.csv                  image_name| comment_number| comment                       Flickr30k, without splits
    wit_v1.train.*.tsv.gz        language, image_url, caption_reference_description, ...   Wikipedia's (WIT)
    *.parquet                    the same columns and, in most, image: {bytes, path}; Wikimedia's WIT, whose texts in all
                                 languages lie in one column wit_features, as well

One pair an image: of several rows that name the same image the first that has a caption. An image that is not in the table
itself is looked for by its path; where the table has an address (://), by its last component. Beside questions or labels a
column is no caption, whatever its name.
"""

import csv
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress, islice
from pathlib import Path

from rsa_megatron.data.field_values import is_absent
from rsa_megatron.data.image_references import list_references
from rsa_megatron.data.media_names import FILE_FIELDS, IMAGE_FIELDS, find_unread, may_name_medium
from rsa_megatron.data.record_checks import TASK_FIELDS
from rsa_megatron.data.records import CAPTION_FIELDS, CONVERSATION_FIELDS, read_caption
from rsa_megatron.data.sources.coco import WRONG_NUMBER_OF_IMAGES, FoundPairs, describe_fault
from rsa_megatron.data.sources.compressed import open_bytes
from rsa_megatron.data.sources.file_forms import tell_form
from rsa_megatron.data.sources.pairs import ImageBytes, Pairs, Row, Table
from rsa_megatron.data.sources.record import Record, Unusable
from rsa_megatron.data.sources.row_choice import RowChoice

# The first that a table has counts. "raw" holds a JSON list; the others a text, a list of texts or a conversation.
_CAPTIONS = (*CONVERSATION_FIELDS, *CAPTION_FIELDS)
# In a row the first that is filled counts, as in a record.
_IMAGES = (*IMAGE_FIELDS, *FILE_FIELDS)
# Characters of a field. csv's own limit of 131,072 is below some pages' descriptions; an unpaired
# quotation mark would make one field of the rest of the file.
_LONGEST_FIELD = 1 << 24


@dataclass(frozen=True)
class _Roles:
    """Which column is what."""

    caption: str
    #: those that may name the image
    images: list[str]
    #: those beside which, where a row fills them, a "comment" or "text" is no caption
    tasks: list[str]
    #: those that may name a medium which is not read
    others: list[str]

    @classmethod
    def of(cls, table: Table, *, needs_image: bool) -> "_Roles":
        own = [name for name in table.columns if name != table.image_column]
        others = [name for name in own if name not in _CAPTIONS + _IMAGES and may_name_medium(name)]
        roles = cls(
            next((name for name in _CAPTIONS if name in own), None),
            [name for name in _IMAGES if name in own],
            [name for name in own if name.lower() in TASK_FIELDS],
            others,
        )
        theirs = f"its columns are {', '.join(table.columns)}; rename the one that has them"
        if roles.caption is None:
            raise ValueError(f"{table.path} has no column of captions ({', '.join(_CAPTIONS)}), {theirs}")
        is_record = roles.caption in CONVERSATION_FIELDS  # which may name its image in its text
        if needs_image and not (roles.images or table.image_column or is_record):
            raise ValueError(f"{table.path} has no column that names images ({', '.join(_IMAGES)}), {theirs}")
        return roles

    def find_images(self, content: dict) -> list[str | bytes]:
        """List what a row names its images by, each a path, an address or its bytes.

        Raises:
            Unusable: it is none of these.
        """
        for column in self.images:
            value = content.get(column)
            if not isinstance(value, bool) and (found := list_references(value)):
                return found
        return []

    def find_tasks(self, content: dict) -> list[str]:
        """List the columns of a row beside which its caption is none; the number of a class beside a `caption` is no such."""
        tasks = [name for name in self.tasks if not is_absent(content.get(name))]
        if self.caption.startswith("caption"):
            tasks = [name for name in tasks if name.lower() != "label" or not str(content[name]).strip().isdigit()]
        return tasks

    def get_caption(self, content: dict) -> str:
        value = content.get(self.caption)
        return read_caption(json.loads(value) if self.caption == "raw" and isinstance(value, str) else value)

    def find_unread(self, content: dict) -> str | None:
        """Return the column in which a row names a medium that is not read."""
        filled = [(name, content[name]) for name in self.others if not is_absent(content.get(name))]
        return find_unread(filled, has_image=True) if filled else None


def read_tables(files: list[Path], root: Path | None, split: str, language: str) -> Pairs:
    """Read the pairs of one or more tables.

    Args:
        root: resolved folder that the images' names are relative to; None where no image is looked for.
        split, language: the rows that count, where there is a column of that name.
    """
    found, choice = FoundPairs(root), RowChoice(split=split, language=language)
    folder, first = os.path.commonpath([file.parent for file in files]), None
    for file in files:
        table = (
            _open_parquet(file, os.path.relpath(file, folder), root)
            if tell_form(file) == "parquet"
            else open_delimited(file)
        )
        roles = _Roles.of(table, needs_image=root is not None)
        first = first or (table, roles)
        if (roles.caption, roles.images[:1]) != (first[1].caption, first[1].images[:1]):
            raise ValueError(
                f"{table.path} and {first[0].path} are tables of different columns ({', '.join(table.columns)}; "
                f"{', '.join(first[0].columns)}): name one of them"
            )
        # Of conversations `language` may be that of a program.
        columns = {"split"} & {*table.columns} if roles.caption in CONVERSATION_FIELDS else table.columns
        for row in table.rows:
            if choice.takes(row.content, columns):
                _add(found, roles, row, needs_image=root is not None)
    found.left_out += choice.count_others()
    return found.pairs()


def _add(found: FoundPairs, roles: _Roles, row: Row, *, needs_image: bool) -> None:
    if roles.caption in CONVERSATION_FIELDS:
        found.add_record(row.place, row.content, row.image, row.num_images)
        return
    if row.num_images > 1:
        found.left_out[WRONG_NUMBER_OF_IMAGES[needs_image]] += 1
        return
    if tasks := roles.find_tasks(row.content):
        found.left_out[
            f"whose column {roles.caption} is no caption beside {', '.join(tasks)} (save those as a column conversations; "
            "or, if it is one, leave them out)"
        ] += 1
        return
    try:
        names = roles.find_images(row.content)
    except Unusable as fault:
        if not row.image:
            found.left_out[describe_fault(fault)] += 1
            return
        names = []
    if len(names) > 1 and not row.image:
        found.left_out[WRONG_NUMBER_OF_IMAGES[needs_image]] += 1
        return
    name = names[0] if names else ""
    image = row.image or (ImageBytes(name, row.place) if isinstance(name, bytes) else name)
    if needs_image and not image:
        found.left_out["that name no image"] += 1
        return
    if unread := roles.find_unread(row.content):
        found.left_out[f"whose column {unread} names a medium that is not read"] += 1
        return
    try:
        caption = roles.get_caption(row.content)
    except (ValueError, TypeError):  # "raw" is not JSON
        found.left_out[f"whose column {roles.caption} cannot be read"] += 1
        return
    found.add(name if name and isinstance(name, str) else row.place, caption, image)


def _open_parquet(path: Path, name: str, root: Path | None) -> Table:
    # Not at the top: pyarrow is needed only for parquet files.
    try:
        from rsa_megatron.data.sources.pair_parquet import open_parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    return open_parquet(path, name, root, {*_CAPTIONS, *_IMAGES, *TASK_FIELDS, "language", "split", "id"})


def holds_conversations(path: Path) -> bool:
    """Return whether a .csv or .tsv has a column of conversations."""
    return bool({*CONVERSATION_FIELDS} & {*open_delimited(path).columns})


class TableRecords:
    """The rows of a .csv or .tsv with a column of conversations, as records; of one split, if it has a column `split`."""

    def __init__(self, path: Path, split: str = "train"):
        self.path, self.image_root = path, path.parent
        table = open_delimited(path)
        columns = table.columns
        if not {*CONVERSATION_FIELDS} & {*columns}:
            raise ValueError(
                f"{path} has no column {' or '.join(CONVERSATION_FIELDS[:2])}; its columns are {', '.join(columns)}"
            )
        choice = RowChoice(split=split)
        #: of each row, whether it is of the split
        self._taken = bytes(choice.takes(row.content, columns) for row in table.rows)
        #: rows that are not read, by why
        self.left_out = choice.count_others()

    def __len__(self) -> int:
        return sum(self._taken)

    def records(self, start: int = 0) -> Iterator[Record]:
        rows = compress(open_delimited(self.path).rows, self._taken)
        for number, row in enumerate(islice(rows, start, None), start):
            yield Record(number, row.place, row.content)


def open_delimited(path: Path) -> Table:
    """Open a .csv or .tsv, also compressed; its first line says which of tab, |, semicolon and comma is between its columns."""
    lines = _read_lines(path)
    header = next(lines, "")
    delimiter = max("\t|,;", key=header.count)
    # Between | nothing is quoted: a quotation mark is the caption's own, and often unpaired.
    form = {"delimiter": delimiter, "quoting": csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL}
    columns = [name.strip() for name in next(csv.reader([header], **form), [])]
    return Table(path, columns, None, _read_rows(path, columns, csv.reader(lines, **form), delimiter))


def _read_rows(path: Path, columns: list[str], reader, delimiter: str) -> Iterator[Row]:
    last = len(columns) - 1
    with _allow_long_fields():
        try:
            for values in filter(None, reader):
                if delimiter == "\t" and any("\n" in value and "\t" in value for value in values):
                    raise csv.Error("a column holds other rows")
                # A delimiter too many is the last column's own, in which captions are. What a row lacks at its end is empty.
                values[last:] = [delimiter.join(values[last:])] if len(values) > last else []
                yield Row(f"{path.name}, line {reader.line_num + 1}", dict(zip(columns, map(str.strip, values))))
        except csv.Error as error:
            line = reader.line_num + 1
            raise ValueError(f"{path}, line {line}: {error}; a quotation mark there may be unpaired") from error


def _read_lines(path: Path) -> Iterator[str]:
    # Bytes that are not UTF-8 pass here, to be found in the caption that has them.
    with open_bytes(path) as file:
        yield from io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


@contextmanager
def _allow_long_fields() -> Iterator[None]:
    # The limit is one for the whole process.
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)
