"""What lies between a source of data and its reader: a record as it was found, and why one cannot be used."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Unusable(Exception):
    """A sample that is skipped: the kind of fault, to be counted by, and what it is in this one."""

    def __init__(self, kind: str, reason: str):
        # A "path" may be a whole picture in base64.
        super().__init__(reason if len(reason) <= 400 else reason[:400] + "...")
        self.kind = kind


@dataclass(frozen=True)
class Record:
    """One sample as it was found."""

    #: in its source, from 0
    number: int
    #: file and line, or what else finds it again
    place: str
    #: as LLaVA's JSON has it, where an image may also be its bytes; or what is wrong with it
    content: object
    #: the text of an image may lack its <image>
    may_lack_image_token: bool = False


class Source(Protocol):
    """What `open_source` gives."""

    #: paths of images are relative to it, unless the user names another folder
    image_root: Path

    def __len__(self) -> int: ...

    def records(self, start: int = 0) -> Iterator[Record]: ...


def resolve_inside(root: Path, relative: str) -> Path:
    """Resolve the path of a file below `root`, a resolved folder; links that lead out of it count as outside."""
    fault = Unusable("outside of the image folder", f"{relative} leads out of {root}")
    if os.path.isabs(relative) or ".." in Path(relative).parts:
        raise fault
    try:
        resolved = (root / relative).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a zero in the name, a loop of links
        raise Unusable("missing image", f"{relative!r} is not a path: {error}") from error
    if not resolved.is_relative_to(root):
        raise fault
    return resolved
