"""Where image-caption pairs come from: whatever a user has, recognised by what is in it.

    a folder with .nv-meta   Energon shards, as rsa-megatron data and prepare_data.py write them
    mixture.yaml             a MetadatasetV2 of such folders, or of JSONL files whose images lie outside
    captions.json            COCO's captions: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
    results.csv, x.tsv(.gz)  a table with a column for captions and one for images: Flickr30k's, Wikipedia's (WIT)
    x.parquet, or a folder   the same, the images within or in a folder
    a folder                 a.jpg beside a.txt with its caption
    llava.json, .jsonl       LLaVA's records, those of exactly one image

One pair an image. The caption is the answer of a conversation, or the first caption of several: COCO's of the lowest
annotation id (platonic-rep takes the first of a list), a table's first row of an image, a list's first item.
Images are opened on access, as training opens them; nothing is downloaded.
"""

import json
from pathlib import Path

import yaml

from rsa_megatron.data.sources import coco
from rsa_megatron.data.sources import tables as caption_tables
from rsa_megatron.data.sources.llava_records import open_source
from rsa_megatron.data.sources.pairs import CaptionedImage, Pairs, format_counts, sample
from rsa_megatron.data.sources.shards import read_shards

__all__ = ["CaptionedImage", "Pairs", "format_counts", "open_pairs", "sample"]

TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")
_FORMS = (
    "a folder of shards that rsa-megatron data pack has written, a mixture.yaml, COCO's captions .json, a .csv, .tsv or "
    ".parquet with a column of captions, or a folder of images with a .txt beside each"
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
        reasons = f": {format_counts(pairs.left_out)}" if pairs.left_out else f"; name {_FORMS}"
        raise ValueError(f"{path}: no image with a caption found{reasons}")
    return pairs


def _open(path: Path, images: Path | None, split: str, language: str) -> Pairs:
    if is_prepared(path):
        if images is not None:
            raise ValueError(f"--images {images}: {path} already specifies where its images are; drop the flag")
        return read_shards(path, split)
    root = Path(images or (path if path.is_dir() else path.parent)).resolve()
    tables = sorted(path.rglob("*.parquet")) if path.is_dir() else [path] if path.name.lower().endswith(TABLES) else []
    if tables:
        return caption_tables.read_tables(tables, root, split, language)
    content = read_json_object(path)
    if content is not None:
        return coco.read_coco(path, content, root)
    return coco.read_records(open_source(path), root)


def is_prepared(path: Path) -> bool:
    """Return whether it is Energon's: an indexed folder, or a mixture."""
    if path.is_dir():
        return (path / ".nv-meta").is_dir()
    if path.suffix.lower() not in (".yaml", ".yml"):
        return False
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return isinstance(content, dict) and "__class__" in content


def is_json_object(path: Path) -> bool:
    """Return whether it is one JSON object, as COCO's captions; not a list of records, nor one a line."""
    return read_json_object(path) is not None


def read_json_object(path: Path) -> dict | None:
    """Read a .json that is one object, as COCO's captions; None for a list of records, or one a line."""
    if path.suffix.lower() != ".json":
        return None
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    if text[:10_000].lstrip()[:1] != "{":
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second line
            return None
        raise ValueError(f"{path} is broken JSON: {error}; fetch it again") from error
    except RecursionError as error:
        raise ValueError(f"{path} is JSON too deep to be captions") from error
