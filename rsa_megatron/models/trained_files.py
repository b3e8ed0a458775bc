"""Fits an exported Hugging Face folder to how its weights were trained: which tiles an image has, and where an answer ends.

LLaVA-OneVision's classes add a grid of tiles and image_newline to each image, and its chat template asks questions. A model of
stage 1 has seen neither: an image is one square tile, and all its text is the caption, up to the end of the line. transformers has
a class that shows an image so, Llava (of the hub's llava-interleave models), with SigLIP's image processor and the same names of
tensors: such a model is exported as that. What is replaced is kept in the folder, for a training that goes on from it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rsa_megatron.data.conversation import IMAGE_TOKEN
from rsa_megatron.models.architectures import Architecture
from rsa_megatron.models.hf_files import (
    REPLACED_FILES,
    make_config,
    make_pixels,
    read_json_if_there,
    write_chat_template,
    write_json,
)

if TYPE_CHECKING:  # only for annotations: importing it takes a second
    from transformers import PreTrainedTokenizerBase

# Runs from before run.json named the template: their recipes'.
_PLAIN_STAGES = ("1", "revision")
# Of LLaVA-OneVision's config, what Llava's has not.
_ONEVISION_KEYS = (
    "image_grid_pinpoints",
    "vision_aspect_ratio",
    "video_token_index",
    "video_token_id",
    "use_image_newline_parameter",
)
# As data/conversation.py's plain: the images, then the answers, each with the end of its line. Blocks eat the newline after them.
_PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages if message['role'] != 'assistant' %}"
    "{% if message['content'] is string %}{{ '<image>' * message['content'].count('<image>') }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% for message in messages if message['role'] == 'assistant' %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '\\n' }}{% endfor %}"
)


@dataclass(frozen=True)
class Training:
    """What a run's run.json says of how it showed its samples."""

    stage: str
    template: str
    image_aspect_ratio: str
    #: the grids of tiles that anyres chose from, [rows, columns]; None for the model's own
    image_grids: list[list[int]] | None = None

    @property
    def shows_one_tile(self) -> bool:
        return self.image_aspect_ratio == "square"


def read_training(run: Path) -> Training | None:
    """Return how the run in a folder was trained; None where it is not the training script's."""
    try:
        content = read_json_if_there(run / "run.json")
    except ValueError:
        return None
    stage = content.get("stage")
    if stage is None:
        return None
    is_plain = stage in _PLAIN_STAGES
    return Training(
        stage,
        content.get("template", "plain" if is_plain else "qwen_1_5"),
        content.get("image_aspect_ratio", "square" if is_plain else "anyres"),
        content.get("image_grids"),
    )


def shows_one_tile(folder: Path) -> bool:
    """Return whether a folder is an export of a model that was shown one tile an image."""
    return (folder / REPLACED_FILES).is_file() and read_json_if_there(folder / "config.json").get(
        "model_type"
    ) == "llava"


def fit_to_training(folder: Path, architecture: Architecture, training: Training) -> str | None:
    """Change an exported folder's files, but for the weights.

    Returns:
        What is to be said of it; None where LLaVA-OneVision's own files fit.
    """
    from transformers import AutoTokenizer  # takes a second

    said = []
    if training.image_grids and not training.shows_one_tile:
        _set_grids(folder, architecture, training.image_grids)
        said.append(f"image_grid_pinpoints are the {len(training.image_grids)} grids of its training")
    before = _read_texts(folder)
    if training.shows_one_tile:
        _write_llava_files(folder, architecture, AutoTokenizer.from_pretrained(folder))
        said.append("exported as transformers' LlavaForConditionalGeneration, which shows an image as one tile")
    if training.template == "plain":
        write_chat_template(folder, _PLAIN_CHAT_TEMPLATE)
        _end_with_the_line(folder, AutoTokenizer.from_pretrained(folder))
        said.append(
            "its chat template is the image and then the caption (a user's text is left out), and generation ends with the line"
        )
    if not said:
        return None
    how = f"stage {training.stage} (template {training.template}, images {training.image_aspect_ratio})"
    _add_to_readme(folder / "README.md", how, said, training)
    if training.shows_one_tile or training.template == "plain":
        after = _read_texts(folder)
        changed = [name for name in sorted(before | after) if before.get(name) != after.get(name)]
        write_json(folder / REPLACED_FILES, {name: before.get(name) for name in changed})
    return f"trained as {how}: {'; '.join(said)}"


