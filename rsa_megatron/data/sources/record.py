"""What lies between a source of data and its reader: a record as it was found, and why one cannot be used."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from rsa_megatron.data.field_values import escape_surrogates


class Unusable(Exception):
    """A sample that is skipped: the kind of fault, to be counted by, and what it is in this one."""

    def __init__(self, kind: str, reason: str):
        # A "path" may be a whole picture in base64.
        super().__init__(escape_surrogates(reason if len(reason) <= 400 else reason[:400] + "..."))
        self.kind = escape_surrogates(kind)


@dataclass(frozen=True)
class Record:
    """One sample as it was found."""

    #: in its source, from 0
    number: int
    #: file and line, or what else finds it again
    place: str
    #: as `read_record` takes it; or what is wrong with it
    content: object


class Source(Protocol):
    """What `open_source` gives."""

    #: paths of images are relative to it, unless the user names another folder
    image_root: Path

    def __len__(self) -> int: ...

    def records(self, start: int = 0) -> Iterator[Record]: ...


def resolve_inside(root: Path, reference: str) -> Path:
    """Find the path of a file below `root`, a resolved folder.

    A record may not lead out of the folder, by ../ or an absolute path. A link that lies in the folder may, such as images ->
    /data/coco, or those of the hub's cache: whoever has put it there wants it followed.

    Args:
        reference: a path relative to the folder, or an absolute one below it (file:// too), or an address, of whose last
            component a file lies in the folder: nothing is downloaded.

    Raises:
        Unusable: it is not below the folder, or no path.
    """
    try:
        name = unquote(urlsplit(reference).path) if reference[:7].lower() == "file://" else reference
        if name[:8].lower().startswith(("http://", "https://", "s3://", "gs://", "hf://")):
            name = unquote(urlsplit(name).path).rpartition("/")[2]
            if not name or not (root / name).is_file():
                raise Unusable(
                    "missing image",
                    f"{reference} is an address, nothing is downloaded, and {root} has no file {name}; --images names the folder",
                )
        given, resolved = Path(os.path.normpath(root / name)), (root / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a zero in the name, a loop of links, half an address
        raise Unusable("missing image", f"{reference!r} is not a path or address: {error}") from error
    for path in (given, resolved):  # the second: an absolute path to the folder by a link
        if path.is_relative_to(root):
            return path
    raise Unusable("outside of the image folder", f"{reference} leads out of {root}; --images names the folder")


def relate(root: Path, reference: str, resolved: Path) -> str:
    """Return the path of a file relative to `root`: as it was given, if it was and goes straight down."""
    is_relative = not os.path.isabs(reference) and "://" not in reference and ".." not in Path(reference).parts
    return reference if is_relative else str(resolved.relative_to(root))
