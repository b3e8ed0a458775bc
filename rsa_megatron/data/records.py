"""One record as people have it, turned into ours: an id, turns of text with <image> in them, and the images meant.

Every source of data, `show`, `measure`, `realign` and the task encoder read records through `read_record`. It takes

    turns         conversations or messages, of {from, value} or {role, content}, one of them perhaps null; a list of these, an
                  object of lists (arrow's), or either as JSON in a text
    content       a text with <image> in it, or a list of parts: texts, and images by path, address, data or place in `images`
                  (OpenAI's, TRL's, Qwen's, transformers' chat templates)
    caption       in place of turns one text, or a list of which the first counts: it answers CAPTION_PROMPT
    images        a path, bytes, {bytes, path}, data:..., base64, or a list of these; media_names.py has the fields' names
    id            any scalar

and leaves out, with the reason, what names a medium that is not read. Null, NaN, "", and lists and objects of them are absent.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rsa_megatron.data.conversation import IMAGE_TOKEN
from rsa_megatron.data.field_values import escape_surrogates, is_absent, parse_text
from rsa_megatron.data.image_references import list_references
from rsa_megatron.data.media_names import (
    FILE_FIELDS,
    IMAGE_FIELDS,
    IMAGE_SUFFIXES,
    find_unread,
    is_file,
    list_names,
    may_name_medium,
)
from rsa_megatron.data.record_checks import check_agreement, check_no_places, check_no_task, check_texts
from rsa_megatron.data.record_turns import Mark, not_read, read_turns
from rsa_megatron.data.sources.record import Unusable

CAPTION_PROMPT = f"{IMAGE_TOKEN}\nPlease generate detailed descriptions of the given image."
CONVERSATION_FIELDS = ("conversations", "messages", "conversation", "texts")
#: Of these the first that is filled counts.
CAPTION_FIELDS = (
    *("caption_reference_description", "raw", "comment", "caption", "captions", "sentences", "text", "txt", "TEXT"),
)


_OTHER_LETTERS = re.compile(re.escape(IMAGE_TOKEN), re.IGNORECASE)


@dataclass(frozen=True)
class ReadRecord:
    """A record that can be trained on, but for its images, which are not opened yet."""

    #: None where it has none
    id: str | int | None
    #: [{"from": human, gpt or system (user, assistant), "value": text}], with an <image> for each image
    turns: list[dict]
    #: in the order of their <image>: a path or an address as it stands there, or the bytes; [] if they lie beside the record
    images: list[str | bytes]
    #: whether it has a caption in place of turns
    is_caption: bool = False

    def as_dict(self) -> dict:
        """Return it as it is stored beside its images."""
        return {"id": self.id, "conversations": self.turns}

    @property
    def texts(self) -> list[str]:
        return [turn["value"] for turn in self.turns]

    @property
    def caption(self) -> str:
        """Return its answers, a line each."""
        return "\n".join(turn["value"].strip() for turn in self.turns if turn["from"] in ("gpt", "assistant"))


def read_record(
    content: object, *, images_beside: int | None = None, beside: str = "image(s)", texts_alone: bool = False
) -> ReadRecord:
    """Turn a record into ours.

    Args:
        content: what JSON, a table's row or a part of a tar holds; also a list that is a conversation itself.
        images_beside: how many images lie beside it, as in a tar; None: it names its images itself.
        beside: what these are, in words.
        texts_alone: whether its images do not count: there may be another number of them than of <image>.

    Raises:
        Unusable: it cannot be trained on; says what was found.
    """
    fields = _get_fields(content)
    own_field, own = _find_images(fields)
    known = {"id", "system", own_field, *CONVERSATION_FIELDS, *CAPTION_FIELDS, *IMAGE_FIELDS}
    others = {name: value for name, value in fields.items() if name not in known}
    names = list_names(fields[own_field]) if own_field else set()
    if images_beside is None:
        check_agreement(fields, own_field, names)
    has_media = bool(own or images_beside or texts_alone or any(map(may_name_medium, fields)))
    try:
        field, turns, marks = _read_talk(fields, names, has_media)
    except Unusable:
        _check_read(others, names, has_image=True)  # a field says more than the mark that stands for it
        raise
    is_caption = field in CAPTION_FIELDS
    if is_caption:
        check_no_task(fields, field)
    has_image = bool(own or images_beside or any(mark.reference for mark in marks))
    names |= {name for mark in marks if mark.reference for name in list_names(mark.reference)}
    _check_read(others, names, has_image=has_image)
    check_no_places(fields, turns)
    if not texts_alone:
        if is_caption and not has_image:
            raise Unusable(
                "number of images", f"it has a caption ({field}) and no image; its fields are {_name(fields)}"
            )
        turns, own = _match_images(turns, marks, own, images_beside, beside)
    check_texts(turns)
    return ReadRecord(_read_id(fields.get("id")), turns, own, is_caption)


def _get_fields(content: object) -> dict:
    """Return a record's fields that are filled."""
    if isinstance(content, Unusable):
        raise content
    content = parse_text(content)
    if isinstance(content, (list, tuple)) and content and all(isinstance(turn, Mapping) for turn in content):
        return {"conversations": content}
    if not isinstance(content, Mapping):
        raise Unusable("wrong type", f"it is a {type(content).__name__}, not an object with conversations")
    return {name: value for name, value in content.items() if not is_absent(value)}


def _check_read(fields: dict, names: set[str], *, has_image: bool) -> None:
    if unread := find_unread(fields.items(), has_image=has_image, read=names):
        raise not_read(
            f"field {unread}",
            f"its field {unread} names a medium that is not read; images are in a field image or images",
        )


