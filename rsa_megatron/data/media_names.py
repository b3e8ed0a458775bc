"""Which fields, parts and marks of a record stand for an image, and which for a medium that nobody reads.

An image has many names; those of IMAGE_FIELDS are read. A record that names a video, a sound, or an image under another
name must not be trained as if it were text: `find_unread` and `find_mark` say what it is that is not read.
"""

import re
from collections.abc import Iterable, Mapping, Set
from numbers import Number
from pathlib import PurePosixPath

from rsa_megatron.data.field_values import is_absent, is_null_text, parse_text
from rsa_megatron.data.image_references import is_base64

#: Of these fields the first that is filled holds a record's image or images.
IMAGE_FIELDS = (
    *("image", "images", "image_path", "image_paths", "image_file", "image_files", "image_file_name", "image_name"),
    *("img", "imgs", "img_path", "img_paths", "image_bytes", "image_base64", "image_url", "image_urls", "img_url"),
    *("image_filename", "img_file", "img_filename", "img_file_name", "img_name"),
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
_SOUNDS = {"sound", "sounds", "speech", "voice", "music"}
_PERHAPS_MEDIA = _SOUNDS | {"movie", "clip", "clips", "frame", "frames", "media", "medium", "attachment", "attachments"}
_IMAGE_WORDS = {"image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "screenshot", "screenshots"}
_FILE_WORDS = {"path", "paths", "file", "files", "url", "urls", "uri", "link", "dir", "folder", "filename", "filenames"}
# Beside these words a medium's name is no more than itself.
_PLAIN_WORDS = _FILE_WORDS | {"name", "names", "bytes", "data", "base64", "list", "input", "inputs", "raw"}
# In a record without an image all others say that there is a medium, but for these, which say something about it.
_TELLING_WORDS = frozenset(
    "caption captions description descriptions title titles type types kind format size sizes width height count number num has "
    "is needs requires required available with no duration length language lang category categories class classes label labels "
    "tag tags topic topics genre summary transcript transcripts transcription text texts prompt prompts question questions "
    "answer answers fps rate resolution dimensions ratio quality style license credit credits author artist photographer "
    "channel creator date time hash alt ocr score scores similarity status error model modality domain context token tokens "
    "placeholder mode".split()
)
# And beside these, one with an image says where that is from.
_ABOUT_WORDS = {
    "id",
    "ids",
    "key",
    "keys",
    "source",
    "src",
    "hash",
    "original",
    "orig",
    "size",
    "sizes",
    "type",
    "format",
}

_DATA_ADDRESS = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,", re.IGNORECASE)
# Of an object that is a file, what names or holds it.
_FILE_KEYS = ("path", "url", "uri", "file", "file_name", "filename", "name", "src")

# In questions; <video> ... </video> is HTML.
_TAG = re.compile(
    r"<(?:vila/)?(video|audio|sound|speech|music|point(?:_?cloud)?|motion)s?([_ -]?\d+)?>|<image([_ -]?\d+)>|<img>",
    re.IGNORECASE,
)
# A file that a question shows, as forums and Markdown write it.
_SHOWN = re.compile(
    rf"\[img\][^\[\]\s]+\[/img\]|!\[[^\]\n]*\]\((?:data:|(?!https?:)[^()\n]+(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))})\))",
    re.IGNORECASE,
)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
# Other models' marks of media, which no other text holds.
_MARK = re.compile(
    r"<\|(?:vision_(?:start|end|pad)|image(?:_pad|_start|_end|_\d+)?|video(?:_pad|_start)?|media_(?:begin|end|pad)|"
    r"audio(?:_bos|_eos|_pad|_start|_\d+)?)\|>|<img>[^<>\n]*</img>|<(?:IMG_CONTEXT|ImageHere|image_placeholder|im_patch|"
    r"start_of_image|image_soft_token|SpeechHere|AudioHere|VideoHere)>|<(?:audio|video)>[^<>\n]+\.\w+</",
    re.IGNORECASE,
)


def find_unread(fields: Iterable[tuple[str, object]], *, has_image: bool, read: Set[str] = frozenset()) -> str | None:
    """Return the name of a field that names a medium which is not read; None where there is none.

    Args:
        fields: of a record or a turn, those that are filled and not read already, by name.
        has_image: whether an image of it is read. If so, what merely describes that image does not count.
        read: names of the images that are read, as `list_names` gives them: another field may repeat them.
    """
    for name, value in fields:
        value = parse_text(value)
        filled = [v for v in value.values() if not is_absent(v)] if isinstance(value, Mapping) else [value]
        if all(is_absent(v) or is_null_text(v) or isinstance(v, Number) for v in filled):
            continue
        words = _split_words(name)
        is_plain = words <= _IMAGE_WORDS | _PERHAPS_MEDIA | _PLAIN_WORDS | {"id", "key"}
        is_known = (is_plain or not may_name_medium(name)) and list_names(value) and list_names(value) <= read
        if not is_known and (
            _names_medium(words, value) or (not has_image and name != "id" and _names_medium_alone(words, value))
        ):
            return name
    return None


def _names_medium(words: set[str], value: object) -> bool:
    """Return whether a field names a medium beside the image that is read."""
    others = words - _MEDIA - _PERHAPS_MEDIA
    if words & _MEDIA and all(word in _PLAIN_WORDS or word.isdigit() for word in others):
        return True
    if words & _SOUNDS and (others and others <= _FILE_WORDS or _are_numbers(value)):
        return True
    if words & _ABOUT_WORDS:
        return False
    if words & _PERHAPS_MEDIA and (is_file(value, _OTHER_SUFFIXES + IMAGE_SUFFIXES) or _are_files(value)):
        return True
    if words & _MEDIA and is_file(value, _OTHER_SUFFIXES):
        return True
    return bool(words & (_IMAGE_WORDS | {"depth"})) and is_file(value, IMAGE_SUFFIXES, addresses=False)


def _names_medium_alone(words: set[str], value: object) -> bool:
    """Return whether a field of a record without an image names a medium."""
    if is_file(value, _OTHER_SUFFIXES + IMAGE_SUFFIXES, spaces=False):
        return True
    if words & _TELLING_WORDS or not _has_text(value):
        return False
    others = words - _PERHAPS_MEDIA
    return bool(words & (_MEDIA | _IMAGE_WORDS | {"youtube", "thumbnail"})) or bool(
        words & _PERHAPS_MEDIA and others and others <= _FILE_WORDS | {"list", "segment", "features"}
    )


def _are_numbers(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, Number) for item in value)


def _are_files(value: object) -> bool:
    """Return whether a value is an object that says where a file is, or a list of such."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return any(
        isinstance(item, Mapping) and any(not is_absent(item.get(key)) for key in _FILE_KEYS if key != "name")
        for item in items
    )


def _has_text(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_text, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_text, value))
    return isinstance(value, str) and not is_absent(value) and not is_null_text(value)


def list_names(value: object) -> set[str]:
    """List the names of the files that a value names, each without folders and suffix, in lower case."""
    value = parse_text(value)
    if isinstance(value, str):
        return {PurePosixPath(value.partition("?")[0]).stem.lower()} if len(value) < 500 else set()
    if isinstance(value, Mapping):
        value = [value[key] for key in ("image", "image_url", *_FILE_KEYS) if not is_absent(value.get(key))]
    return {name for item in value for name in list_names(item)} if isinstance(value, (list, tuple)) else set()


def may_name_medium(field: str) -> bool:
    """Return whether a field's name has a medium in it, read or not."""
    return bool(_split_words(field) & (_MEDIA | _PERHAPS_MEDIA | _IMAGE_WORDS | {"depth", "youtube"}))


def _split_words(field: object) -> set[str]:
    return set(re.findall(r"mp[34]|[a-z]+|[0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(field)).lower()))


def is_file(value, suffixes: tuple[str, ...], *, addresses: bool = True, spaces: bool = True) -> bool:
    """Return whether a value is a file's bytes, or names files of these suffixes.

    Args:
        addresses: whether an address counts.
        spaces: whether a name may have spaces.
    """
    if isinstance(value, str):
        is_named = value.lower().partition("?")[0].endswith(suffixes) and len(value) < 500 and "\n" not in value
        is_named = is_named and (spaces or not any(map(str.isspace, value.strip())))
        return (is_named and (addresses or "://" not in value)) or bool(_DATA_ADDRESS.match(value)) or is_base64(value)
    if isinstance(value, Mapping):
        held = any(not is_absent(value.get(key)) for key in ("bytes", "array"))
        return held or any(is_file(value.get(key), suffixes, addresses=addresses, spaces=spaces) for key in _FILE_KEYS)
    if isinstance(value, (list, tuple)):
        return any(is_file(item, suffixes, addresses=addresses, spaces=spaces) for item in value)
    return isinstance(value, bytes)


def find_mark(text: str, *, is_answer: bool, has_media: bool = True) -> str | None:
    """Return the mark in a turn's text that stands for a medium which is not read; None where there is none.

    Args:
        has_media: whether its record names any medium. If not, a tag within a line is one that is spoken of.
    """
    if "<" not in text and "[" not in text:
        return None
    if found := _MARK.search(text):
        return found[0]
    if is_answer:  # it may speak of tags
        return None
    if not _TAG.search(text) and not _SHOWN.search(text):
        return None
    text = _CODE.sub("", text)
    if found := _SHOWN.search(text):
        return found[0]
    for found in _TAG.finditer(text):
        if f"</{found[1] or found[0][1:4]}".lower() in text.lower():
            continue
        line_before, line_after = text[: found.start()].rpartition("\n")[2], text[found.end() :].partition("\n")[0]
        if has_media or found[2] or found[3] or not line_before.strip() or not line_after.strip():
            return found[0]
    return None
