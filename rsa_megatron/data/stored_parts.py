"""The parts of a sample as it lies in a tar: which are its images, which its record, and which are media that nobody reads.

    jpg, png, ...  0.png, 1.jpg, ...     its image or images (tiles.py); npy, 0.npy, ... as embeddings (image_embeddings.py)
    json                                 its record
    txt                                  its caption, where the json has no conversation: img2dataset's tars, open_clip's
    anything else                        not read; where it is an image, a video or a sound, the sample is left out

Names count without regard to case.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.energon.flavors import Sample

from rsa_megatron.data.image_embeddings import EMBEDDING_PART
from rsa_megatron.data.media_names import FILE_FIELDS, IMAGE_FIELDS
from rsa_megatron.data.records import CAPTION_FIELDS, CONVERSATION_FIELDS
from rsa_megatron.data.sources.record import Unusable
from rsa_megatron.data.tiles import IMAGE_PART

_CAPTION_PARTS = ("txt", "text", "caption")
# Suffixes of media, those that are read among them: "left.jpg" is no part that is read either.
_MEDIA = frozenset(
    "png jpg jpeg jpe jfif webp bmp gif tif tiff heic heif avif jp2 jxl svg ico psd ppm pgm pbm pnm tga exr hdr "
    "mp4 avi mov mkv webm m4v mpg mpeg flv wmv 3gp wav mp3 flac ogg opus m4a aac wma glb ply pcd".split()
)
# What the files of formats that are read begin with.
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\x00", b"MM\x00*")


@dataclass(kw_only=True)
class StoredSample(Sample):
    """What lies in the shard, not decoded yet."""

    #: by the file's name: just "png", or "0.png", "1.jpg", ... in any order ("npy" for embeddings); or why it could not be read
    images: dict[str, bytes | Exception]
    #: JSON; of a JSONL's line what `read_record` made of it, or why it could not
    record: bytes | dict | Unusable | None


def pick_parts(stored: Mapping[str, object]) -> tuple[dict[str, bytes], bytes | dict | None]:
    """Pick out the images by name, and the record: a json's bytes, or of a caption a record that has it as its answer.

    Args:
        stored: the sample's files by name, read or not: of a file that is not bytes only the name counts. Names that begin
            with "__" are Energon's.

    Raises:
        Unusable: the sample has two parts of one name, or a medium that is not read; names the parts.
    """
    parts = {}
    for name, part in stored.items():
        if name.startswith("__"):
            continue
        if name.lower() in parts:
            fault = f"it has the part .{name.lower()} twice, in upper and in lower case: remove one"
            raise Unusable(f"part .{name.lower()} twice", fault)
        parts[name.lower()] = part
    images = {
        name: part for name, part in parts.items() if IMAGE_PART.fullmatch(name) or EMBEDDING_PART.fullmatch(name)
    }
    unread = [name for name, part in parts.items() if name not in images and _is_medium(name, part)]
    if unread:
        kept = ", ".join(name for name in parts if name not in unread)
        raise Unusable(
            f"medium not read: part {', '.join(f'.{name}' for name in unread)}",
            f"it has media that are not read, {', '.join(f'.{name}' for name in unread)}: rename or convert them (an image is .png, "
            f".jpg, .webp, .bmp, .gif or .tif, several are .0.png, .1.jpg, ...), or leave them out by `part_filter: [{kept}]` in "
            f".nv-meta/dataset.yaml",
        )
    return images, _pick_record(parts)


def _pick_record(parts: Mapping[str, object]) -> bytes | dict | None:
    """Return the json, or the caption in place of one that has no conversation."""
    record, caption = parts.get("json"), next((parts[name] for name in _CAPTION_PARTS if parts.get(name)), None)
    if caption is None:
        return record
    try:
        content = {} if record is None else json.loads(record)
        caption = caption.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise Unusable("not UTF-8", f"its .txt is not UTF-8: {error}") from error
    except (ValueError, RecursionError):  # named where the json is read
        return record
    if not isinstance(content, dict) or any(content.get(name) for name in CONVERSATION_FIELDS) or not caption:
        return record
    # What else the json names still says whether the sample has a medium that is not read.
    others = {
        name: value for name, value in content.items() if name not in (*CAPTION_FIELDS, *IMAGE_FIELDS, *FILE_FIELDS)
    }
    return others | {"id": content.get("id", content.get("key")), "caption": caption}


def _is_medium(name: str, part: object) -> bool:
    if name == "json" or name in _CAPTION_PARTS:
        return False
    if name.rpartition(".")[2] in _MEDIA:
        return True
    return isinstance(part, bytes) and (part.startswith(_BEGINNINGS) or part[:4] == b"RIFF" and part[8:12] == b"WEBP")
