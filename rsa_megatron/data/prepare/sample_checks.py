"""Whether a record that was found can be trained on, and what of it is stored.

Images stay the bytes that they are; they are decoded once, as training will, to know that they can be. What is wrong
raises an Unusable, whose kinds are counted.
"""

import errno
import io
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from rsa_megatron.data.records import read_record
from rsa_megatron.data.sources.record import Record, Unusable, relate, resolve_inside
from rsa_megatron.data.tiles import decode_images

# By content, not by name: many a .jpg is a PNG. MPO is what some cameras' .jpg are. GIF and TIFF are stored as "png": the
# name says that it is an image, and readers go by its bytes.
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}


@dataclass(frozen=True)
class ImportedImage:
    data: bytes
    extension: str
    height: int
    width: int
    #: below the folder of images; None for an image that lies in the source itself
    path: str | None


@dataclass(frozen=True)
class ImportedSample:
    """A sample that can be trained on."""

    number: int
    id: str | int
    conversations: list[dict]
    #: of each turn
    texts: list[str]
    images: list[ImportedImage]

    @property
    def key(self) -> str:
        """Return its name in a shard: the record's number. Ids repeat in real data, and may hold dots and slashes."""
        return f"{self.number:06d}"

    def in_shard(self) -> dict[str, bytes]:
        """Return its files by name: "jpg" or "0.jpg", "1.png", ...; and "json"."""
        is_single = len(self.images) == 1
        names = [image.extension if is_single else f"{i}.{image.extension}" for i, image in enumerate(self.images)]
        record = json.dumps({"id": self.id, "conversations": self.conversations}, ensure_ascii=False).encode()
        return {name: image.data for name, image in zip(names, self.images)} | {"json": record}

    def as_line(self) -> dict:
        """Return its line in a JSONL file, with the paths of its images."""
        return {"id": self.id, "image": [image.path for image in self.images], "conversations": self.conversations}


def check(record: Record, image_root: Path) -> ImportedSample:
    """Check a record and return its sample; its images' paths are relative to `image_root`, a resolved folder.

    Raises:
        Unusable: it cannot be trained on.
    """
    read = read_record(record.content)
    images = [_load(image, image_root) for image in read.images]
    number = f"{record.number:06d}" if read.id is None else read.id
    return ImportedSample(record.number, number, read.turns, read.texts, images)


def _load(reference: str | bytes, image_root: Path) -> ImportedImage:
    if isinstance(reference, str):
        file = resolve_inside(image_root, reference)
        data, path, name = _read(file, reference, image_root), relate(image_root, reference, file), reference
    else:
        data, path, name = reference, None, "its image"
    if not data:
        raise Unusable("unreadable image", f"{name} is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            extension = _EXTENSIONS.get(opened.format, "png")
        (image,) = decode_images({"png": data})  # as training will
    except Exception as error:  # Pillow raises whatever a decoder of broken bytes comes upon
        # The bytes' address in memory would differ from run to run.
        reason = (
            "not a known image format"
            if isinstance(error, UnidentifiedImageError)
            else str(error).removeprefix("png: ")
        )
        raise Unusable("unreadable image", f"{name} cannot be decoded: {reason or type(error).__name__}") from error
    return ImportedImage(data, extension, image.height, image.width, path)


def _read(file: Path, path: str, image_root: Path) -> bytes:
    try:
        if not file.exists():
            raise Unusable("missing image", f"{path} is not in {image_root}; --images names the folder")
        if not file.is_file():  # reading a pipe would never end
            raise Unusable("unreadable image", f"{path} is not a file")
        return file.read_bytes()
    except OSError as error:
        kind = "missing image" if error.errno == errno.ENAMETOOLONG else "unreadable image"
        raise Unusable(kind, f"{path} cannot be read: {error.strerror}") from error
