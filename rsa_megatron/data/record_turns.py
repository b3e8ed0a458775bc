"""The turns of a record's conversation, each with one text in which <image> stands for every image."""

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from rsa_megatron.data.conversation import IMAGE_TOKEN
from rsa_megatron.data.field_values import is_absent, list_objects, parse_text
from rsa_megatron.data.image_references import REFERENCE_FIELDS, list_references
from rsa_megatron.data.media_names import IMAGE_FIELDS, find_mark, find_unread, list_names
from rsa_megatron.data.sources.record import Unusable

_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "images", "image_url", "input_image", "img")
_IMAGE_OF_MINICPM = re.compile(r"\(?<image>\./</image>\)?")
# OpenAI's, ms-swift's and axolotl's flags of an answer.
_TRAINED_FIELDS = ("weight", "loss", "train")
_TURN_FIELDS = {"from", "role", "value", "content"}


@dataclass(frozen=True)
class Mark:
    """An <image> in the text: the image itself, if the text names it, or which of the record's images, if it says so."""

    reference: str | bytes | None = None
    index: int | None = None


def not_read(what: str, sentence: str) -> Unusable:
    """Make the fault of a record with a medium that is not read: counted by `what` names it."""
    return Unusable(f"a medium that is not read ({what})", sentence)


def read_turns(
    value: object, *, names: Set[str] = frozenset(), has_media: bool = True
) -> tuple[list[dict], list[Mark]]:
    """Return the turns of a conversation as {"from", "value"}, and what each <image> in them stands for, in order.

    Args:
        names: of the record's images, as `list_names` gives them.
        has_media: whether the record names any medium beside its turns.

    Raises:
        Unusable: it is no conversation, or names a medium that is not read.
    """
    turns = parse_text(value)
    if isinstance(turns, Mapping):
        turns = list_objects(turns) or [turns]
    if not isinstance(turns, (list, tuple)):
        raise Unusable(
            "conversation", f"its conversation is {_describe(value)}; it must be a list of turns {{from, value}}"
        )
    read, marks = [], []
    for number, turn in enumerate(_split_exchanges(turns)):
        if not isinstance(turn, Mapping):
            raise Unusable(
                "conversation", f"turn {number} of its conversation is {_describe(turn)}; it must be {{from, value}}"
            )
        speaker = next((turn[name] for name in ("from", "role") if not is_absent(turn.get(name))), None)
        speaker = speaker.strip().lower() if isinstance(speaker, str) else speaker
        text = _read_text(turn, number, marks, names)
        is_answer = speaker in ("gpt", "assistant")
        if is_answer and (flag := next((n for n in _TRAINED_FIELDS if n in turn and turn[n] in (0, "0")), None)):
            raise Unusable(
                "an answer that is not to be trained",
                f"turn {number} of its conversation says that it is not to be trained ({flag}: {turn[flag]}); all answers of a "
                "record are: leave out the turn or the field",
            )
        if mark := find_mark(text, is_answer=is_answer, has_media=has_media or bool(marks)):
            raise not_read(
                f"{mark[:40]} in its text",
                f"turn {number} of its conversation has {mark[:100]}, the mark of a medium that is not read; of an image it must be {IMAGE_TOKEN}",
            )
        read.append({"from": speaker, "value": text})
    return read, marks


def _split_exchanges(turns: Sequence) -> list:
    """Make two turns of each {user, assistant}, as the Cauldron and FineVision have them."""
    split = []
    for turn in turns:
        is_exchange = isinstance(turn, Mapping) and {"user", "assistant"} <= turn.keys()
        split += [{"from": name, "value": turn[name]} for name in ("user", "assistant")] if is_exchange else [turn]
    return split


def _read_text(turn: Mapping, number: int, marks: list[Mark], names: Set[str]) -> str:
    """Return a turn's text; the images in it are added to `marks`."""
    named = [name for name in ("value", "content") if turn.get(name) is not None]
    name = next((name for name in named if not is_absent(turn[name])), named[0] if named else None)
    if name is None:
        raise Unusable(
            "conversation",
            f"turn {number} of its conversation has no value or content; its fields are {', '.join(map(str, turn))}",
        )
    content = _parse_parts(turn[name])
    content = list_objects(content) or [content] if isinstance(content, Mapping) else content
    pieces = [content] if isinstance(content, str) else content
    if not isinstance(pieces, (list, tuple)):
        raise Unusable(
            "conversation", f"the {name} of turn {number} is {_describe(content)}; it must be a text or a list of parts"
        )
    pieces = [piece for part in pieces if part is not None for piece in [_read_part(part, number)]]
    if not turn.keys() <= _TURN_FIELDS:
        pieces = _read_turns_images(turn, pieces, number, names) + pieces
    text = ""
    for piece in pieces:
        new = piece if isinstance(piece, str) else IMAGE_TOKEN
        marks += [Mark()] * new.count(IMAGE_TOKEN) if isinstance(piece, str) else [piece]
        text += "\n" * bool(text and new and not text[-1].isspace() and not new[0].isspace()) + new
    return text


