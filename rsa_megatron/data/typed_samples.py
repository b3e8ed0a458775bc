"""Samples of Energon's own types, whose dataset.yaml maps the files of a tar to fields, read as samples of ours.

    CaptioningSample      image, caption                            the caption answers the request for it
    VQASample             image, context, answers, answer_weights   the answer of the largest weight, the first of equal ones
    MultiChoiceVQASample  image, context, choices, correct_choice_idx

Megatron-LM's multimodal example prepares its data in these. A file is not decoded on the way but for json and text: images
come as bytes, as in any other sample of ours.
"""

import json
from collections.abc import Callable, Mapping

from megatron.energon import CaptioningSample, MultiChoiceVQASample, VQASample, basic_sample_keys
from megatron.energon.flavors import BaseCoreDatasetFactory, CrudeSample

from rsa_megatron.data.conversation import IMAGE_TOKEN
from rsa_megatron.data.sources.record import Unusable
from rsa_megatron.data.stored_parts import StoredSample

_TEXT_PARTS = ("txt", "text", "transcript", "caption")
# LLaVA's words for questions with choices.
_CHOOSE = "Answer with the option's letter from the given choices directly."


def is_typed(factory: BaseCoreDatasetFactory) -> bool:
    return factory.__sample_type__ is not CrudeSample


def check_type(factory: BaseCoreDatasetFactory) -> None:
    """Raise ValueError, with the remedy, for a type of sample that is not read."""
    name = factory.__sample_type__.__name__
    if is_typed(factory) and factory.__sample_type__ not in _MAKE_RECORD:
        known = ", ".join(known.__name__ for known in _MAKE_RECORD)
        raise ValueError(
            f"{factory.paths[0]}: its samples are of Energon's type {name}; CrudeWebdataset (a json with conversations beside the "
            f"images) and {known} are read: change .nv-meta/dataset.yaml to one of them, with a field_map that fits"
        )


def read_as_ours(factory: BaseCoreDatasetFactory) -> None:
    """Let a data set of typed samples yield ours."""
    factory.part_filter = _ignoring_case(factory.part_filter)
    factory.load_sample = lambda raw: _load(factory, raw)


def read_fields(factory: BaseCoreDatasetFactory, parts: Mapping[str, object]) -> tuple[object, dict]:
    """Map a sample's files to its image, as it was given, and the record.

    Args:
        parts: bytes by name; of a file that is not json or text, anything that stands for it.

    Raises:
        Unusable: they do not fit the data set's field_map, or have no answer.
    """
    try:
        decoded = {name: _decode(name.lower(), part) for name, part in parts.items()}
        decoded = {name.lower(): part for name, part in decoded.items()} | decoded
        fields = factory._sample_loader({"__key__": "", "__restore_key__": (), "__sources__": ()} | decoded)
        record = _MAKE_RECORD[factory.__sample_type__](fields)
    except Exception as error:  # whatever a data set's own loader raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        named = ", ".join(name for name in parts if not name.startswith("__"))
        raise Unusable(
            "field_map that does not fit",
            f"the field_map of its .nv-meta/dataset.yaml does not fit its parts {named}: {reason[:300]}",
        ) from error
    return fields.get("image"), record


def _load(factory: BaseCoreDatasetFactory, raw: dict) -> StoredSample:
    keys = basic_sample_keys(raw | {"__subflavors__": factory.subflavors})
    try:
        image, record = read_fields(factory, {name: part for name, part in raw.items() if not name.startswith("__")})
        if not isinstance(image, bytes):
            raise Unusable(
                "wrong type", f"its image is a {type(image).__name__}; its field_map must name an image file"
            )
    except Unusable as fault:
        return StoredSample(**keys, images={}, record=fault)
    return StoredSample(**keys, images={"png": image}, record=record)  # whatever picture it is: its bytes say so


def _ignoring_case(wants: Callable[[str], bool] | None) -> Callable[[str], bool] | None:
    return wants and (lambda name: wants(name) or wants(name.lower()))


def _decode(name: str, part: object) -> object:
    if not isinstance(part, bytes):
        return part
    suffix = name.rpartition(".")[2]
    if suffix == "json":
        return json.loads(part)
    return part.decode("utf-8-sig").strip() if suffix in _TEXT_PARTS else part


def is_text(name: str) -> bool:
    """Return whether a part is json or text, which `read_fields` must be given as bytes."""
    return name.lower().rpartition(".")[2] in ("json", *_TEXT_PARTS)


def _make_caption(fields: dict) -> dict:
    return {"caption": _get_text(fields, "caption")}


def _make_answer(fields: dict) -> dict:
    answers, weights = fields.get("answers"), fields.get("answer_weights")
    if isinstance(answers, list) and answers:
        weights = list(weights) if weights is not None else [1] * len(answers)
        fields = fields | {"answers": answers[max(range(len(answers)), key=lambda number: float(weights[number]))]}
    return _make_turns(_get_text(fields, "context"), _get_text(fields, "answers"))


def _make_choice(fields: dict) -> dict:
    choices, correct = fields.get("choices") or [], int(fields.get("correct_choice_idx", 0))
    if not 0 <= correct < len(choices) <= 26:
        raise ValueError(f"its correct choice is {correct} of {len(choices)}")
    lines = [f"{chr(65 + number)}. {choice}" for number, choice in enumerate(choices)]
    return _make_turns("\n".join([_get_text(fields, "context"), *lines, _CHOOSE]), chr(65 + correct))


def _make_turns(question: str, answer: str) -> dict:
    question = question if IMAGE_TOKEN in question else f"{IMAGE_TOKEN}\n{question}"
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def _get_text(fields: dict, name: str) -> str:
    value = fields.get(name)
    value = str(value) if isinstance(value, int | float) else value
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"its {name} is {value!r}, not a text")
    return value


_MAKE_RECORD = {CaptioningSample: _make_caption, VQASample: _make_answer, MultiChoiceVQASample: _make_choice}
