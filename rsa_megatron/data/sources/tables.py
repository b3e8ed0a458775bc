"""Pairs of tables: a column with captions, and one with images or what names them.

    flickr_annotations_30k.csv   raw (a JSON list of sentences), split, filename, ...      Flickr30k, Karpathy's splits
    results.csv                  image_name| comment_number| comment                       Flickr30k, without splits
    wit_v1.train.*.tsv.gz        language, image_url, caption_reference_description, ...   Wikipedia's (WIT)
    *.parquet                    the same columns and, in most, image: {bytes, path}; Wikimedia's WIT, whose texts in all
                                 languages lie in one column wit_features, as well

One pair an image: of several rows that name the same image the first that has a caption. An image that is not in the table
itself is looked for by its file name; where the table has only an address, by its last component.
"""

import csv
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rsa_megatron.data.sources.coco import FoundPairs, join_answers
from rsa_megatron.data.sources.pairs import Pairs, Row, Table

# Of each, the first that a table has counts. "raw" holds a JSON list; the others a text, a list of texts or a conversation.
_CAPTIONS = (
    "caption_reference_description",
    "raw",
    "comment",
    "caption",
    "captions",
    "text",
    "conversations",
    "messages",
)
_FILES = ("file_name", "filename", "image_name", "image_path", "image_file", "image")
_ADDRESSES = ("image_url", "url")
# Characters of a field. csv's own limit of 131,072 is below some pages' descriptions; an unpaired
# quotation mark would make one field of the rest of the file.
_LONGEST_FIELD = 1 << 24


@dataclass(frozen=True)
class _Roles:
    """Which column is what."""

    caption: str
    file: str | None
    address: str | None
    language: str | None
    split: str | None

    @classmethod
    def of(cls, table: Table) -> "_Roles":
        def first(*known: str) -> str | None:
            return next((name for name in known if name in table.columns and name != table.image_column), None)

        roles = cls(first(*_CAPTIONS), first(*_FILES), first(*_ADDRESSES), first("language"), first("split"))
        theirs = f"its columns are {', '.join(table.columns)}; rename the one that has them"
        if roles.caption is None:
            raise ValueError(f"{table.path} has no column of captions ({', '.join(_CAPTIONS)}), {theirs}")
        if not (roles.file or roles.address or table.image_column):
            raise ValueError(
                f"{table.path} has no column that names images ({', '.join(_FILES + _ADDRESSES)}), {theirs}"
            )
        return roles

    def get_name(self, content: dict) -> str | None:
        """Return what names the image: its file, or its address."""
        return next(
            (str(content[column]) for column in (self.file, self.address) if column and content.get(column)), None
        )

    def get_file(self, content: dict) -> str | None:
        """Return the image's file name in the folder of images; None where nothing names it."""
        name = self.get_name(content)
        is_address = name and not (self.file and content.get(self.file))
        return unquote(urlsplit(name).path.rpartition("/")[2]) if is_address else name

    def get_caption(self, content: dict) -> str:
        value = content.get(self.caption)
        if self.caption == "raw":
            value = json.loads(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return join_answers(value)
        if isinstance(value, list):
            value = next((text for text in value if isinstance(text, str) and text.strip()), None)
        return value if isinstance(value, str) else ""


def read_tables(files: list[Path], root: Path, split: str, language: str) -> Pairs:
    """Read the pairs of one or more tables.

    Args:
        root: resolved folder that the images' names are relative to.
        split, language: the rows that count, where there is a column of that name.
    """
    found, skipped = FoundPairs(root), {"split": Counter(), "language": Counter()}
    folder = os.path.commonpath([file.parent for file in files])
    for file in files:
        table = (
            _open_parquet(file, os.path.relpath(file, folder), root)
            if file.suffix.lower() == ".parquet"
            else _open_delimited(file)
        )
        roles = _Roles.of(table)
        for row in table.rows:
            if roles.split and row.content.get(roles.split) != split:
                skipped["split"][str(row.content.get(roles.split))] += 1
            elif roles.language and row.content.get(roles.language) != language:
                skipped["language"][str(row.content.get(roles.language))] += 1
            else:
                _add(found, roles, row)
    for name, wanted in (("split", split), ("language", language)):
        if skipped[name]:
            kinds = ", ".join(f"{kind} ({count})" for kind, count in skipped[name].most_common(8))
            found.left_out[f"of another {name} than {wanted!r} (--{name} selects it; found: {kinds})"] = skipped[
                name
            ].total()
    return found.pairs()


def _add(found: FoundPairs, roles: _Roles, row: Row) -> None:
    image = row.image or roles.get_file(row.content)
    if not image:
        found.left_out["that name no image"] += 1
        return
    try:
        caption = roles.get_caption(row.content)
    except (ValueError, TypeError):  # "raw" is not JSON, or a conversation not one
        found.left_out[f"whose column {roles.caption} cannot be read"] += 1
        return
    found.add(image if isinstance(image, str) else roles.get_name(row.content) or row.place, caption, image)


def _open_parquet(path: Path, name: str, root: Path) -> Table:
    # Not at the top: pyarrow is needed only for parquet files.
    try:
        from rsa_megatron.data.sources.pair_parquet import open_parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    return open_parquet(path, name, root, {*_CAPTIONS, *_FILES, *_ADDRESSES, "language", "split"})


def _open_delimited(path: Path) -> Table:
    """Open a .csv or .tsv, also compressed; its first line says which of tab, | and comma is between its columns."""
    lines = _read_lines(path)
    header = next(lines, "")
    delimiter = max("\t|,", key=header.count)
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
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        # Bytes that are not UTF-8 pass here, to be found in the caption that has them.
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is truncated or broken: {error}; fetch it again") from error


@contextmanager
def _allow_long_fields() -> Iterator[None]:
    # The limit is one for the whole process.
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)