def _parse_parts(content: object) -> object:
    """Return the list of parts that a text is, as JSON; the content itself if it is none."""
    parts = parse_text(content) if isinstance(content, str) else content
    if not isinstance(parts, (list, tuple)) or not parts:
        return content
    are_parts = all(
        isinstance(part, Mapping)
        and part.get("type") in (*_TEXT_PARTS, *_IMAGE_PARTS, "video", "audio", "video_url", "input_audio")
        for part in parts
    )
    return parts if are_parts else content


def _read_turns_images(turn: Mapping, pieces: list, number: int, names: Set[str]) -> list[Mark]:
    """Return what a turn names beside its text (Ollama's images); it must name no other medium."""
    filled = {name: value for name, value in turn.items() if name not in _TURN_FIELDS and not is_absent(value)}
    found = next((list_references(filled[name]) for name in IMAGE_FIELDS if name in filled), [])
    rest = [(name, value) for name, value in filled.items() if name not in IMAGE_FIELDS]
    own = {name for reference in found for name in list_names(reference)}
    if unread := find_unread(rest, has_image=bool(found), read=names | own):
        raise not_read(
            f"field {unread} of a turn", f"the field {unread} of turn {number} names a medium that is not read"
        )
    if found and any(isinstance(piece, Mark) or IMAGE_TOKEN in piece for piece in pieces):
        raise Unusable(
            "number of images",
            f"turn {number} has images of its own and {IMAGE_TOKEN} in its text; keep the one or the other",
        )
    return [Mark(reference) for reference in found]


def _read_part(part: object, number: int) -> str | Mark:
    """Read a part of a turn's content: a text, or an image."""
    if isinstance(part, str):
        return _IMAGE_OF_MINICPM.sub(IMAGE_TOKEN, part)
    if not isinstance(part, Mapping):
        raise Unusable(
            "conversation", f"a part of turn {number} is {_describe(part)}; it must be a text or {{type, ...}}"
        )
    filled = {name: value for name, value in part.items() if not is_absent(value)}
    kind = str(filled.pop("type", "")).lower()
    names_image = any(name in filled for name in IMAGE_FIELDS)
    if kind in _IMAGE_PARTS or (not kind and names_image):
        return _read_image_part(filled)
    unread = find_unread(
        ((n, v) for n, v in filled.items() if n not in ("text", "content", "value")), has_image=kind in _TEXT_PARTS
    )
    text = next((part[name] for name in ("text", "content", "value") if isinstance(part.get(name), str)), None)
    if text is None and kind in _TEXT_PARTS and "text" in part and not filled:
        text = ""
    if not unread and kind in ("", *_TEXT_PARTS) and text is not None and not names_image:
        return _IMAGE_OF_MINICPM.sub(IMAGE_TOKEN, text)
    what = f"of type {kind}" if kind else f"with {', '.join(map(str, filled)) or 'nothing in it'}"
    raise not_read(
        f"a part {what}", f"turn {number} of its conversation has a part {what}, which is not read; text and images are"
    )


def _read_image_part(filled: dict) -> Mark:
    for name in (*IMAGE_FIELDS, *REFERENCE_FIELDS):
        if name in filled:
            references = list_references(filled[name] if name != "base64" else {"base64": filled[name]})
            if len(references) != 1:
                raise Unusable(
                    "number of images", f"a part of its conversation names {len(references)} images; it must name one"
                )
            return Mark(references[0])
    index = filled.get("index")
    if index is not None and not (isinstance(index, (int, float)) and float(index).is_integer()):
        raise Unusable(
            "number of images", f"a part of its conversation has the index {index!r:.40}, not a whole number"
        )
    return Mark(index=None if index is None else int(index))


def _describe(value: object) -> str:
    """Describe a value of the wrong type."""
    return f"the text {value[:40]!r}" if isinstance(value, str) else f"a {type(value).__name__}"
