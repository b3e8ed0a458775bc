"""Captions without their images, which replace image data where text is moved onto images (ReVision's stage 1).

    captions.txt       a caption a line
    Energon shards     samples of one image or of none, or a mixture of them
    anything else      as open_pairs.py reads it, with records of no image too; the images need not be there

They come as pairs all the same, whose images nobody opens: their keys are those that the same data has with its images.
"""

from collections import Counter
from pathlib import Path

from rsa_megatron.data.sources.file_forms import tell_form
from rsa_megatron.data.sources.llava_records import find_metadata
from rsa_megatron.data.sources.open_pairs import is_prepared, open_pairs, read_captions, read_source
from rsa_megatron.data.sources.pairs import CaptionedImage, Pairs, describe_nothing, without_image
from rsa_megatron.data.sources.shards import read_shards


def open_captions(path: str | Path, *, split: str = "train", language: str = "en") -> Pairs:
    """Read the captions of a file or folder; see above.

    Args:
        split, language: as for `open_pairs`.

    Raises:
        ValueError: it has no caption, or cannot be read; names file and remedy.
    """
    path = Path(path)
    if not path.exists():
        return open_pairs(path)  # whose message names the forms
    try:
        captions = _open(path, split, language)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not len(captions):
        forms = "a .txt with a caption a line, or records with conversations or captions"
        raise ValueError(f"{path}: no caption found{describe_nothing(captions, forms)}")
    return captions


def _open(path: Path, split: str, language: str) -> Pairs:
    if is_prepared(path):
        return read_shards(path, split, needs_image=False)
    file, left_out = find_metadata(path, split)
    if file.is_file() and tell_form(file) == "text":
        return _read_lines(file)
    pairs = read_captions(file, None, split, language)
    pairs = read_source(file, None, split) if pairs is None else pairs
    pairs.left_out.update(left_out)
    return pairs


def _read_lines(path: Path) -> Pairs:
    found, left_out = [], Counter()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                caption = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                left_out["whose line is not UTF-8"] += 1
                continue
            if caption:
                key = f"{path.name}, line {number}"
                found.append(CaptionedImage(key, caption, without_image(key)))
    return Pairs.of(found, left_out)
