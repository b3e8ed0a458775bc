"""The values of a record's fields: which are as good as none, and what a text or an object stands for."""

import ast
import json
import math
from collections.abc import Mapping, Sequence


def is_absent(value) -> bool:
    """Return whether a field with this value is as good as none: null, NaN, an empty text, or a list or object of such."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, Mapping):
        return all(map(is_absent, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_absent, value))
    return isinstance(value, bytes) and not value


def is_null_text(value) -> bool:
    """Return whether a text is a null that was written as one."""
    return isinstance(value, str) and value.strip().lower() in ("none", "null", "nan", "<na>", "n/a", "false", "no")


def escape_surrogates(text: str) -> str:
    """Return a text that can be written as UTF-8: what is not, as in a file's name in Latin-1, as its escape."""
    return text.encode(errors="backslashreplace").decode()


def parse_text(value) -> object:
    """Return the list or object that a text holds, as JSON or as Python writes it; the value itself if it is none."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # all that literal_eval raises
            continue
    return value


def list_objects(value: Mapping) -> list[dict] | None:
    """Turn an object of lists into a list of objects, as arrow turns the one into the other; None if it is not such."""
    columns = {name: column for name, column in value.items() if not is_absent(column)}
    are_lists = all(isinstance(c, Sequence) and not isinstance(c, (str, bytes)) for c in columns.values())
    if not columns or not are_lists or len(set(map(len, columns.values()))) > 1:
        return None
    return [dict(zip(columns, row)) for row in zip(*columns.values())]
