"""Pairs of files that list images by path: COCO's captions, and the records that training reads as well (LLaVA's JSON
and JSONL, a folder of images with texts)."""

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from rsa_megatron.data.conversation import check_conversation
from rsa_megatron.data.sources.pairs import CaptionedImage, ImageFile, Pairs, find_image, without_image
from rsa_megatron.data.sources.record import Record, Source, Unusable

#: Reason for skipping samples by whether exactly one image is needed (True), or at most one.
WRONG_NUMBER_OF_IMAGES = {True: "that have no image, or several", False: "that have several images"}


class FoundPairs:
    """Pairs as they are found, one an image, and what is skipped.

    Args:
        root: resolved folder that the paths of images are relative to.
    """

    def __init__(self, root: Path):
        self._root = root
        self._pairs: dict[str, CaptionedImage] = {}
        self.left_out: Counter[str] = Counter()

    def add(self, key: str, caption: str, image: str | Callable, record: dict | None = None) -> None:
        """Add a pair, unless its key exists already; `image` is a path below the folder, or opens the image."""
        caption = caption.strip()
        if key in self._pairs:
            self.left_out["of an image that has a caption already"] += 1
        elif not caption:
            self.left_out["without a caption"] += 1
        elif any("\ud800" <= letter <= "\udfff" for letter in caption):  # what is left of bytes that are not text
            self.left_out["whose caption is not UTF-8"] += 1
        else:
            try:
                image = ImageFile(find_image(self._root, image)) if isinstance(image, str) else image
                self._pairs[key] = CaptionedImage(key, caption, image, record)
            except Unusable as fault:
                self.left_out[fault.kind] += 1

    def pairs(self) -> Pairs:
        return Pairs.of(list(self._pairs.values()), self.left_out)


def read_coco(path: Path, content: dict, root: Path) -> Pairs:
    """Read COCO's captions: of each image the caption of lowest annotation id."""
    for name in ("images", "annotations"):
        if not isinstance(content.get(name), list):
            raise ValueError(
                f"{path} has no list {name!r}, its keys are {', '.join(content)}; name COCO's captions_*.json"
            )
    captions = {}
    try:
        for annotation in sorted(content["annotations"], key=lambda annotation: annotation["id"]):
            if annotation["caption"].strip():
                captions.setdefault(annotation["image_id"], annotation["caption"])
        names = [(image["id"], image["file_name"]) for image in content["images"]]
    except KeyError as error:
        raise ValueError(
            f"{path}: an entry has no {error}; name COCO's captions_*.json, not instances_*.json"
        ) from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a COCO captions file: {error}") from error
    found = FoundPairs(root)
    for number, name in names:
        found.add(str(number), captions.get(number, ""), str(name))
    return found.pairs()


def read_records(
    source: Source, root: Path, numbers: range | None = None, prefix: str = "", *, needs_image: bool = True
) -> Pairs:
    """Read records of exactly one image; the caption is the answer, of several turns all answers.

    Args:
        needs_image: False takes records of no image too, and looks for no images.
        numbers: of the records to read; default: all.
        prefix: of the keys, before the record's place in its file.
    """
    numbers = range(len(source)) if numbers is None else numbers
    found = FoundPairs(root)
    for record in islice(source.records(numbers.start), len(numbers)):
        try:
            caption, image = _get_caption_and_image(record, needs_image)
            place = prefix + record.place
            found.add(place, caption, image if needs_image else without_image(place), record.content)
        except Unusable as fault:
            found.left_out[fault.kind] += 1
    return found.pairs()


def _get_caption_and_image(record: Record, needs_image: bool) -> tuple[str, str | None]:
    content = record.content
    if isinstance(content, Unusable):
        raise Unusable(f"that cannot be used ({content.kind})", str(content)) from content
    if not isinstance(content, dict):
        raise Unusable("that are not objects with conversations", record.place)
    images = content.get("image", content.get("images"))
    images = images if isinstance(images, list) else [] if images is None else [images]
    if len(images) > 1 or (needs_image and (not images or not isinstance(images[0], str))):
        raise Unusable(WRONG_NUMBER_OF_IMAGES[needs_image], record.place)
    try:
        return join_answers(content.get("conversations", content.get("messages"))), images[0] if images else None
    except ValueError as error:
        raise Unusable("without a caption", str(error)) from error


def join_answers(conversation: list) -> str:
    """Join the texts of its answers, a line each.

    Raises:
        ValueError: it is not a conversation, or has no answer.
    """
    return "\n".join(text.strip() for role, text in check_conversation(conversation) if role == "assistant")