def _read_texts(folder: Path) -> dict[str, str]:
    files = [file for pattern in ("*.json", "*.jinja", "README.md") for file in folder.glob(pattern)]
    return {file.name: file.read_text() for file in files if file.name != "tokenizer.json"}


def _set_grids(folder: Path, architecture: Architecture, grids: list[list[int]]) -> None:
    side = architecture.vision.image_size
    pinpoints = {"image_grid_pinpoints": [[rows * side, columns * side] for rows, columns in grids]}
    for name in ("config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            write_json(folder / name, read_json_if_there(folder / name) | pinpoints)


def _write_llava_files(folder: Path, architecture: Architecture, tokenizer: "PreTrainedTokenizerBase") -> None:
    vision = architecture.vision
    config, defaults = read_json_if_there(folder / "config.json"), make_config(architecture, tokenizer)
    parts = {part: defaults[part] | config.get(part, {}) for part in ("text_config", "vision_config")}
    config = {key: value for key, value in config.items() if key not in _ONEVISION_KEYS}
    kind = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    features = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    config |= kind | features | parts | {"image_seq_length": vision.tokens_per_side**2}
    processor_class = {"processor_class": "LlavaProcessor"}
    processor = {
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": 0,
        "vision_feature_select_strategy": "full",
        "image_token": IMAGE_TOKEN,
    }
    write_json(folder / "config.json", config)
    write_json(
        folder / "preprocessor_config.json",
        make_pixels(architecture) | {"image_processor_type": "SiglipImageProcessor"} | processor_class,
    )
    write_json(folder / "processor_config.json", processor | processor_class)
    (folder / "video_preprocessor_config.json").unlink(missing_ok=True)
    of_tokenizer = read_json_if_there(folder / "tokenizer_config.json")
    if "processor_class" in of_tokenizer:
        write_json(folder / "tokenizer_config.json", of_tokenizer | processor_class)


def _end_with_the_line(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    generation = read_json_if_there(folder / "generation_config.json")
    ends = generation.get("eos_token_id", tokenizer.eos_token_id)
    ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    ends |= set(find_line_ends(tokenizer))
    write_json(folder / "generation_config.json", generation | {"eos_token_id": sorted(ends)})


def find_line_ends(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Find every token whose text ends with a newline: a caption's last word may be one token with it (".\\n" is in Qwen2's)."""
    added = set(tokenizer.added_tokens_decoder)
    ids = [number for number in range(len(tokenizer)) if number not in added]
    texts = tokenizer.batch_decode([[number] for number in ids])
    return [number for number, text in zip(ids, texts) if text.endswith("\n")]


def _add_to_readme(readme: Path, how: str, said: list[str], training: Training) -> None:
    lines = [
        "## How this model was trained",
        "",
        f"With rsa-megatron, as {how}. So that it is used as it was trained:",
        "",
    ]
    lines += [f"- {what}" for what in said]
    if training.shows_one_tile:
        lines += [
            "",
            "Load it with `AutoModelForImageTextToText` and `AutoProcessor`. `image_newline.safetensors` (a tensor that this class has "
            f"not) and `{REPLACED_FILES}` are for `rsa-megatron convert`, which makes LLaVA-OneVision's form of it again.",
        ]
    text = readme.read_text().rstrip() + "\n\n" if readme.is_file() else ""
    readme.write_text(text + "\n".join(lines) + "\n")
