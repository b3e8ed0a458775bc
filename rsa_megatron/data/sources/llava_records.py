"""Data as people have it, read one record after another.

    JSON of any shape                records (data/records.py says of which form): a list, one a line, one after another, columns
    mixture.yaml                     LLaVA-OneVision's list of such files, each with a sampling_strategy
    x.parquet, or a folder of them   Hugging Face's: the same fields as columns, the images within
    x.csv, x.tsv                     with a column of conversations, as JSON
    a folder                         a.jpg beside a.txt with its caption, in folders of folders; or images with a metadata.jsonl or
                                     metadata.csv, Hugging Face's imagefolder

A source has a length, and `records(start)` begins anywhere: the n-th record is the same one each time, which is what
a resumed run relies on. Here a record is only found; records.py reads it, sample_checks.py opens its images.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml

from rsa_megatron.data.media_names import IMAGE_SUFFIXES
from rsa_megatron.data.records import CAPTION_PROMPT
from rsa_megatron.data.sources import json_files
from rsa_megatron.data.sources.file_forms import FORMATS, INDEX_TARS, tell_form
from rsa_megatron.data.sources.folder_files import (
    choose_split,
    choose_tables,
    has_parquet,
    leave_out_formats,
    list_named,
    list_records,
    walk_folders,
)
from rsa_megatron.data.sources.onevision_yaml import Mixture
from rsa_megatron.data.sources.pairs import format_counts
from rsa_megatron.data.sources.record import Record, Source, Unusable, resolve_inside
from rsa_megatron.data.sources.tables import TableRecords

_METADATA = ("metadata.jsonl", "metadata.csv")


def open_source(path: str | Path, *, seed: int = 0, split: str = "train") -> Source:
    """Tell what a file or folder is, and open it.

    Args:
        seed: of the sampling_strategy "random".
        split: of a folder whose files' names say one (folder_files.py), and of a table with a column `split`.

    Raises:
        ValueError: it is none of the formats, or cannot be read at all.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; name {FORMATS}")
    try:
        file, left_out = find_metadata(path, split)
        source = _open(file, seed, split)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    count_left_out(source, left_out)
    if not len(source):
        needs = _describe_folder(path) if path.is_dir() else ""
        raise ValueError(
            f"{path}: no sample found{f': {format_counts(source.left_out)}' if source.left_out else needs}"
        )
    return source


def count_left_out(source: Source, left_out: Counter[str]) -> None:
    """Add what was left out on the way to a source to what it has left out itself."""
    source.left_out = Counter(getattr(source, "left_out", ())) + left_out


def find_metadata(path: Path, split: str) -> tuple[Path, Counter[str]]:
    """Find the file that says what is in a folder of images, as Hugging Face's imagefolder has it.

    Returns:
        The file, or the path itself; and how many such files are not read, by why.

    Raises:
        ValueError: it is a prepared data set, or has several such files.
    """
    left_out = Counter()
    if not path.is_dir():
        return path, left_out
    if (path / ".nv-meta").is_dir():
        raise ValueError(
            f"{path} is a prepared data set: --data-path {path} trains on it, `rsa-megatron data show` shows it"
        )
    found = list(filter(_names_files, list_named(path, _METADATA.__contains__)))
    if not found or has_parquet(path):
        return path, left_out
    if len(found) > 1:
        names, left_out = choose_split(path, [file.relative_to(path).as_posix() for file in found], split)
        found = [path / name for name in names]
    if len(found) > 1:
        raise ValueError(f"{path} has several files of metadata ({', '.join(map(str, found[:8]))}); name one of them")
    return found[0], left_out


def _names_files(metadata: Path) -> bool:
    with metadata.open("rb") as file:
        return b"file_name" in file.read(1 << 16).partition(b"\n")[0]


def _describe_folder(path: Path) -> str:
    needs = ": it needs images with a .txt beside each, or a metadata.jsonl, or .parquet files"
    files = sorted(
        file.name for file in path.iterdir() if file.suffix.lower() in (".json", ".jsonl", ".csv", ".tsv", ".yaml")
    )
    if any(path.glob("*.tar")):
        return f"{needs}; its tars can be trained on as they are, once they are indexed: `{INDEX_TARS} {path}`"
    return f"{needs}; or name a file in it, such as {path / files[0]}" if files else needs


def _open(path: Path, seed: int, split: str) -> Source:
    if path.is_dir():
        chosen = choose_tables(path, split)
        return _open_parquet(chosen.files, path, split, chosen.left_out) if chosen.files else CaptionFolder(path, split)
    form = tell_form(path)
    if form == "parquet":
        return _open_parquet([path], path.parent, split)
    if form == "yaml":
        return Mixture(path, open_source, seed=seed, split=split)
    if form == "json lines":
        return json_files.JsonLines(path)
    if form == "json values":
        return json_files.JsonValues(path)
    if form == "table":
        return TableRecords(path, split)
    if form == "text" and not path.stat().st_size:
        raise ValueError(f"{path} is empty (0 bytes)")
    if form == "text":
        raise ValueError(f"{path} is not {FORMATS}; it is a text that begins with {_read_start(path)!r}")
    content = json_files.read_json(path)
    if isinstance(content, dict):
        content = json_files.find_records(path, content)
    return json_files.JsonList(path, content)


def _read_start(path: Path) -> str:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.read(60)


def _open_parquet(files: list[Path], image_root: Path, split: str, left_out: Counter[str] | None = None) -> Source:
    # Not at the top: pyarrow is needed only for parquet files.
    try:
        from rsa_megatron.data.sources.parquet import Parquet
    except ImportError as error:
        raise ValueError(f"{files[0]}: reading parquet needs pyarrow: pip install pyarrow") from error
    return Parquet(files, image_root, split, left_out)


class CaptionFolder:
    """Images, each beside a text file of the same name with its caption; of the folders of one split, if they are named so."""

    def __init__(self, root: Path, split: str = "train"):
        self.image_root = root
        images: dict[str, list[str]] = {}
        self._texts = set()
        for folder, _, names in walk_folders(root):
            for name in names:
                stem, suffix = os.path.splitext(os.path.relpath(os.path.join(folder, name), root))
                if suffix.lower() in IMAGE_SUFFIXES:
                    images.setdefault(stem, []).append(stem + suffix)
                elif suffix == ".txt":
                    self._texts.add(stem)
        self._images = images
        self._stems = sorted(images.keys() | self._texts) if images and self._texts else []
        #: files that are not read, by why
        self.left_out = Counter()
        if self._stems:
            self._stems, self.left_out = choose_split(root, self._stems, split, by=os.path.dirname)
            self.left_out += leave_out_formats(list_records(root), "images with a .txt beside each")

    def __len__(self) -> int:
        return len(self._stems)

    def records(self, start: int = 0) -> Iterator[Record]:
        for number in range(start, len(self)):
            stem = self._stems[number]
            try:
                content = self._read_content(stem)
            except Unusable as fault:
                content = fault
            yield Record(number, stem, content)

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