def _name(fields: dict) -> str:
    return ", ".join(map(str, fields)) or "all empty"


def _read_talk(fields: dict, names: set[str], has_media: bool) -> tuple[str, list[dict], list[Mark]]:
    """Return the field that holds a record's turns or caption, the turns, and what each <image> in them stands for."""
    for name in CONVERSATION_FIELDS:
        if name in fields:
            turns, marks = read_turns(fields[name], names=names, has_media=has_media)
            if isinstance(fields.get("system"), (str, list, tuple)) and turns and turns[0]["from"] != "system":
                system = [{"from": "system", "value": fields["system"]}]
                first, first_marks = read_turns(system, names=names, has_media=has_media)
                turns, marks = first + turns, first_marks + marks
            return name, turns, marks
    for name in CAPTION_FIELDS:
        if name in fields and (caption := read_caption(fields[name])):
            turns = [{"from": "human", "value": CAPTION_PROMPT}, {"from": "gpt", "value": caption}]
            return name, turns, [Mark()]
    if fields.keys() & {"from", "role"} and fields.keys() & {"value", "content"}:
        raise Unusable("conversation", "it is one turn; a record has a list of them: conversations, messages")
    raise Unusable("conversation", f"it has no conversations, messages or caption; its fields are {_name(fields)}")


def read_caption(value: object) -> str:
    """Return the first caption of a field that holds one or several; "" without one."""
    if isinstance(value, str):
        found = parse_text(value)
        if (
            isinstance(found, str)
            or not isinstance(found, list)
            or not all(isinstance(item, (str, Mapping)) for item in found)
        ):
            return value.strip()
        return read_caption(found)
    if isinstance(value, Mapping):  # Karpathy's sentences, COCO's annotations
        return next(
            (read_caption(value[name]) for name in ("raw", "caption", "text") if not is_absent(value.get(name))), ""
        )
    if isinstance(value, (list, tuple)):
        return next(filter(None, map(read_caption, value)), "")
    return ""


def _find_images(fields: dict) -> tuple[str | None, list[str | bytes]]:
    """Return the field that holds a record's images, and the images."""
    fields = {name: value for name, value in fields.items() if not isinstance(value, bool)}
    if "image" in fields and "images" in fields:
        one, several = list_references(fields["image"]), list_references(fields["images"])
        if not all(image in several or list_names(image) & list_names(fields["images"]) for image in one):
            raise Unusable("number of images", "its image is not one of its images; keep the one field or the other")
        if several:
            return "images", several
    for name in IMAGE_FIELDS:
        if name in fields and (found := list_references(fields[name])):
            return name, found
    for name in FILE_FIELDS:
        if name in fields and is_file(fields[name], IMAGE_SUFFIXES):
            return name, list_references(fields[name])
    return None, []


def _match_images(
    turns: list[dict], marks: list[Mark], own: list[str | bytes], num_beside: int | None, beside: str
) -> tuple[list[dict], list[str | bytes]]:
    """Give each <image> its image; where the text has none they come first in it."""
    available: Sequence = own if num_beside is None else range(num_beside)
    if not marks and own and len(own) != len(available):
        raise Unusable("number of images", f"it names {len(own)} image(s) and the sample has {num_beside} {beside}")
    if not marks:
        return (_mark_images(turns, len(available)) if available else turns), own if num_beside is None else []
    named = num_beside is None and all(mark.reference is not None for mark in marks)
    ordered = [mark.index if mark.index is not None else number for number, mark in enumerate(marks)]
    if (len(marks) != len(available) and (available or not named)) or (
        not named and set(ordered) != set(range(len(available)))
    ):
        there = f"the record {len(own)} image(s)" if num_beside is None else f"the sample {num_beside} {beside}"
        raise Unusable("number of images", f"its text has {len(marks)} {IMAGE_TOKEN} and {there}")
    if num_beside is not None:
        if ordered != sorted(ordered):
            raise Unusable("number of images", "its text names the images beside it in another order than theirs")
        return turns, []
    return turns, [own[index] if mark.reference is None else mark.reference for index, mark in zip(ordered, marks)]


def _mark_images(turns: list[dict], count: int) -> list[dict]:
    """Put in an <image> for each image: where the questions have it in other letters (<Image>), else at the beginning."""
    found = [len(_OTHER_LETTERS.findall(turn["value"])) if turn["from"] in ("human", "user") else 0 for turn in turns]
    if not any(found):
        return add_image_tokens(turns, count)
    if sum(found) != count:
        raise Unusable(
            "number of images", f"its text has {sum(found)} {IMAGE_TOKEN}, in other letters, for {count} image(s)"
        )
    return [
        {**turn, "value": _OTHER_LETTERS.sub(IMAGE_TOKEN, turn["value"])} if number else turn
        for turn, number in zip(turns, found)
    ]


def add_image_tokens(turns: list[dict], count: int = 1) -> list[dict]:
    """Put <image> before the first human turn's text, once for each image.

    Raises:
        Unusable: there is no such turn.
    """
    for index, turn in enumerate(turns):
        if turn["from"] in ("human", "user"):
            with_images = {"from": turn["from"], "value": f"{IMAGE_TOKEN}\n" * count + turn["value"]}
            return [*turns[:index], with_images, *turns[index + 1 :]]
    raise Unusable("conversation", "it has an image and no human turn to put it in")


def _read_id(value: object) -> str | int | None:
    """Return an id as a text or a whole number: 3.0 is "3"."""
    if isinstance(value, (list, tuple, Mapping)):
        raise Unusable("wrong type", f"its id is a {type(value).__name__}")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if isinstance(value, str):
        return escape_surrogates(value)
    if value is None or isinstance(value, int):
        return value
    return str(value)
