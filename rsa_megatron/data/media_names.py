"""Which fields, parts and marks of a record stand for an image, and which for a medium that nobody reads.

An image has many names; those of IMAGE_FIELDS are read. A record that names a video, a sound, or an image under another
name must not be trained as if it were text: `find_unread` and `find_mark` say what it is that is not read.
"""

import re
from collections.abc import Iterable, Mapping
from numbers import Number

from rsa_megatron.data.field_values import is_absent, is_null_text, parse_text

#: Of these fields the first that is filled holds a record's image or images.
IMAGE_FIELDS = (
    *("image", "images", "image_path", "image_paths", "image_file", "image_files", "image_file_name", "image_name"),
    *("img", "imgs", "img_path", "img_paths", "image_bytes", "image_base64", "image_url", "image_urls", "img_url"),
)
#: Then these, where they hold a picture's bytes, or what they name has a picture's suffix.
FILE_FIELDS = (
    *("picture", "pictures", "photo", "photos", "jpg", "jpeg", "png", "webp"),
    *("file_name", "filename", "filepath", "file_path", "file", "path", "url"),
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

_OTHER_SUFFIXES = (
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp"),
    *(".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".wma", ".ply", ".pcd", ".glb"),
)
# Words of a field's name. Those that mean more than a medium count where the value looks like one.
_MEDIA = {"video", "videos", "vid", "vids", "audio", "audios", "mp4", "webm", "avi", "wav", "mp3", "flac", "pointcloud"}
_PERHAPS_MEDIA = {"sound", "sounds", "speech", "voice", "music", "movie", "clip", "clips", "frames", "media", "medium"}
_IMAGE_WORDS = {"image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "depth"}
# Beside these words a medium's name is no more than itself.
_PLAIN_WORDS = {"path", "paths", "file", "files", "url", "urls", "uri", "name", "names", "filename", "filenames"} | {
    *("bytes", "data", "base64", "list", "input", "inputs", "raw")
}
# And beside these, in a record without an image; in one with an image they may say where that is from.
_ORIGIN_WORDS = {
    "id",
    "ids",
    "key",
    "source",
    "src",
    "clip",
    "clips",
    "segment",
    "frame",
    "frames",
    "feature",
    "features",
}
_ABOUT_WORDS = {"id", "ids", "source", "src", "hash", "original", "orig", "size", "sizes", "type", "format"}

_DATA_ADDRESS = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,", re.IGNORECASE)

# In questions; <video> ... </video> is HTML.
_TAG = re.compile(
    r"<(?:vila/)?(video|audio|sound|speech|music|point_?cloud|motion)s?(?:[_ -]?\d+)?>|<image[_ -]?\d+>|<img>",
    re.IGNORECASE,
)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
# Other models' marks of media, which no other text holds.
_MARK = re.compile(
    r"<\|(?:vision_(?:start|end|pad)|image(?:_pad|_start|_end|_\d+)?|video(?:_pad|_start)?|media_(?:begin|end|pad)|"
    r"audio(?:_bos|_eos|_pad|_start|_\d+)?)\|>|<img>[^<>\n]*</img>|<(?:IMG_CONTEXT|ImageHere|image_placeholder|im_patch|"
    r"start_of_image|image_soft_token)>|<(?:audio|video)>[^<>\n]+\.\w+</",
    re.IGNORECASE,
)


def find_unread(fields: Iterable[tuple[str, object]], *, has_image: bool) -> str | None:
    """Return the name of a field that names a medium which is not read; None where there is none.

    Args:
        fields: of a record or a turn, those that are filled and not read already, by name.
        has_image: whether an image of it is read. If so, what merely describes that image does not count.
    """
    for name, value in fields:
        value = parse_text(value)
        filled = [v for v in value.values() if not is_absent(v)] if isinstance(value, Mapping) else [value]
        if all(is_absent(v) or is_null_text(v) or isinstance(v, Number) for v in filled):
            continue
        words = _split_words(name)
        plain = _MEDIA | _PLAIN_WORDS | (set() if has_image else _ORIGIN_WORDS)
        if words & _MEDIA and all(word in plain or word.isdigit() for word in words):
            return name
        if words & _PERHAPS_MEDIA and is_file(value, _OTHER_SUFFIXES + IMAGE_SUFFIXES):
            return name
        if words & _IMAGE_WORDS and not words & _ABOUT_WORDS and is_file(value, IMAGE_SUFFIXES, addresses=False):
            return name
        if not has_image and name != "id" and is_file(value, _OTHER_SUFFIXES + IMAGE_SUFFIXES):
            return name
    return None


def may_name_medium(field: str) -> bool:
    """Return whether a field's name has a medium in it, read or not."""
    return bool(_split_words(field) & (_MEDIA | _PERHAPS_MEDIA | _IMAGE_WORDS))


def _split_words(field: object) -> set[str]:
    return set(re.findall(r"mp[34]|[a-z]+|[0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(field)).lower()))


def is_file(value, suffixes: tuple[str, ...], *, addresses: bool = True) -> bool:
    """Return whether a value is a file's bytes, or names files of these suffixes."""
    if isinstance(value, str):
        is_named = value.lower().partition("?")[0].endswith(suffixes) and len(value) < 500 and "\n" not in value
        return (is_named and (addresses or "://" not in value)) or bool(_DATA_ADDRESS.match(value))
    if isinstance(value, Mapping):
        return any(not is_absent(value.get(key)) for key in ("bytes", "array")) or is_file(value.get("path"), suffixes)
    if isinstance(value, (list, tuple)):
        return any(is_file(item, suffixes, addresses=addresses) for item in value)
    return isinstance(value, bytes)


def find_mark(text: str, *, is_answer: bool) -> str | None:
    """Return the mark in a turn's text that stands for a medium which is not read; None where there is none."""
    if "<" not in text:
        return None
    if found := _MARK.search(text):
        return found[0]
    if is_answer:  # it may speak of tags
        return None
    if not _TAG.search(text):
        return None
    for found in _TAG.finditer(_CODE.sub("", text)):
        if f"</{found[1] or found[0][1:4]}".lower() not in text.lower():
            return found[0]
    return None
