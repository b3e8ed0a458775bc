"""Pairs of Energon shards, any of them at once: Energon's index says where in which tar each file of a sample lies.

Of the tars nothing is read until a pair is accessed: then its record, and its image when that is opened.
"""

import json
import os
import sqlite3
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import yaml
from megatron.energon import WorkerConfig
from megatron.energon.flavors import BaseWebdatasetFactory
from megatron.energon.flavors.jsonl.crude_jsonl_dataset import CrudeJsonlDatasetFactory
from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError
from megatron.energon.flavors.webdataset.metadata import get_info_shard_files
from megatron.energon.metadataset import load_dataset
from megatron.energon.metadataset.loader_interface import LoadedDataset
from PIL import Image

from rsa_megatron.data.records import read_record
from rsa_megatron.data.rsa_flag import read_rsa_flag
from rsa_megatron.data.sources.coco import WRONG_NUMBER_OF_IMAGES, read_records
from rsa_megatron.data.sources.json_files import JsonLines
from rsa_megatron.data.sources.pairs import CaptionedImage, Pairs, decode, join, without_image
from rsa_megatron.data.sources.record import Unusable
from rsa_megatron.data.stored_parts import pick_parts
from rsa_megatron.data.tiles import IMAGE_PART
from rsa_megatron.data.typed_samples import check_type, is_text, is_typed, read_fields

_PARTS_OF_A_TAR = """
    SELECT s.sample_key, p.part_name, p.content_byte_offset, p.content_byte_size
    FROM samples AS s JOIN sample_parts AS p ON p.tar_file_id = s.tar_file_id AND p.sample_index = s.sample_index
    WHERE s.tar_file_id = ? ORDER BY s.sample_index, p.content_byte_offset
"""


@dataclass(frozen=True, slots=True)
class _File:
    """A file in a tar."""

    tar: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        try:
            with self.tar.open("rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise ValueError(f"{self.tar} cannot be read: {error.strerror}; restore the file") from error


@dataclass(frozen=True, slots=True)
class _StoredPair:
    """A sample of one image, or of none, not read yet."""

    key: str
    #: those that hold text
    texts: tuple[_File, ...]
    image: _File | None
    opens_image: bool
    #: of a data set of Energon's own types of samples
    typed: BaseWebdatasetFactory | None = None

    def load(self) -> CaptionedImage:
        try:
            read = read_record(self._read_content(), texts_alone=True)
        except (ValueError, Unusable, RecursionError) as error:
            raise ValueError(f"{self.texts[0].tar}, {self.texts[0].name}: it has no caption: {error}") from error
        image = partial(_open, self.image) if self.opens_image else without_image(self.key)
        return CaptionedImage(self.key, read.caption, image, read.as_dict())

    def _read_content(self) -> object:
        parts = {part.name: part.read() for part in self.texts}
        parts |= {} if self.image is None else {self.image.name: self.image}
        if self.typed:
            return read_fields(self.typed, parts)[1]
        _, record = pick_parts(parts)
        return json.loads(record) if isinstance(record, bytes) else record


def _open(part: _File) -> Image.Image:
    return decode(part.read(), f"{part.tar}, {part.name}")


def read_shards(path: Path, split: str, *, needs_image: bool = True) -> Pairs:
    """Read the samples of exactly one image of a data set, or of the data sets of a mixture one after the other.

    Of a mixture, data sets with `rsa: false` are skipped: their answers are not captions. Weights and repetitions do
    not count, a `subset` does. Keys are "SHARD/SAMPLE", in a mixture with the data set's folder before it.

    Args:
        needs_image: False takes samples of no image too, and looks for no images.
    """
    is_mixture = path.is_file()
    parts = []
    for loaded in _load_data_sets(path, split):
        data_set, data_path = loaded.dataset, _get_local_path(path, loaded)
        is_jsonl = isinstance(data_set, CrudeJsonlDatasetFactory)
        name = os.path.relpath(data_path, os.path.abspath(path.parent))
        prefix = f"{os.path.dirname(name) if is_jsonl else name}/" if is_mixture else ""
        if is_mixture and not read_rsa_flag(data_set.subflavors, default=True):
            parts.append(Pairs.of([], Counter({f"of {name}, which has rsa: false": len(data_set)})))
        elif is_jsonl:
            images = _get_image_folder(path, loaded) if needs_image else None
            parts.append(read_records(JsonLines(data_path), images, _get_subset(data_set), prefix))
        else:
            parts.append(_read_index(data_set, data_path, prefix, needs_image))
    return join(parts)


def list_splits(folder: Path) -> list[str]:
    """List the splits of a folder that have shards: train, val, ...; ValueError if its index cannot be read."""
    parts = _read_nv_meta(folder, "split.yaml").get("split_parts")
    if not isinstance(parts, dict):
        raise ValueError(
            f"{folder / '.nv-meta' / 'split.yaml'} names no split_parts; run `energon prepare --force-overwrite {folder}`"
        )
    return [part for part, shards in parts.items() if shards]


def is_rsa(folder: Path) -> bool:
    """Return whether a folder of shards has `rsa: true`."""
    return read_rsa_flag(_read_nv_meta(folder, "dataset.yaml").get("subflavors"), default=False)


def _read_nv_meta(folder: Path, name: str) -> dict:
    path = folder / ".nv-meta" / name
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}; run `energon prepare --force-overwrite {folder}`") from error
    return content if isinstance(content, dict) else {}


