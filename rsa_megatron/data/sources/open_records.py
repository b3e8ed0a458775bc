"""Records to train on, from any file that this package reads: those with conversations, and those of captions.

What llava_records.py reads comes as it is. Of COCO's captions, and of tables with a column of captions (open_pairs.py says which), each
image becomes a record of one question and its caption; COCO's and a table's other captions of the same image are not used.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rsa_megatron.data.sources.llava_records import CAPTION_PROMPT, open_source
from rsa_megatron.data.sources.open_pairs import TABLES, open_pairs, read_json_object
from rsa_megatron.data.sources.pairs import ImageFile, Pairs
from rsa_megatron.data.sources.record import Record, Source, Unusable


def open_records(path: str | Path, *, images: Path | None = None, seed: int = 0) -> Source:
    """Open a file or folder of samples to train on.

    Args:
        images: folder that the paths of images are relative to; the folder of the file itself.
        seed: of the sampling_strategy "random".

    Raises:
        ValueError: it is none of the formats, or cannot be read at all.
    """
    path = Path(path)
    if _holds_captions(path):
        return CaptionRecords(open_pairs(path, images=images, split="train"), images or path)
    return open_source(path, seed=seed)


class CaptionRecords:
    """Pairs of images and captions as records."""

    def __init__(self, pairs: Pairs, root: Path):
        self._pairs = pairs
        self.image_root = (root if root.is_dir() else root.parent).resolve()
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


def _holds_captions(path: Path) -> bool:
    """Return whether it is COCO's captions, or a table without conversations."""
    name = path.name.lower()
    if path.is_dir() or name.endswith(".parquet"):
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        return bool(files) and not {"conversations", "messages"} & _read_columns(files[0])
    if name.endswith(TABLES):
        return True
    content = read_json_object(path) if path.is_file() else None
    return content is not None and {"images", "annotations"} <= content.keys()


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
