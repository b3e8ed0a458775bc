"""Pairs of files that list images by path: COCO's captions, Karpathy's, and the records that training reads as well."""

from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from rsa_megatron.data.records import read_caption, read_record
from rsa_megatron.data.sources.pairs import CaptionedImage, ImageBytes, ImageFile, Pairs, find_image, without_image
from rsa_megatron.data.sources.record import Source, Unusable
from rsa_megatron.data.sources.row_choice import count_others

#: Reason for skipping samples by whether exactly one image is needed (True), or at most one.
WRONG_NUMBER_OF_IMAGES = {True: "that have no image, or several", False: "that have several images"}
SECOND_CAPTION = "of an image that has a caption already"
SHARED_FILE = "whose address ends in the same name as another's: the file of that name may be of either"


class FoundPairs:
    """Pairs as they are found, one an image, and what is skipped.

    Args:
        root: resolved folder that the paths of images are relative to; None where no image is looked for.
    """

    def __init__(self, root: Path | None):
        self._root = root
        self._pairs: dict[str, CaptionedImage] = {}
        self.left_out: Counter[str] = Counter()
        #: images that a record of a caption has named
        self._captioned: set[str | bytes] = set()
        self._first_fault: str | None = None

    def add(self, key: str, caption: str, image: str | Callable, record: dict | None = None) -> None:
        """Add a pair, unless its key exists already; `image` is a path below the folder, or opens the image."""
        caption = caption.strip()
        if key in self._pairs:
            self.left_out[SECOND_CAPTION] += 1
        elif not caption:
            self.left_out["without a caption"] += 1
        elif any("\ud800" <= letter <= "\udfff" for letter in caption):  # what is left of bytes that are not text
            self.left_out["whose caption is not UTF-8"] += 1
        else:
            try:
                if self._root is None:
                    image = without_image(key)
                image = ImageFile(find_image(self._root, image)) if isinstance(image, str) else image
                self._pairs[key] = CaptionedImage(key, caption, image, record)
            except Unusable as fault:
                self.left_out[fault.kind] += 1

    def add_record(self, place: str, content: object, own: Callable | None = None, num_own: int = 0) -> None:
        """Add the pair of a record of one image; of several records of captions that name the same image the first.

        Args:
            place: of the record, the pair's key.
            own, num_own: opens the image that lies beside the record, and how many do.
        """
        needs_image = self._root is not None
        try:
            read = read_record(content, images_beside=num_own or None, texts_alone=not needs_image)
            num_images = num_own or len(read.images)
            if num_images > 1 or (needs_image and not num_images):
                raise Unusable(WRONG_NUMBER_OF_IMAGES[needs_image], f"it has {num_images} images")
        except Unusable as fault:
            self.left_out[describe_fault(fault)] += 1
            self._first_fault = self._first_fault or f"{place}: {fault}"
            return
        image = own or (read.images[0] if read.images else "")
        if needs_image and read.is_caption and not own:
            if image in self._captioned:
                self.left_out[SECOND_CAPTION] += 1
                return
            self._captioned.add(image)
        image = ImageBytes(image, place) if isinstance(image, bytes) else image
        self.add(place, read.caption, image, read.as_dict())

    def pairs(self) -> Pairs:
        self._leave_out_shared_files()
        pairs = Pairs.of(list(self._pairs.values()), self.left_out)
        pairs.first_fault = self._first_fault
        return pairs

    def _leave_out_shared_files(self) -> None:
        """Leave out the pairs of several addresses that end in the same name: whose the file of that name is, is unknown."""
        of_file = defaultdict(list)
        for key, pair in self._pairs.items():
            if "://" in key and not key.lower().startswith("file://") and isinstance(pair.image, ImageFile):
                of_file[pair.image.path].append(key)
        for key in [key for keys in of_file.values() if len(keys) > 1 for key in keys]:
            self.left_out[SHARED_FILE] += 1
            del self._pairs[key]


def read_coco(path: Path, content: dict, root: Path | None) -> Pairs:
    """Read COCO's captions: of each image the caption of lowest annotation id."""
    for name in ("images", "annotations"):
        if not isinstance(content.get(name), list):
            raise ValueError(
                f"{path} has no list {name!r}, its keys are {', '.join(content)}; name COCO's captions_*.json"
            )
    captions = {}
    try:
        for annotation in sorted(content["annotations"], key=lambda annotation: annotation["id"]):
            caption = annotation.get("caption")
            if isinstance(caption, str) and caption.strip():
                captions.setdefault(annotation["image_id"], caption)
        if content["annotations"] and not any("caption" in annotation for annotation in content["annotations"]):
            raise KeyError("caption")
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


def read_karpathy(content: dict, root: Path | None, split: str) -> Pairs:
    """Read Karpathy's dataset_*.json: of each image of a split the first sentence."""
    found, others = FoundPairs(root), Counter()
    for number, entry in enumerate(content["images"]):
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise ValueError(f"image {number} of Karpathy's JSON has no filename; it is {str(entry)[:200]}")
        if entry.get("split", split) != split:
            others[str(entry["split"])] += 1
            continue
        folder = entry.get("filepath") or ""
        found.add(str(entry.get("imgid", number)), read_caption(entry.get("sentences")), f"{folder}/{name}".lstrip("/"))
    found.left_out += count_others("split", split, others)
    return found.pairs()


def holds_coco(content: dict) -> bool:
    """Return whether a JSON object is COCO's, of captions or of something else."""
    return {"images", "annotations"} <= content.keys()


def is_karpathys(content: dict) -> bool:
    """Return whether a JSON object lists images with their sentences."""
    images = content.get("images")
    return isinstance(images, list) and any(isinstance(entry, dict) and "sentences" in entry for entry in images)


def read_records(source: Source, root: Path | None, numbers: range | None = None, prefix: str = "") -> Pairs:
    """Read records of exactly one image; the caption is the answer, of several turns all answers.

    Of several records of captions that name the same image the first counts.

    Args:
        root: resolved folder that the paths of images are relative to; None takes records of no image too, and looks for
            no images.
        numbers: of the records to read; default: all.
        prefix: of the keys, before the record's place in its file.
    """
    numbers = range(len(source)) if numbers is None else numbers
    found = FoundPairs(root)
    for record in islice(source.records(numbers.start), len(numbers)):
        found.add_record(prefix + record.place, record.content)
    return found.pairs()


def describe_fault(fault: Unusable) -> str:
    """Describe a fault as what samples are that have it."""
    if fault.kind == "conversation":
        return "without a caption"
    return fault.kind if fault.kind in WRONG_NUMBER_OF_IMAGES.values() else f"that cannot be used ({fault.kind})"
