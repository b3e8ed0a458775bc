"""Files that may be gzips, whatever they are called."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open a file, or what is in it if it is a gzip.

    Raises:
        ValueError: while it is read, if the gzip is broken.
    """
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            yield gzip.open(raw) if is_gzip or path.suffix.lower() == ".gz" else raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is truncated or broken: {error}; fetch it again") from error
