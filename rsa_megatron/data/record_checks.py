"""What must hold of a record that is read: else it would be trained as something that it is not. Each raises Unusable."""

import re
from numbers import Number

from rsa_megatron.data.conversation import check_conversation
from rsa_megatron.data.media_names import FILE_FIELDS, IMAGE_FIELDS, IMAGE_SUFFIXES, is_file, list_names
from rsa_megatron.data.sources.record import Unusable

# Beside a caption these say that the record is a question with its answer, and that its text is no caption.
_TASK_WORDS = {"question", "questions", "answer", "answers"}
TASK_FIELDS = {
    *("question_id", "question", "questions", "query", "queries", "prompt", "prompts", "instruction", "instructions"),
    *("answer", "answers", "response", "responses", "choices", "options", "label", "labels"),
}


def check_no_task(fields: dict, caption: str) -> None:
    """A question, its answer or a label says that the text beside it is no caption of the image."""
    words = {name: set(re.split(r"[\W_]+", str(name).lower())) for name in fields}
    tasks = [
        name
        for name in fields
        if str(name).lower() in TASK_FIELDS
        or (words[name] & _TASK_WORDS and not words[name] & {"num", "number", "count", "has"})
    ]
    if caption.startswith("caption") and isinstance(fields.get("label"), Number):  # the number of a class
        tasks = [name for name in tasks if name != "label"]
    if tasks:
        raise Unusable(
            "a question or label beside a caption",
            f"it has {', '.join(tasks)} beside {caption}, which is then no caption alone: make it conversations of a question "
            f"and its answer, or remove {', '.join(tasks)}",
        )


def check_agreement(fields: dict, own_field: str | None, names: set[str]) -> None:
    """Fields that name pictures must name the same ones: only those of one field are read.

    Args:
        own_field: the one that is read, if there is one.
        names: of its images, as `list_names` gives them.
    """
    for name in (*IMAGE_FIELDS, *FILE_FIELDS):
        is_other = name in fields and name != own_field and is_file(fields[name], IMAGE_SUFFIXES, addresses=False)
        if is_other and names and not list_names(fields[name]) <= names:
            raise Unusable(
                "number of images",
                f"its {own_field} and its {name} name different images; keep the one field or the other",
            )


def check_no_places(fields: dict, turns: list[dict]) -> None:
    """What stands for an object or a place in the image, in ms-swift's data, is filled in by that code alone."""
    marks = ("<ref-object>", "<bbox>")
    if "objects" in fields and (found := [mark for mark in marks if any(mark in turn["value"] for turn in turns)]):
        raise Unusable(
            "objects that are not filled in",
            f"its text has {', '.join(found)}, which stands for what its field objects holds; write that into the text",
        )


def check_texts(turns: list[dict]) -> None:
    """Turns must be a conversation, in UTF-8."""
    try:
        check_conversation(turns)
    except ValueError as error:
        raise Unusable("conversation", str(error)) from error
    try:
        "".join(turn["value"] for turn in turns).encode()
    except UnicodeEncodeError as error:
        raise Unusable("not UTF-8", f"its text is not UTF-8: {error}") from error