def _load_data_sets(path: Path, split: str) -> list[LoadedDataset]:
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    try:
        return load_dataset(path).get_datasets(training=False, split_part=split, worker_config=config).datasets
    except (ValueError, KeyError, OSError, AssertionError, EmptyDatasetError) as error:
        raise ValueError(
            f"{path}, split {split!r}: {error}; name another --split, or data that has this one "
            "(rsa-megatron data pack --val) and all of whose data sets exist"
        ) from error


def _get_local_path(path: Path, loaded: LoadedDataset) -> Path:
    if not loaded.dataset.path.is_local():
        raise ValueError(f"{path}: {loaded.dataset.path} is not on this machine; copy it here")
    return Path(loaded.dataset.path.local_path())


def _get_image_folder(path: Path, loaded: LoadedDataset) -> Path:
    store = (loaded.aux or {}).get("images")
    if store is None:
        raise ValueError(
            f"{path}: {loaded.dataset.path} has no images: add `aux: {{images: filesystem://FOLDER}}` to it"
        )
    return Path(str(store.get_path())).resolve()


def _get_subset(data_set) -> range:
    """Return the numbers of the samples that the mixture takes of a data set: all, or its `subset`."""
    return range(*data_set.subset.compute_subset(len(data_set))) if data_set.subset else range(len(data_set))


def _read_index(data_set: BaseWebdatasetFactory, folder: Path, prefix: str, needs_image: bool) -> Pairs:
    check_type(data_set)
    typed = data_set if is_typed(data_set) else None
    numbers, first, stored, left_out = _get_subset(data_set), 0, [], Counter()
    index = folder / ".nv-meta" / "index.sqlite"
    tar_ids = {name: number for number, name in enumerate(get_info_shard_files(data_set.path))}
    try:
        with closing(sqlite3.connect(f"{index.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            for shard in data_set.shards:
                samples = _read_samples(database, tar_ids[shard.name], folder / shard.name)
                for number, (key, parts) in enumerate(samples.items(), first):
                    if number in numbers and f"{shard.name}/{key}" not in data_set.sample_excludes:
                        found = _select_sample(f"{prefix}{shard.name}/{key}", parts, left_out, needs_image)
                        stored += [replace(sample, typed=typed) for sample in found]
                first += len(samples)
    except sqlite3.Error as error:
        raise ValueError(
            f"{index} cannot be read: {error}; run `energon prepare --force-overwrite {folder}`"
        ) from error
    return Pairs([sample.key for sample in stored], lambda number: stored[number].load(), left_out)


def _read_samples(database: sqlite3.Connection, tar_id: int, tar: Path) -> dict[str, list[_File]]:
    if not tar.is_file():
        raise ValueError(f"{tar} is missing, which its index lists; restore the file")
    samples = defaultdict(list)
    for key, name, offset, size in database.execute(_PARTS_OF_A_TAR, (tar_id,)):
        samples[key].append(_File(tar, name, offset, size))
    return samples


def _select_sample(key: str, parts: list[_File], left_out: Counter[str], needs_image: bool) -> list[_StoredPair]:
    try:
        names, _ = pick_parts({part.name: part for part in parts if not is_text(part.name)})
    except Unusable as fault:
        left_out[f"that cannot be used ({fault.kind})"] += 1
        return []
    images = [part for part in parts if IMAGE_PART.fullmatch(part.name.lower()) and part.name.lower() in names]
    texts = tuple(part for part in parts if is_text(part.name))
    if texts and (len(images) == 1 or (not images and not needs_image)):
        return [_StoredPair(key, texts, images[0] if images else None, needs_image)]
    left_out[WRONG_NUMBER_OF_IMAGES[needs_image] if texts else "without a .json or .txt"] += 1
    return []
