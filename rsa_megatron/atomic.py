"""Files and folders that appear under their name only when they are whole.

Both write beside the name, to NAME.unfinished (a file: NAME.unfinished-PID), and rename at the end. If anything goes wrong nothing is left, and what was there
before is untouched. (Work that a killed run resumes keeps its own NAME.unfinished: data/prepare, evaluation/feature_store.py.)
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which then replaces `path`, even if the machine loses power."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
    try:
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
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for file in unfinished.rglob("*"):
            if file.is_file():
                _sync(file)
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
