"""Records to train on, from any file that this package reads: those with conversations, and those of captions.

What llava_records.py reads comes as it is. Of COCO's captions, and of tables with a column of captions (open_pairs.py says which), each
image becomes a record of one question and its caption; COCO's and a table's other captions of the same image are not used.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rsa_megatron.data.records import CAPTION_PROMPT, CONVERSATION_FIELDS
from rsa_megatron.data.sources.file_forms import tell_form
from rsa_megatron.data.sources.folder_files import choose_tables, has_parquet
from rsa_megatron.data.sources.llava_records import count_left_out, find_metadata, open_source
from rsa_megatron.data.sources.open_pairs import read_captions
from rsa_megatron.data.sources.pairs import ImageFile, Pairs, describe_nothing
from rsa_megatron.data.sources.record import Record, Source, Unusable


def open_records(
    path: str | Path, *, images: Path | None = None, seed: int = 0, split: str = "train", language: str = "en"
) -> Source:
    """Open a file or folder of samples to train on.

    Args:
        images: folder that the paths of images are relative to; the folder of the file itself.
        seed: of the sampling_strategy "random".
        split, language: of tables with such a column, and of Karpathy's JSON; of a folder whose files' names say a split.

    Raises:
        ValueError: it is none of the formats, or cannot be read at all.
    """
    file, left_out = find_metadata(Path(path), split)
    source = _open(file, path, images, seed, split, language)
    count_left_out(source, left_out)
    return source


def _open(file: Path, path: str | Path, images: Path | None, seed: int, split: str, language: str) -> Source:
    is_parquet = has_parquet(file) if file.is_dir() else file.is_file() and tell_form(file) == "parquet"
    if not file.exists() or (is_parquet and _has_conversations(file, split)):
        return open_source(file, seed=seed, split=split)
    root = Path(images or (file if file.is_dir() else file.parent)).resolve()
    if images is not None and not root.is_dir():
        raise ValueError(f"--images {images} is not a folder")
    pairs = read_captions(file, root, split, language)
    if pairs is None:
        return open_source(file, seed=seed, split=split)
    if not len(pairs):
        forms = "a file with captions"
        raise ValueError(f"{path}: no image with a caption found{describe_nothing(pairs, forms)}")
    return CaptionRecords(pairs, root)


class CaptionRecords:
    """Pairs of images and captions as records."""

    def __init__(self, pairs: Pairs, root: Path):
        self._pairs = pairs
        self.image_root = root
        #: what was skipped on the way to the pairs: how many, by what is wrong with them
        self.left_out: Counter[str] = pairs.left_out

    def __len__(self) -> int:
        return len(self._pairs)

    def records(self, start: int = 0) -> Iterator[Record]:
        for number in range(start, len(self)):
            pair = self._pairs[number]
            yield Record(number, pair.key, self._make_content(pair))

    def _make_content(self, pair) -> dict | Unusable:
        try:
            image = pair.image
            # A path, so that the image can be linked; else its bytes.
            found = str(image.path.relative_to(self.image_root)) if isinstance(image, ImageFile) else image.read()
        except ValueError as error:
            return Unusable("unreadable image", str(error))
        turns = [{"from": "human", "value": CAPTION_PROMPT}, {"from": "gpt", "value": pair.caption}]
        return {"id": pair.key, "image": found, "conversations": turns}


def _has_conversations(path: Path, split: str) -> bool:
    """Return whether it is a parquet file, or a folder of them, with a column of conversations."""
    files = choose_tables(path, split).files if path.is_dir() else [path]
    return bool(files) and bool({*CONVERSATION_FIELDS} & _read_columns(files[0]))


def _read_columns(path: Path) -> set[str]:
    try:
        import pyarrow
        from pyarrow.parquet import read_schema
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    try:
        return set(read_schema(path).names)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}; fetch it again") from error
