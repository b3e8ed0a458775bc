"""Writes what a Hugging Face folder holds beside weights: config, tokenizer, processor, chat template.

Under the keys and in the files that transformers had from 4.45 on (rope_theta, torch_dtype, chat_template.json,
additional_special_tokens), which its later versions read too: tests/old_transformers.py.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from rsa_megatron.data.conversation import IMAGE_TOKEN, SYSTEM_PROMPT
from rsa_megatron.models.architectures import Architecture
from rsa_megatron.models.folder_kinds import explain_checkpoint

if TYPE_CHECKING:  # only for annotations: importing it takes a second
    from transformers import PreTrainedTokenizerBase

VIDEO_TOKEN = "<video>"
#: What a folder may hold that is weights, or about them.
WEIGHT_PATTERNS = (
    "*.safetensors",
    "*.index.json",
    "*.index.*.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.distcp",
)
# Sections of processor_config.json that have files of their own before transformers 5.
_PROCESSOR_PARTS = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
#: What `trained_files` has replaced in an export, by the file's name: its text before, or null where there was none.
REPLACED_FILES = "replaced_files.json"
#: As data/conversation.py's qwen_1_5.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM_PROMPT + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}<video>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        fault = explain_checkpoint("", path.parent) or f"{path} is missing: name a folder in Hugging Face format"
        raise ValueError(fault) from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read: not a JSON object")
    return content


def read_json_if_there(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def copy_model_files(source: Path, target: Path) -> None:
    """Copy every file of a Hugging Face folder but its weights, readable to old versions of transformers too."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in WEIGHT_PATTERNS):
            shutil.copyfile(file, target / file.name)
    _restore_replaced(target)
    _add_old_names(target)


def _restore_replaced(folder: Path) -> None:
    """Undo `trained_files.fit_to_training`: another training may follow."""
    for name, text in read_json_if_there(folder / REPLACED_FILES).items():
        if Path(name).name != name or not isinstance(text, str | None):
            raise ValueError(f"{folder / REPLACED_FILES} names {name!r}, which is not a file of its folder, or no text")
        (folder / name).unlink(missing_ok=True)
        if text is not None:
            (folder / name).write_text(text)
    (folder / REPLACED_FILES).unlink(missing_ok=True)


def _add_old_names(folder: Path) -> None:
    """Add the names and files that 4.45 knows for what transformers 5 saves under its own. 5 reads these as well.

    Without rope_theta an old version would take 10000, and without preprocessor_config.json find no processor.
    """
    config = read_json_if_there(folder / "config.json")
    if config.pop("transformers_weights", None):  # the name of a file that is not copied
        write_json(folder / "config.json", config)
    if "rope_theta" in (rope := config.get("text_config", {}).get("rope_parameters") or {}):
        config["text_config"]["rope_theta"] = rope["rope_theta"]
        write_json(folder / "config.json", config)
    processor = read_json_if_there(folder / "processor_config.json")
    parts = [name for name in _PROCESSOR_PARTS if name in processor]
    for name in parts:
        write_json(folder / _PROCESSOR_PARTS[name], processor.pop(name))
    if parts:
        write_json(folder / "processor_config.json", processor)
    tokenizer = read_json_if_there(folder / "tokenizer_config.json")
    renamed = dict(tokenizer)
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        renamed["additional_special_tokens"] = renamed.pop("extra_special_tokens")
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        renamed["tokenizer_class"] = "PreTrainedTokenizerFast"
    template = folder / "chat_template.jinja"
    if template.is_file():
        renamed.setdefault("chat_template", template.read_text())
        if not (folder / "chat_template.json").is_file():
            write_json(folder / "chat_template.json", {"chat_template": template.read_text()})
    if renamed != tokenizer:
        write_json(folder / "tokenizer_config.json", renamed)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_chat_template(folder: Path, template: str = CHAT_TEMPLATE) -> None:
    """Write a chat template, by default that of our qwen_1_5, for processor and tokenizer: what a model was trained with."""
    write_json(folder / "chat_template.json", {"chat_template": template})
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = read_json_if_there(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", tokenizer | {"chat_template": template})
    processor = read_json_if_there(folder / "processor_config.json")
    if processor.pop("chat_template", None):
        write_json(folder / "processor_config.json", processor)


def write_model_files(folder: Path, architecture: Architecture, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Write a Hugging Face folder but its weights. Adds <image> and <video> to the tokenizer if it lacks them."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [token for token in (IMAGE_TOKEN, VIDEO_TOKEN) if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    if len(tokenizer) > architecture.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} ids ({' and '.join(missing) or 'none'} added), "
            f"the model {architecture.vocab_size} word embeddings"
        )
    tokenizer.chat_template = CHAT_TEMPLATE  # a text model's own would not show the images
    tokenizer.save_pretrained(folder)
    for name, content in {
        "config.json": make_config(architecture, tokenizer),
        "generation_config.json": _make_generation_config(tokenizer),
        "preprocessor_config.json": make_image_processor_config(architecture),
        "video_preprocessor_config.json": _make_video_processor_config(architecture),
        "processor_config.json": _make_processor_config(architecture),
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }.items():
        write_json(folder / name, content)
    _add_old_names(folder)


def make_config(architecture: Architecture, tokenizer: "PreTrainedTokenizerBase") -> dict:
    vision, decoder = architecture.vision, architecture.decoder
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "video_token_index": tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
        "image_grid_pinpoints": [list(resolution) for resolution in architecture.grid_pinpoints],
        "vision_aspect_ratio": f"anyres_max_{architecture.max_tiles}",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
        "use_image_newline_parameter": True,
        "tie_word_embeddings": decoder.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "text_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": architecture.vocab_size,
            "num_hidden_layers": decoder.num_layers,
            "hidden_size": decoder.hidden_size,
            "intermediate_size": decoder.ffn_hidden_size,
            "num_attention_heads": decoder.num_attention_heads,
            "num_key_value_heads": decoder.num_query_groups,
            "max_position_embeddings": decoder.max_position_embeddings,
            "rope_theta": float(decoder.rotary_base),
            "rms_norm_eps": decoder.rmsnorm_epsilon,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "tie_word_embeddings": decoder.tie_word_embeddings,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "num_hidden_layers": vision.num_layers,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.ffn_hidden_size,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": vision.layernorm_epsilon,
            "hidden_act": "gelu_pytorch_tanh",
            "vision_use_head": False,
        },
    }


def _make_generation_config(tokenizer: "PreTrainedTokenizerBase") -> dict:
    ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return {"eos_token_id": sorted({end for end in ends if end is not None}), "pad_token_id": tokenizer.pad_token_id}


def make_pixels(architecture: Architecture) -> dict:
    # SigLIP's mean and deviation: the class defaults are CLIP's.
    side = architecture.vision.image_size
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }


def make_image_processor_config(architecture: Architecture) -> dict:
    return make_pixels(architecture) | {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
        "do_pad": True,
        "image_grid_pinpoints": [list(resolution) for resolution in architecture.grid_pinpoints],
    }


def _make_video_processor_config(architecture: Architecture) -> dict:
    return make_pixels(architecture) | {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "processor_class": "LlavaOnevisionProcessor",
    }


def _make_processor_config(architecture: Architecture) -> dict:
    return {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": architecture.vision.tokens_per_side**2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": f"anyres_max_{architecture.max_tiles}",
        "image_token": IMAGE_TOKEN,
        "video_token": VIDEO_TOKEN,
    }
