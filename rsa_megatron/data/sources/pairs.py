"""Image-caption pairs to measure on: what one is, a collection with random access, and the choice of some."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from rsa_megatron.data.sources.record import Unusable, resolve_inside
from rsa_megatron.data.tiles import decode_images


@dataclass(frozen=True)
class CaptionedImage:
    """One pair. It can be sent to another process."""

    #: names it among the pairs of its source
    key: str
    caption: str
    #: Opens the image, upright RGB. Raises ValueError, naming the file, for one that cannot be read: among thousands there
    #: may be such, which the caller skips and counts.
    image: Callable[[], Image.Image]
    #: its record in the source, if that has a conversation
    record: dict | None = None


@dataclass(frozen=True)
class Row:
    """A row of a table of pairs, as it was found."""

    #: file and row
    place: str
    #: by column
    content: dict
    #: opens the image that lies in the table itself
    image: Callable[[], Image.Image] | None = None
    #: of those that lie in it
    num_images: int = 0


@dataclass(frozen=True)
class Table:
    """A file of such rows (tables.py, pair_parquet.py)."""

    path: Path
    columns: list[str]
    #: the one of them that holds the images themselves
    image_column: str | None
    rows: Iterator[Row]


class Pairs(Sequence[CaptionedImage]):
    """Pairs by number; a caption is read when its pair is accessed, an image when it is opened.

    `pairs[i]` raises ValueError, naming the sample, if only reading it shows that it has no caption (only in shards).
    """

    def __init__(self, keys: Sequence[str], load: Callable[[int], CaptionedImage], left_out: Counter[str]):
        #: of each pair, in the data's order
        self.keys = keys
        #: what was skipped: how many, by what is wrong with them and what to do about it
        self.left_out = left_out
        #: the split that they are, of prepared data
        self.split: str | None = None
        #: what is wrong with the first of the skipped records, where it is known
        self.first_fault: str | None = None
        self._load = load

    @classmethod
    def of(cls, pairs: list[CaptionedImage], left_out: Counter[str]) -> "Pairs":
        return cls([pair.key for pair in pairs], pairs.__getitem__, left_out)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> CaptionedImage:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        return self._load(index % len(self))


def join(parts: list[Pairs]) -> Pairs:
    """Join the pairs of several sources, one after the other; of those with the same key the first."""
    places = {key: (part, index) for part in reversed(parts) for index, key in reversed([*enumerate(part.keys)])}
    places = [places[key] for key in dict.fromkeys(key for part in parts for key in part.keys)]

    def load(index: int) -> CaptionedImage:
        part, index = places[index]
        return part[index]

    return Pairs([part.keys[i] for part, i in places], load, sum((part.left_out for part in parts), Counter()))


def sample(pairs: Pairs, num_samples: int, seed: int) -> list[CaptionedImage]:
    """Sample `num_samples` of the pairs, without replacement, in the data's order: files are read from front to end.

    The pairs whose hash of seed and key is smallest: the same on each machine and version of Python, whatever order the
    files are listed in, and a smaller sample lies in a larger one. A pair that turns out to have no caption is skipped.

    Raises:
        ValueError: there are too few.
    """
    if num_samples < 1:
        raise ValueError(f"--num-samples {num_samples}: it must be at least 1")
    chosen, fault = {}, ""
    for index in sorted(range(len(pairs)), key=lambda index: _hash(seed, pairs.keys[index])):
        try:
            chosen[index] = pairs[index]
        except ValueError as error:
            fault = f"; last error: {error}"
            continue
        if len(chosen) == num_samples:
            return [chosen[index] for index in sorted(chosen)]
    left_out = f"; skipped: {format_counts(pairs.left_out)}" if pairs.left_out else ""
    where, remedy = (f" of the split {pairs.split}", ", or name another --split") if pairs.split else ("", "")
    raise ValueError(
        f"--num-samples {num_samples}: only {len(chosen)} pairs{where} have a caption; lower it{remedy}{left_out}{fault}"
    )


def load_all(pairs: Pairs) -> list[CaptionedImage]:
    """Load all pairs that have a caption, in the data's order; the others are counted in `left_out`.

    Raises:
        ValueError: no pair has one.
    """
    chosen, fault = [], None
    for index in range(len(pairs)):
        try:
            chosen.append(pairs[index])
        except ValueError as error:
            fault = error
            pairs.left_out["without a caption"] += 1
    if not chosen:
        raise ValueError(f"no pair has a caption; last error: {fault}")
    return chosen


def _hash(seed: int, key: str) -> bytes:
    # A file name that is not UTF-8 has surrogates.
    return hashlib.blake2b(f"{seed}/{key}".encode(errors="surrogatepass"), digest_size=16).digest()


def format_counts(left_out: Counter[str]) -> str:
    """Format what was skipped: "12 without a caption; 3 of a language other than en"."""
    return "; ".join(f"{count} {reason}" for reason, count in left_out.most_common())


def describe_nothing(pairs: Pairs, forms: str) -> str:
    """Say why there are no pairs at all, or which forms are read."""
    first = f"; the first: {pairs.first_fault}" if pairs.first_fault else ""
    return f": {format_counts(pairs.left_out)}{first}" if pairs.left_out else f"; name {forms}"


def without_image(key: str) -> Callable[[], Image.Image]:
    """Return what opens no image, where only texts are read: it raises ValueError."""
    return partial(_raise_no_image, key)


def _raise_no_image(key: str) -> Image.Image:
    raise ValueError(f"{key} was read as text only")


def find_image(root: Path, name: str) -> Path:
    """Find the path of an image below `root`, a resolved folder; not opened yet (links in it are followed).

    Raises:
        Unusable: it is missing, or leads out of the folder. Its kind says so for all such images of the folder.
    """
    missing = Unusable(
        f"whose image is not in {root} (--images, of realign --image-folder, names the folder; nothing is downloaded)",
        name,
    )
    # Before `resolve_inside`, which looks at each folder on the way: of millions of rows few images may exist.
    if "://" not in name and not os.path.isfile(os.path.join(root, name)):
        raise missing
    try:
        found = resolve_inside(root, name)
    except ValueError as error:  # an address that is none
        raise missing from error
    except Unusable as fault:
        if fault.kind == "missing image":
            raise missing from fault
        raise Unusable(f"whose image's path leads out of {root}", name) from fault
    if not found.is_file():
        raise missing
    return found


@dataclass(frozen=True)
class ImageFile:
    """Opens the image of a file, as training does: upright, RGB, transparency on white.

    Raises:
        ValueError: it cannot be read; names the file.
    """

    path: Path

    def read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error.strerror}") from error

    def __call__(self) -> Image.Image:
        return decode(self.read(), str(self.path))


@dataclass(frozen=True)
class ImageBytes:
    """Opens an image that a record holds itself."""

    data: bytes
    #: of the record
    place: str

    def read(self) -> bytes:
        return self.data

    def __call__(self) -> Image.Image:
        return decode(self.data, self.place)


def decode(data: bytes, place: str) -> Image.Image:
    """Open an image from its bytes, which lie in `place`."""
    try:
        (image,) = decode_images({"png": data})  # whatever it is: its bytes say so
    except ValueError as error:
        raise ValueError(f"{place}: the image cannot be opened: {str(error).removeprefix('png: ')}") from error
    return image
