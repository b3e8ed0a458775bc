"""Data as people have it: the formats that LLaVA's data comes in, read one record after another.

    captions.json, captions.jsonl    LLaVA's records: {"id", "image": path or paths, "conversations": [{"from", "value"}]};
                                     "images" and "messages" are read as well
    mixture.yaml                     LLaVA-OneVision's list of such files, each with a sampling_strategy
    x.parquet, or a folder of them   Hugging Face's: the same columns, the images within
    a folder                         a.jpg beside a.txt with its caption, in folders of folders

A source has a length, and `records(start)` begins anywhere: the n-th record is the same one each time, which is what
a resumed run relies on. Here a record is only found; sample_checks.py judges what is in it.
"""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import yaml

from rsa_megatron.data.sources.onevision_yaml import Mixture
from rsa_megatron.data.sources.record import Record, Source, Unusable, resolve_inside

CAPTION_PROMPT = "<image>\nPlease generate detailed descriptions of the given image."
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_source(path: str | Path, *, seed: int = 0) -> Source:
    """Tell what a file or folder is, and open it.

    Args:
        seed: of the sampling_strategy "random".

    Raises:
        ValueError: it is none of the formats, or cannot be read at all.
    """
    path = Path(path)
    try:
        source = _open(path, seed)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not len(source):
        needs = ": it needs images with a .txt beside each, or .parquet files" if path.is_dir() else ""
        raise ValueError(f"{path}: no sample found{needs}")
    return source


def _open(path: Path, seed: int) -> Source:
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
        return _open_parquet(files, path) if files else CaptionFolder(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _open_parquet([path], path.parent)
    if suffix in (".yaml", ".yml"):
        return Mixture(path, open_source, seed=seed)
    if suffix in (".json", ".jsonl"):
        return JsonLines(path) if suffix == ".jsonl" or _read_first_character(path) != "[" else JsonList(path)
    raise ValueError(
        f"{path} is not a .json, .jsonl, .yaml, .parquet or folder of images with texts or of .parquet files"
    )


def _open_parquet(files: list[Path], image_root: Path) -> Source:
    # Not at the top: pyarrow is needed only for parquet files.
    try:
        from rsa_megatron.data.sources.parquet import Parquet
    except ImportError as error:
        raise ValueError(f"{files[0]}: reading parquet needs pyarrow: pip install pyarrow") from error
    return Parquet(files, image_root)


def _read_first_character(path: Path) -> str:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.read(10_000).lstrip()[:1]


class JsonList:
    """A JSON file with a list of records; it is held in memory."""

    def __init__(self, path: Path):
        self.path, self.image_root = path, path.parent
        # Bytes that are not UTF-8 pass here, to be found in the sample that has them.
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        try:
            self._records = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is broken JSON: {error}; in a .jsonl, only the broken lines are skipped"
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def records(self, start: int = 0) -> Iterator[Record]:
        for number in range(start, len(self)):
            yield Record(number, f"{self.path.name}, record {number}", self._records[number])


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
        with self.path.open("rb") as file:
            for line_number, line in enumerate(file, 1):
                if line_number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield line_number, line


def _parse_line(line: bytes):
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unusable("not UTF-8", f"its line is not UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return Unusable("broken line", f"its line is broken JSON: {error}")


class CaptionFolder:
    """Images, each beside a text file of the same name with its caption."""

    def __init__(self, root: Path):
        self.image_root = root
        images: dict[str, list[str]] = {}
        self._texts = set()
        for folder, _, names in os.walk(root):
            for name in names:
                stem, suffix = os.path.splitext(os.path.relpath(os.path.join(folder, name), root))
                if suffix.lower() in IMAGE_SUFFIXES:
                    images.setdefault(stem, []).append(stem + suffix)
                elif suffix == ".txt":
                    self._texts.add(stem)
        self._images = images
        self._stems = sorted(images.keys() | self._texts) if images else []

    def __len__(self) -> int:
        return len(self._stems)

    def records(self, start: int = 0) -> Iterator[Record]:
        for number in range(start, len(self)):
            stem = self._stems[number]
            try:
                content = self._read_content(stem)
            except Unusable as fault:
                content = fault
            yield Record(number, stem, content, may_lack_image_token=True)

    def _read_content(self, stem: str) -> dict:
        images = self._images.get(stem, [])
        if not images:
            raise Unusable("missing image", f"{stem}.txt has no image of that name beside it")
        if len(images) > 1:
            raise Unusable("number of images", f"{', '.join(sorted(images))} have one text between them")
        if stem not in self._texts:
            raise Unusable("no text", f"{images[0]} has no {stem}.txt beside it")
        try:
            caption = (
                resolve_inside(self.image_root.resolve(), stem + ".txt")
                .read_bytes()
                .decode("utf-8-sig", "surrogateescape")
            )
        except OSError as error:
            raise Unusable("no text", f"{stem}.txt cannot be read: {error}") from error
        turns = [{"from": "human", "value": CAPTION_PROMPT}, {"from": "gpt", "value": caption.strip()}]
        return {"id": stem, "image": images[0], "conversations": turns}
