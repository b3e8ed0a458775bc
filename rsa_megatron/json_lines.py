"""Files with a JSON object a line, whose keys are checked as they are taken: a fault names file, line and key."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Line:
    """A line of a file, and where it is."""

    where: str
    values: dict[str, Any]

    def take(self, key: str, fits: Callable[[Any], bool], needs: str) -> Any:
        """Return the value of a key, which must be there and fit."""
        if key not in self.values:
            raise self.fault(key, f"is missing; it must be {needs}")
        if not fits(self.values[key]):
            raise self.fault(key, f"is {needs}, not {str(self.values[key])[:60]!r}")
        return self.values[key]

    def fault(self, key: str, what: str) -> ValueError:
        return ValueError(f"{self.where}: {key!r} {what}")


def json_lines(path: Path) -> list[Line]:
    try:
        texts = path.read_text(encoding="utf-8-sig").split("\n")  # no other line ends: a JSON text may hold them
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}") from error
    lines = []
    for number, text in enumerate(texts, 1):
        if text.strip():
            lines.append(Line(f"{path}, line {number}", json_object(text, f"{path}, line {number}")))
    if not lines:
        raise ValueError(f"{path} is empty")
    return lines


def json_object(text: str, where: str) -> dict:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: broken JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where}: not a JSON object")
    return values


def is_name(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value) -> bool:
    return is_whole(value) and value > 0


def is_number(value) -> bool:
    # NaN is not below anything, and a whole number of any length compares.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_number_or_null(value) -> bool:
    return value is None or is_number(value)


def is_object(value) -> bool:
    return isinstance(value, dict)


def is_list(value, fits) -> bool:
    return isinstance(value, list) and bool(value) and all(map(fits, value))
