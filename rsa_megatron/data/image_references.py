"""What a record gives for an image: a path, an address, bytes, or these in an object or a list of several."""

import base64
import binascii
import re
from collections.abc import Mapping

from rsa_megatron.data.field_values import is_absent, is_null_text, list_objects, parse_text
from rsa_megatron.data.sources.record import Unusable

#: Of an object, what holds the image: Hugging Face's {bytes, path}, OpenAI's {url}, transformers' and Anthropic's parts.
REFERENCE_FIELDS = ("bytes", "path", "url", "image", "image_url", "base64", "data", "file_name", "source")
# How the base64 of a JPEG, PNG, GIF, WebP, BMP begins.
_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk)[A-Za-z0-9+/\s]{60,}={0,2}\s*")
_DATA_ADDRESS = re.compile(r"data:[^,]{0,100}?(;base64)?,", re.IGNORECASE)


def list_references(value: object) -> list[str | bytes]:
    """List the images that a field names, each by its path, address or bytes; nulls are left out.

    Raises:
        Unusable: it is none of these.
    """
    value = parse_text(value)
    if is_absent(value) or is_null_text(value):
        return []
    if isinstance(value, (bytes, str)):
        return [decode_reference(value)]
    if isinstance(value, Mapping):
        return _list_of_object(value)
    if isinstance(value, (list, tuple)):
        return [reference for item in value for reference in list_references(item)]
    raise Unusable("wrong type", f"its image is a {type(value).__name__}; it must be a path, bytes, or {{bytes, path}}")


def _list_of_object(value: Mapping) -> list[str | bytes]:
    if objects := list_objects(value):
        return [reference for item in objects for reference in list_references(item)]
    for name in REFERENCE_FIELDS:
        if not is_absent(value.get(name)):
            found = value[name]
            if name in ("bytes", "base64", "data") and isinstance(found, str):
                return [_decode_base64(found)]
            return list_references(found)
    raise Unusable(
        "wrong type", f"its image is an object with {', '.join(map(str, value))}; it must have bytes or path"
    )


def decode_reference(reference: str | bytes) -> str | bytes:
    """Return the bytes that a data address or base64 is; a path or another address as it is."""
    if isinstance(reference, bytes):
        return reference
    if reference[:5].lower() == "data:" and (found := _DATA_ADDRESS.match(reference)):
        return _decode_base64(reference[found.end() :])
    return _decode_base64(reference) if is_base64(reference) else reference


def is_base64(text: str) -> bool:
    """Return whether a text is an image in base64, or a sound in a container of the same kind as WebP."""
    return len(text) > 64 and bool(_BASE64.fullmatch(text))


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unusable("unreadable image", f"its image is not the base64 that it says it is: {error}") from error
