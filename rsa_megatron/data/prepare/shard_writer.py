"""Writes samples into files whose length at any time can be noted, so that a run that was killed resumes there.

A position says how long a file was and what it held; files are truncated to it before more is written. What is
written depends only on the samples: no clock, no user's name. So the bytes are those of a run that was never killed,
and a later file that exists is overwritten.
"""

import contextlib
import io
import json
import os
import signal
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import yaml
from megatron.energon.epathlib import EPath
from megatron.energon.flavors import BaseWebdatasetFactory
from megatron.energon.flavors.jsonl.jsonl_prepare import JsonlPreparator


class ShardSample(Protocol):
    """What a tar takes."""

    #: its name there
    key: str

    def in_shard(self) -> dict[str, bytes]:
        """Return its files by name."""


class TarShards:
    """SPLIT-00000.tar, SPLIT-00001.tar, ..., of `shard_size` samples each.

    Args:
        position: as `position` gave it; None for the beginning.
    """

    def __init__(self, folder: Path, part: str, shard_size: int, position: dict | None):
        self._folder, self._part, self._shard_size = folder, part, shard_size
        position = position or {"shard": 0, "samples": 0, "bytes": 0}
        self._shard, self._samples, self._bytes = position["shard"], position["samples"], position["bytes"]
        self._file = self._tar = None
        if self._samples:
            self._open()

    def write(self, sample: ShardSample) -> bool:
        """Write a sample; return whether it completes a shard."""
        if self._tar is None:
            self._open()
        for name, data in sample.in_shard().items():
            member = tarfile.TarInfo(f"{sample.key}.{name}")
            member.size, member.mode = len(data), 0o644
            self._tar.addfile(member, io.BytesIO(data))
        self._samples += 1
        self._bytes = self._file.tell()
        if self._samples < self._shard_size:
            return False
        self.close()
        self._shard, self._samples, self._bytes = self._shard + 1, 0, 0
        return True

    def position(self) -> dict:
        if self._file is not None:
            _sync(self._file)
        return {"shard": self._shard, "samples": self._samples, "bytes": self._bytes}

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            _sync(self._file)
            self._file.close()
            self._file = self._tar = None

    def _open(self) -> None:
        self._file = _open_truncated(self._folder / f"{self._part}-{self._shard:05d}.tar", self._bytes)
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)


class Lines:
    """A JSONL file.

    Args:
        position: as `position` gave it; None for the beginning.
        note_every: every N lines `write` returns True: time to note the position.
    """

    def __init__(self, path: Path, position: dict | None, *, note_every: int = 1000):
        position = position or {"lines": 0, "bytes": 0}
        self._num_lines, self._note_every = position["lines"], note_every
        self._file = _open_truncated(path, position["bytes"])

    def write(self, content: dict) -> bool:
        # Bytes of names and texts that are not UTF-8 become JSON's escapes.
        self._file.write(json.dumps(content, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        self._num_lines += 1
        return self._num_lines % self._note_every == 0

    def position(self) -> dict:
        _sync(self._file)
        return {"lines": self._num_lines, "bytes": self._file.tell()}

    def close(self) -> None:
        _sync(self._file)
        self._file.close()


def _open_truncated(path: Path, length: int) -> io.BufferedRandom:
    """Open a file truncated to its first `length` bytes, at its end."""
    file = path.open("r+b" if path.exists() else "w+b")
    if file.seek(0, io.SEEK_END) < length:
        file.close()
        raise ValueError(f"{path} is shorter than it was when written; remove its folder and start again")
    file.truncate(length)
    file.seek(length)
    return file


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def index_shards(folder: Path, *, subflavors: dict, num_workers: int) -> None:
    """Do what `energon prepare` does for a folder of shards, and write the subflavors that the task encoder reads."""
    tars = sorted(path.name for path in folder.glob("*.tar"))
    parts = [part for part in ("train", "val", "test") if any(tar.startswith(part) for tar in tars)]
    patterns = [(part, f"{part}-.*") for part in parts]
    with contextlib.redirect_stdout(io.StringIO()), _quiet_workers():
        BaseWebdatasetFactory.prepare_dataset(
            EPath(folder), tars, split_parts_patterns=patterns, shuffle_seed=None, workers=num_workers
        )
    settings = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset", "subflavors": subflavors}
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


@contextlib.contextmanager
def _quiet_workers() -> Iterator[None]:
    """Let worker processes end silently at Ctrl-C, which reaches them too: each would print a traceback. This process raises."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    parent = os.getpid()

    def end(number, frame) -> None:
        if os.getpid() != parent:
            os._exit(1)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def index_lines(folder: Path, image_root: Path, *, rsa: bool) -> None:
    """Index train.jsonl and val.jsonl, and write the mixture that names them and the folder of their images."""
    splits = {}
    for part in ("train", "val"):
        path = folder / f"{part}.jsonl"
        if path.stat().st_size:
            JsonlPreparator.prepare_dataset(EPath(path))
            aux = {"images": f"filesystem://{image_root}"}
            splits[part] = {"path": path.name, "subflavors": {"rsa": rsa}, "aux": aux}
        else:
            path.unlink()
    mixture = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixture, sort_keys=False, allow_unicode=True))
