"""Files and folders that appear under their name only when they are whole.

Both write beside the name, to NAME.unfinished (a file: NAME.unfinished-PID), and rename at the end. If anything goes wrong nothing is left, and what was there
before is untouched. (Work that a killed run resumes keeps its own NAME.unfinished: data/prepare, evaluation/feature_store.py.)
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which then replaces `path`, even if the machine loses power."""
    path = Path(path)
    make_folder(path.parent)
    unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
    try:
        with explain_full_disk(path):
            yield unfinished
            _sync(unfinished)
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole file, or leave what is there."""
    with new_file(path) as unfinished:
        unfinished.write_text(text)


def remove_unfinished_files(folder: Path) -> None:
    """Remove what killed processes have left of files in a folder. Only where no other process writes."""
    for path in folder.glob("*.unfinished-*"):
        path.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to write to, which then gets the name `path`.

    Raises:
        OSError: there is a folder of that name with something in it, when the new one is to take its place.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with explain_full_disk(path):
            make_folder(unfinished)
            yield unfinished
            for file in unfinished.rglob("*"):
                if file.is_file():
                    _sync(file)
            unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where they are not there. Raises OSError that names a file in their place."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None)
        if file is None:
            raise
        raise OSError(f"the folder {path} cannot be made: {file} is a file; name another") from error


@contextmanager
def explain_full_disk(
    path: Path, remedy: str = "nothing half-written is left; make room or name another disk"
) -> Iterator[None]:
    """Raise an OSError that names `path` and a remedy, where what is done inside ends for want of room: the system's names neither."""
    try:
        yield
    except Exception as error:
        reason = find_full_disk(error)
        if reason is None:
            raise
        raise OSError(f"{path}: {reason}; {remedy}") from error


#: What the system says of a full disk, a used-up quota, and a file that may not grow.
_FULL = {number: os.strerror(number).lower() for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}


def find_full_disk(error: BaseException | None) -> str | None:
    """Find the full disk behind an error: torch and safetensors put errors of their own in front of the system's, or in its place."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return _FULL[error.errno]
        # In words: safetensors, which is in Rust, and shutil, which lists one for each file.
        number = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error))
        if number and int(number[1] or number[2]) in _FULL:
            return _FULL[int(number[1] or number[2])]
        if "database or disk is full" in str(error):  # SQLite, of Energon's index
            return _FULL[errno.ENOSPC]
        error = error.__cause__ or error.__context__
    return None


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
