"""--out of a conversion: checked for room before anything is written, and there only when it is whole."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rsa_megatron.atomic import find_full_disk, make_folder

_OTHER_FILES = 64 * 2**20  # bytes, ample for tokenizer, configs and a checkpoint's metadata


@contextmanager
def output_folder(out: Path, *, num_bytes: int, overwrite: bool, sources: Iterable[Path]) -> Iterator[Path]:
    """Yield a folder to write to, beside `out`, renamed to `out` at the end; removed if anything goes wrong.

    Args:
        out: the name; a folder of that name may exist only with `overwrite`, and stays until the end.
        num_bytes: of weights that will be written.
        overwrite: replace a folder of that name.
        sources: folders that are read, which `out` must not contain.

    Raises:
        ValueError: before anything is written, when `out` is not possible, or the disk has too little room; or when the disk
            turned out to be full.
    """
    _check(out, num_bytes, overwrite, sources)
    unfinished = out.with_name(f"{out.name}.unfinished-{os.getpid()}")
    make_folder(unfinished.parent)
    unfinished.mkdir()  # nobody else's: a folder of that name would be an error
    try:
        yield unfinished
        _put_in_place(unfinished, out)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        what = find_full_disk(error)
        if what is not None:
            raise ValueError(f"--out {out}: {what}; nothing is left there, make room or name another disk") from error
        raise


def _check(out: Path, num_bytes: int, overwrite: bool, sources: Iterable[Path]) -> None:
    if out.exists() and not overwrite:
        raise ValueError(f"--out {out} already exists; name another folder, or pass --overwrite to replace it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    for source in sources:
        if out.resolve() in (source.resolve(), *source.resolve().parents):
            raise ValueError(f"--out {out} contains {source}, which is read; name another folder")
    existing = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    needed = num_bytes + _OTHER_FILES
    if free < needed:
        raise ValueError(
            f"--out {out}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; make room or name another disk"
        )


def _put_in_place(unfinished: Path, out: Path) -> None:
    if not out.exists():
        return _rename(unfinished, out)
    replaced = out.with_name(f"{out.name}.replaced-{os.getpid()}")
    out.rename(replaced)
    _rename(unfinished, out)
    shutil.rmtree(replaced)


def _rename(unfinished: Path, out: Path) -> None:
    unfinished.rename(out)
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
