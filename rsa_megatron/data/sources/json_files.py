"""JSON files of records: a list, one object, a record a line, or records over several lines one after another."""

import codecs
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from rsa_megatron.data.field_values import is_absent
from rsa_megatron.data.records import CAPTION_FIELDS, CONVERSATION_FIELDS
from rsa_megatron.data.sources.compressed import open_bytes
from rsa_megatron.data.sources.record import Record, Unusable

_CHUNK = 1 << 20
# Characters after which what cannot be parsed is broken, rather than cut off by what has been read so far.
_LONGEST_RECORD = 1 << 26
_LINES_LOOKED_AT = 1000


def tell_json_form(path: Path) -> str:
    """Tell whether a file that begins with { or [ is a "json list", "json lines", "json values" or a "json object"."""
    with open_bytes(path) as file:
        lines = (stripped for line in file if (stripped := line.removeprefix(codecs.BOM_UTF8).strip()))
        first = next(lines)
        # Not parsed where it is all there is: it may be a gigabyte, and is parsed when it is read.
        if next(lines, None) is None:
            return "json list" if first[:1] == b"[" else "json object"
        if _parse(first) is not None:
            return "json lines"
        if first[:1] == b"[":
            return "json list"
        if first[-1:] == b"," and _parse(first[:-1]) is not None:
            return "json values"
    with open_bytes(path) as file:
        # A broken first line, and most of the others whole? The lines of an object with an entry a line end in commas; those of
        # an indented one begin with a space, or hold no object.
        others = [line for line in islice(file, 1, _LINES_LOOKED_AT) if line.strip()]
        if 2 * sum(line[:1] == b"{" and isinstance(_parse(line), dict) for line in others) > len(others):
            return "json lines"
    return "json object" if len(list(islice(iterate_values(path), 2))) < 2 else "json values"


def _parse(text: bytes) -> object:
    """Return what a text holds as JSON; None if it is none."""
    try:
        return json.loads(text.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None


class JsonLines:
    """A file with a record a line; empty lines do not count."""

    def __init__(self, path: Path):
        self.path, self.image_root = path, path.parent
        self._length = sum(1 for _ in self._read_lines())

    def __len__(self) -> int:
        return self._length

    def records(self, start: int = 0) -> Iterator[Record]:
        for number, (line_number, line) in enumerate(islice(self._read_lines(), start, None), start):
            yield Record(number, f"{self.path.name}, line {line_number}", _parse_line(line))

    def _read_lines(self) -> Iterator[tuple[int, bytes]]:
        with open_bytes(self.path) as file:
            for line_number, line in enumerate(file, 1):
                if line_number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield line_number, line


def _parse_line(line: bytes):
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unusable("not UTF-8", f"its line is not UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return Unusable("broken line", f"its line is broken JSON: {error}")


class JsonValues:
    """A file with records one after another, each over several lines, or with commas between them."""

    def __init__(self, path: Path):
        self.path, self.image_root = path, path.parent
        self._length = sum(1 for _ in iterate_values(path))

    def __len__(self) -> int:
        return self._length

    def records(self, start: int = 0) -> Iterator[Record]:
        for number, value in enumerate(islice(iterate_values(self.path), start, None), start):
            yield Record(number, f"{self.path.name}, record {number}", value)


def iterate_values(path: Path) -> Iterator[object]:
    """Yield the values of a file one after another; for a broken one an Unusable, then from the next { that begins a line."""
    decoder, buffer = json.JSONDecoder(), ""
    with open_bytes(path) as file:
        text = codecs.getreader("utf-8-sig")(file, errors="surrogateescape")
        at_end = False
        while True:
            buffer = buffer.lstrip(" \t\r\n,")
            try:
                value, end = decoder.raw_decode(buffer)
                # Without more a number, or what has no end mark, might go on.
                if end < len(buffer) or at_end:
                    yield value
                    buffer = buffer[end:]
                    continue
            except (ValueError, RecursionError) as error:
                if at_end and not buffer:
                    return
                if at_end or len(buffer) > _LONGEST_RECORD or isinstance(error, RecursionError):
                    yield Unusable("broken record", f"it is broken JSON: {error}")
                    next_one = buffer.find("\n{", 1)
                    if next_one < 0:
                        return
                    buffer = buffer[next_one:]
                    continue
            more = text.read(max(_CHUNK, len(buffer)))
            at_end = not more
            buffer += more


class JsonList:
    """Records that are held in memory.

    Args:
        records: the file's, or what of it are its records.
    """

    def __init__(self, path: Path, records: list):
        self.path, self.image_root = path, path.parent
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def records(self, start: int = 0) -> Iterator[Record]:
        for number in range(start, len(self)):
            yield Record(number, f"{self.path.name}, record {number}", self._records[number])


def read_json(path: Path) -> object:
    """Read a file that is one JSON value.

    Raises:
        ValueError: it is broken.
    """
    # Bytes that are not UTF-8 pass here, to be found in the sample that has them.
    with open_bytes(path) as file:
        text = file.read().decode("utf-8-sig", "surrogateescape")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path} is JSON too deep to be records or captions") from error
    except ValueError as error:
        raise ValueError(
            f"{path} is broken JSON: {error}; fetch it again (in a .jsonl, only the broken lines are skipped)"
        ) from error


def find_records(path: Path, content: dict) -> list:
    """Find the records in a file that is one JSON object.

    It may be a record; hold a list of records under one key; hold columns, as pandas' to_json and to_dict write them; or
    hold a record under each key.

    Raises:
        ValueError: it is none of these; names its keys and the remedy.
    """
    if rows := _list_rows(content):
        return rows
    if _is_record(content):
        return [content]
    lists = {key: value for key, value in content.items() if isinstance(value, list) and _hold_objects(value)}
    if len(lists) == 1:
        return next(iter(lists.values()))
    if _hold_objects([*content.values()]) and all(_is_record(value) for value in content.values()):
        return [{"id": key} | value for key, value in content.items()]
    if meta := next((v for v in content.values() if isinstance(v, dict) and "annotation" in v and "root" in v), None):
        raise ValueError(
            f"{path} is InternVL's list of data sets ({_name(content)}); name each annotation of it, with its root as the "
            f"folder of images: {meta['annotation']} --images {meta['root']}"
        )
    what = f"holds several lists of records ({_name(lists)})" if lists else f"is an object with {_name(content)}"
    raise ValueError(
        f"{path} {what}; save the records to train on as a list, or one a line, each with conversations or a caption"
    )


def _is_record(value: dict) -> bool:
    return any(not is_absent(value.get(name)) for name in (*CONVERSATION_FIELDS, *CAPTION_FIELDS))


def _list_rows(content: dict) -> list[dict] | None:
    """Return the rows of an object of columns of one length; None if it is not such."""
    columns = {name: [*found.values()] if isinstance(found, dict) else found for name, found in content.items()}
    if len(content) < 2 or not _is_record(content) or not all(isinstance(found, list) for found in columns.values()):
        return None
    talks = [cell for name in CONVERSATION_FIELDS for cell in columns.get(name, [])]
    # The turns of one conversation are no column of conversations.
    if len(set(map(len, columns.values()))) > 1 or any(map(_is_turn, talks)):
        return None
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def _is_turn(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(value.get(name), str) for name in ("from", "role"))


def _hold_objects(values: list) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def _name(content: dict) -> str:
    names = [str(name)[:40] for name in content]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
