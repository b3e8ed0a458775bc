"""Values that two files of a Hugging Face folder hold, and must hold alike; and those of a checkpoint and of the run that loads it.

config.json says which token an image is, the tokenizer gives it an id; the vision tower has a size, the image processor another
place for it. transformers reads each from one of the two, training from the other: where they differ, a model is not served as it
was trained.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rsa_megatron.data.conversation import IMAGE_TOKEN
from rsa_megatron.models.architectures import Architecture
from rsa_megatron.models.hf_config import read_architecture
from rsa_megatron.models.hf_files import CHAT_TEMPLATE, VIDEO_TOKEN, read_json, read_json_if_there
from rsa_megatron.models.trained_files import shows_one_tile

if TYPE_CHECKING:  # only for annotations: importing it takes a second
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


@dataclass(frozen=True)
class Disagreement:
    """Two values that must be the same, and where they stand."""

    what: str
    value: object
    file: Path
    other: object
    other_file: Path
    #: transformers chooses one of them, and nothing that is trained depends on it
    is_harmless: bool = False

    def __str__(self) -> str:
        return f"{self.what} is {_shorten(self.value)} in {self.file} and {_shorten(self.other)} in {self.other_file}"


def check_files(folder: Path, say: Callable[[str], None] = print) -> None:
    """Compare a folder's files with one another; warns of what does no harm to training.

    Raises:
        ValueError: naming each two values and files that differ.
    """
    found = list(_compare_files(folder))
    for disagreement in found:
        if disagreement.is_harmless:
            say(f"WARNING: {disagreement}: make them agree")
    wrong = [str(disagreement) for disagreement in found if not disagreement.is_harmless]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}: correct one of the two files")


def check_checkpoint_files(
    folder: Path, architecture: Architecture, tokenizer: "PreTrainedTokenizerBase", model: str, tokenizer_folder: str
) -> None:
    """Compare the files beside a checkpoint (its hf/) with the run that loads it.

    Raises:
        ValueError: naming each two values and files that differ.
    """
    if not (folder / "config.json").is_file():
        return
    of_checkpoint, config = read_architecture(folder), folder / "config.json"
    wrong = [
        f"{field.name} is {getattr(theirs, field.name)} in {config} and {getattr(ours, field.name)} by --model {model}"
        for theirs, ours in (
            (of_checkpoint.vision, architecture.vision),
            (of_checkpoint.decoder, architecture.decoder),
            (of_checkpoint, architecture),
        )
        for field in dataclasses.fields(ours)
        # A longer context and another list of grids change no weight's meaning.
        if field.name
        not in ("name", "vision", "decoder", "image_embedding_width", "max_position_embeddings", "grid_pinpoints")
        and getattr(theirs, field.name) != getattr(ours, field.name)
    ]
    wrong += [
        f"the id of {token} is {theirs} in {config} and {ours} in the tokenizer {tokenizer_folder}"
        for token, theirs, ours in _compare_ids(read_json(config), tokenizer)
    ]
    own = _load_tokenizer(folder)
    theirs, ours = own.get_vocab() if own else {}, tokenizer.get_vocab()
    other = [token for token, number in theirs.items() if ours.get(token, number) != number]  # more may have been added
    if other and not wrong:
        token = min(other, key=theirs.get)
        wrong.append(
            f"the id of {token!r} is {theirs[token]} in the tokenizer {folder} and {ours[token]} in {tokenizer_folder}, and those of "
            f"{len(other) - 1} more differ"
        )
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}: name the model and the tokenizer that the checkpoint was made with")


def compare_chat_template(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return what is to be said where a folder's chat template is not that of --template qwen_1_5."""
    file, template = next(iter(_read_chat_templates(folder).items()), (None, None))
    if template is None:
        return None
    question = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "A boat."}]
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except Exception as error:  # whatever is written there
        text = f"error: {error}"
    trained = tokenizer.apply_chat_template(messages, chat_template=CHAT_TEMPLATE, tokenize=False)
    if text == trained:
        return None
    return f"WARNING: a question is {text!r} by the chat template of {file} and {trained!r} by --template qwen_1_5, which is trained"


