"""Where image-caption pairs come from: whatever a user has, recognised by what is in it.

    a folder with .nv-meta   Energon shards, as rsa-megatron data and prepare_data.py write them
    mixture.yaml             a MetadatasetV2 of such folders, or of JSONL files whose images lie outside
    captions.json            COCO's captions: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}, or
                             Karpathy's dataset_*.json: {"images": [{"filename", "split", "sentences"}]}
    results.csv, x.tsv(.gz)  a table with a column for captions and one for images: Flickr30k's, Wikipedia's (WIT)
    x.parquet, or a folder   the same, the images within or in a folder
    a folder                 a.jpg beside a.txt with its caption; or images with a metadata.jsonl or metadata.csv
    llava.json, .jsonl       records with conversations or captions, those of exactly one image

What a file holds decides, not its name. One pair an image. The caption is the answer of a conversation, or the first caption of several: COCO's of the lowest
annotation id (platonic-rep takes the first of a list), a table's first row of an image, a list's first item.
Images are opened on access, as training opens them; nothing is downloaded.
"""

from pathlib import Path

import yaml

from rsa_megatron.data.sources.coco import holds_coco, is_karpathys, read_coco, read_karpathy, read_records
from rsa_megatron.data.sources.file_forms import YAML_SUFFIXES, tell_form
from rsa_megatron.data.sources.folder_files import choose_tables
from rsa_megatron.data.sources.json_files import read_json
from rsa_megatron.data.sources.llava_records import find_metadata, open_source
from rsa_megatron.data.sources.pairs import CaptionedImage, Pairs, describe_nothing, format_counts, sample
from rsa_megatron.data.sources.shards import read_shards
from rsa_megatron.data.sources.tables import holds_conversations, read_tables

__all__ = ["CaptionedImage", "Pairs", "format_counts", "open_pairs", "sample"]

_FORMS = (
    "a folder of shards that rsa-megatron data pack has written, a mixture.yaml, records in JSON or JSONL, COCO's captions "
    ".json, a .csv, .tsv or .parquet with a column of captions, or a folder of images with a .txt beside each"
)


def open_pairs(path: str | Path, *, images: Path | None = None, split: str = "val", language: str = "en") -> Pairs:
    """Read the pairs of a file or folder; see above.

    Args:
        images: folder that the paths of images are relative to; the folder of the file itself.
        split: of shards and mixtures, and of tables with a column `split`; the others have only one.
        language: of tables with a column `language`.

    Raises:
        ValueError: it has no pair, or cannot be read; names file, column and remedy.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; name {_FORMS}")
    if images is not None and not Path(images).is_dir():
        raise ValueError(f"--images {images} is not a folder")
    try:
        pairs = _open(path, images, split, language)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not len(pairs):
        raise ValueError(f"{path}: no image with a caption found{describe_nothing(pairs, _FORMS)}")
    return pairs


def _open(path: Path, images: Path | None, split: str, language: str) -> Pairs:
    if is_prepared(path):
        if images is not None:
            raise ValueError(f"--images {images}: {path} already specifies where its images are; drop the flag")
        pairs = read_shards(path, split)
        pairs.split = split
        return pairs
    file, left_out = find_metadata(path, split)
    root = Path(images or (file if file.is_dir() else file.parent)).resolve()
    pairs = read_captions(file, root, split, language)
    pairs = read_source(file, root, split) if pairs is None else pairs
    pairs.left_out.update(left_out)
    return pairs


def read_source(file: Path, root: Path | None, split: str) -> Pairs:
    """Read the pairs of records, each of which names its own image; `root` as below."""
    source = open_source(file, split=split)
    pairs = read_records(source, root)
    pairs.left_out.update(getattr(source, "left_out", ()))
    return pairs


def read_captions(file: Path, root: Path | None, split: str, language: str) -> Pairs | None:
    """Read the pairs of a table, of COCO's or Karpathy's JSON; None for records, each of which names its own image.

    Args:
        root: resolved folder that the paths of images are relative to; None where no image is looked for.
    """
    if file.is_dir():
        chosen = choose_tables(file, split)
        if not chosen.files:
            return None
        pairs = read_tables(chosen.files, root, split, language)
        pairs.left_out.update(chosen.left_out)
        return pairs
    form = tell_form(file)
    if form == "parquet" or (form == "table" and not holds_conversations(file)):
        return read_tables([file], root, split, language)
    if form != "json object":
        return None
    content = read_json(file)
    if is_karpathys(content):
        return read_karpathy(content, root, split)
    return read_coco(file, content, root) if holds_coco(content) else None


def is_prepared(path: Path) -> bool:
    """Return whether it is Energon's: an indexed folder, or a mixture."""
    if path.is_dir():
        return (path / ".nv-meta").is_dir()
    if path.suffix.lower() not in YAML_SUFFIXES:
        return False
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return isinstance(content, dict) and "__class__" in content
