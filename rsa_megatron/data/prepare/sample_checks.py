"""Whether a record that was found can be trained on, and what of it is stored.

Images stay the bytes that they are; they are decoded once, as training will, to know that they can be. What is wrong
raises an Unusable, whose kinds are counted.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from rsa_megatron.data.conversation import IMAGE_TOKEN, check_conversation
from rsa_megatron.data.sources.record import Record, Unusable, resolve_inside
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
    content = record.content
    if isinstance(content, Unusable):
        raise content
    if not isinstance(content, dict):
        raise Unusable("wrong type", f"it is a {type(content).__name__}, not an object with conversations")
    if content.get("video") is not None:
        raise Unusable("video", "it has a video, which is not supported")
    number = content.get("id")
    if not isinstance(number, str | int | None):
        raise Unusable("wrong type", f"its id is a {type(number).__name__}")
    images = _find_images(content)
    turns, texts = check_turns(content)
    num_image_tokens = sum(text.count(IMAGE_TOKEN) for text in texts)
    if num_image_tokens == 0 and len(images) == 1 and record.may_lack_image_token:
        turns = add_image_token(turns)
        num_image_tokens = 1
    if num_image_tokens != len(images):
        raise Unusable(
            "number of images", f"its text has {num_image_tokens} {IMAGE_TOKEN} and the record {len(images)} image(s)"
        )
    number = f"{record.number:06d}" if number is None else number
    return ImportedSample(record.number, number, turns, texts, [_load(image, image_root) for image in images])


def _find_images(content: dict) -> list[str | bytes]:
    found = content["image"] if content.get("image") is not None else content.get("images")
    found = [] if found is None else found if isinstance(found, list) else [found]
    for reference in found:
        if not isinstance(reference, str | bytes) or not reference:
            what = "an empty one" if reference in ("", b"") else f"a {type(reference).__name__}"
            raise Unusable("wrong type", f"its image is {what}; it must be a path")
    return found


def check_turns(content: dict) -> tuple[list[dict], list[str]]:
    """Return a record's turns as {"from", "value"}, and the text of each. Raises Unusable if they are not a conversation."""
    turns = content.get("conversations")
    if turns is None:
        turns = content.get("messages")
    if not turns:
        raise Unusable("conversation", "it has no conversations")
    try:
        texts = [text for _, text in check_conversation(turns)]
    except ValueError as error:
        raise Unusable("conversation", str(error)) from error
    turns = [{"from": turn.get("from", turn.get("role")), "value": text} for turn, text in zip(turns, texts)]
    try:
        json.dumps([content.get("id"), turns], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Unusable("not UTF-8", f"its text is not UTF-8: {error}") from error
    return turns, texts


def add_image_token(turns: list[dict]) -> list[dict]:
    """Put an <image> before the first human turn's text. Raises Unusable without such a turn."""
    for index, turn in enumerate(turns):
        if turn["from"] in ("human", "user"):
            turn_with_image = {"from": turn["from"], "value": f"{IMAGE_TOKEN}\n{turn['value']}"}
            return [*turns[:index], turn_with_image, *turns[index + 1 :]]
    raise Unusable("conversation", "it has an image and no human turn to put it in")


def _load(reference: str | bytes, image_root: Path) -> ImportedImage:
    path = reference if isinstance(reference, str) else None
    data = reference if path is None else _read(path, image_root)
    name = path or "its image"
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


def _read(path: str, image_root: Path) -> bytes:
    file = resolve_inside(image_root, path)
    try:
        if not file.exists():
            raise Unusable("missing image", f"{path} is not in {image_root}; --images names the folder")
        if not file.is_file():  # reading a pipe would never end
            raise Unusable("unreadable image", f"{path} is not a file")
        return file.read_bytes()
    except OSError as error:
        raise Unusable("unreadable image", f"{path} cannot be read: {error.strerror}") from error