def _compare_files(folder: Path) -> Iterator[Disagreement]:
    config_file, generation_file = folder / "config.json", folder / "generation_config.json"
    config, generation = read_json(config_file), read_json_if_there(generation_file)
    text = config.get("text_config") or {}
    tokenizer = _load_tokenizer(folder)
    if tokenizer is not None:
        tokenizer_file = folder / (
            "tokenizer.json" if (folder / "tokenizer.json").is_file() else "tokenizer_config.json"
        )
        for token, ours, theirs in _compare_ids(config, tokenizer):
            yield Disagreement(f"the id of {token}", ours, config_file, theirs, tokenizer_file)
        rows = read_architecture(folder).vocab_size
        if len(tokenizer) > rows:
            yield Disagreement("the size of the vocabulary", rows, config_file, len(tokenizer), tokenizer_file)
        for key in ("eos_token_id", "pad_token_id"):
            own = getattr(tokenizer, key)
            for where, values in ((generation_file, generation), (config_file, text)):
                if own is not None and own not in _as_list(values.get(key), own):
                    yield Disagreement(key, values[key], where, own, folder / "tokenizer_config.json", is_harmless=True)
    yield from _compare_ropes(text, config_file)
    yield from _compare_processor(folder, config, config_file)
    yield from _compare_chat_templates(folder)
    if {"torch_dtype", "dtype"} <= config.keys() and config["torch_dtype"] != config["dtype"]:
        yield Disagreement(
            "torch_dtype and dtype", config["torch_dtype"], config_file, config["dtype"], config_file, True
        )


def _load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase | None":
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers' library raises Exception itself
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: its tokenizer cannot be read: {reason}; download it again") from error


def _compare_ids(config: dict, tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[str, int, object]]:
    """Yield (token, id in the config, id in the tokenizer) of the image and the video token where they differ."""
    vocabulary = tokenizer.get_vocab()
    for token, key, default in ((IMAGE_TOKEN, "image_token", 151646), (VIDEO_TOKEN, "video_token", None)):
        ours = config.get(f"{key}_index", config.get(f"{key}_id", default))
        theirs = vocabulary.get(token)
        # Videos are not trained: a tokenizer may do without their token.
        if ours is not None and ours != theirs and (theirs is not None or token == IMAGE_TOKEN):
            yield token, ours, "none" if theirs is None else theirs


def _as_list(value, default) -> list:
    return value if isinstance(value, list) else [default if value is None else value]


def _compare_ropes(text: dict, file: Path) -> Iterator[Disagreement]:
    """Compare rope_theta and rope_scaling, as older versions have them, with rope_parameters."""
    rope = text.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    scaling = text.get("rope_scaling") or {}
    for what, older, newer in (
        ("text_config's rope_theta, and that of its rope_parameters,", text.get("rope_theta"), rope.get("rope_theta")),
        (
            "the type of text_config's rope_scaling, and that of its rope_parameters,",
            scaling.get("rope_type", scaling.get("type")),
            rope.get("rope_type"),
        ),
    ):
        if None not in (older, newer) and older != newer:
            yield Disagreement(what, older, file, newer, file)


def _compare_processor(folder: Path, config: dict, config_file: Path) -> Iterator[Disagreement]:
    file = folder / "processor_config.json"
    if not file.is_file():
        return
    architecture, processor = read_architecture(folder), read_json(file)
    vision = architecture.vision
    expected = {
        "num_image_tokens": vision.tokens_per_side**2,
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "full"),
    }
    if not shows_one_tile(folder):
        expected["vision_aspect_ratio"] = f"anyres_max_{architecture.max_tiles}"
        # Where it is missing the processor has a default of its own.
        processor = {"vision_aspect_ratio": "anyres_max_9"} | processor
    for key, value in expected.items():
        if processor.get(key, value) != value:
            yield Disagreement(key, processor[key], file, value, config_file)
    video_file = folder / "video_preprocessor_config.json"
    size, side = read_json_if_there(video_file).get("size"), vision.image_size
    if isinstance(size, dict) and size != {"height": side, "width": side}:
        yield Disagreement("the size of a video's frames", size, video_file, side, config_file, is_harmless=True)


def _compare_chat_templates(folder: Path) -> Iterator[Disagreement]:
    """Compare the places of the processor's template: which one is read depends on the version of transformers."""
    templates = _read_chat_templates(folder)
    for other, text in list(templates.items())[1:]:
        first, template = next(iter(templates.items()))
        if text != template:
            yield Disagreement("the chat template", template, first, text, other, is_harmless=True)


def _read_chat_templates(folder: Path) -> dict[Path, str]:
    """Read the processor's chat template from each file that has it, first the one that transformers takes."""
    templates = {}
    for name in ("chat_template.json", "chat_template.jinja", "processor_config.json"):
        file = folder / name
        if file.is_file():
            text = file.read_text() if name.endswith(".jinja") else read_json(file).get("chat_template")
            if isinstance(text, str):
                templates[file] = text.rstrip("\n")
    return templates


def _shorten(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]!r}... ({len(text)} characters)"
