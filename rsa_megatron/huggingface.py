"""What a Hugging Face folder says of a model beside its weights: sizes to read; config, tokenizer, processor to write.

Read: LLaVA-OneVision as transformers has it, the original LLaVA-NeXT configs of lmms-lab, and a SigLIP tower and a
Qwen2 decoder that are not one model yet. What the Megatron model cannot do is refused here, by its key.

Written: the keys and files that transformers had from 4.45 on (rope_theta, torch_dtype, chat_template.json,
additional_special_tokens), which its later versions and the inference servers read too; tests/old_transformers.py.
"""

import ast
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase, Qwen2Config, SiglipVisionConfig

from rsa_megatron.data.conversation import IMAGE_TOKEN
from rsa_megatron.llava.architectures import Architecture, Decoder, VisionTower, get_architecture, square_grids

VIDEO_TOKEN = "<video>"
#: What a folder may hold that is weights, or about them.
WEIGHT_PATTERNS = ("*.safetensors", "*.index.json", "*.index.*.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5",
                   "*.msgpack", "*.onnx", "*.onnx_data", "*.distcp")  # fmt: skip
# What a config of lmms-lab must say.
_LMMS_LAB = {
    "architectures": ["LlavaQwenForCausalLM"],
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_resampler_type": None,
    "mm_use_im_start_end": False,
}
# Parts of processor_config.json that have files of their own before transformers 5.
_PROCESSOR_PARTS = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
# How images are prepared.
_PIXEL_KEYS = ("size", "resample", "rescale_factor", "image_mean", "image_std", "image_grid_pinpoints")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}<video>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def find_architecture(model: str) -> Architecture:
    """What --model names: a folder with a config.json, or one of the known architectures."""
    folder = Path(model)
    return read_architecture(folder) if (folder / "config.json").is_file() else get_architecture(model)


def read_architecture(folder: Path) -> Architecture:
    """The sizes in a folder's config.json.

    Raises:
        ValueError: when it is of another kind of model, or asks for what the Megatron model does not do; names the key.
    """
    raw = _read_json(folder / "config.json")
    where = f"{folder}/config.json"
    if "mm_vision_tower" in raw:
        return _from_lmms_lab(raw, where, name=folder.name)
    if raw.get("model_type") != "llava_onevision":
        raise ValueError(
            f"{where}: model_type is {raw.get('model_type')!r}; llava_onevision is what can be read (for a SigLIP and a "
            "Qwen2 checkpoint: python -m checkpoint_conversion hf-to-megatron --vision DIR --language DIR)"
        )
    config = _load_config(folder)
    _require(where, "vision_feature_layer", config.vision_feature_layer, -1)
    _require(where, "vision_feature_select_strategy", config.vision_feature_select_strategy, "full")
    _require(where, "projector_hidden_act", config.projector_hidden_act, "gelu")
    _require(where, "multimodal_projector_bias", config.multimodal_projector_bias, True)
    tower = _read_tower(config.vision_config, f"{where}, vision_config")
    decoder = _read_decoder(config.text_config, f"{where}, text_config")
    architecture = Architecture(
        name=folder.name,
        vision=tower,
        # Embeddings are tied where one of the two configs says so; the hub's 0.5b has it in text_config.
        decoder=dataclasses.replace(decoder, tie_word_embeddings=config.tie_word_embeddings),
        vocab_size=config.text_config.vocab_size,
        grid_pinpoints=tuple(tuple(grid) for grid in config.image_grid_pinpoints),
        max_tiles=_max_tiles("vision_aspect_ratio", config.vision_aspect_ratio, where),
    )
    _check_grids(architecture.grid_pinpoints, tower.image_size, where)
    _check_image_processor(folder, architecture)
    return architecture


def read_towers(vision: Path, language: Path) -> Architecture:
    """The model that a SigLIP and a Qwen2 checkpoint make together, in LLaVA-OneVision's way.

    The vocabulary gets rows for <image> and <video>, and is rounded up to a multiple of 64, as in the published
    checkpoints. Embeddings stay tied or untied, as they are: Qwen2-1.5B-Instruct's are tied, those of the paper's
    llava-ov-1.5b are not (hf-to-megatron --untie-embeddings-and-output-weights).
    """
    vision_config, text_config = _load_config(vision), _load_config(language)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    tower = _read_tower(vision_config, f"{vision}/config.json")
    tower = dataclasses.replace(tower, num_layers=_layers_used(tower.num_layers))
    return Architecture(
        name=f"{vision.name}+{language.name}",
        vision=tower,
        decoder=_read_decoder(text_config, f"{language}/config.json"),
        vocab_size=-(-(text_config.vocab_size + 2) // 64) * 64,
        grid_pinpoints=square_grids(tower.image_size, 6, 6),
    )


def _layers_used(num_layers: int) -> int:
    """Of SigLIP-so400m's 27 layers 26 are used. A tower of 26 has lost its last one already; others are used whole."""
    return num_layers - 1 if num_layers == 27 else num_layers


def _from_lmms_lab(raw: dict, where: str, name: str) -> Architecture:
    for key, wanted in _LMMS_LAB.items():
        _require(where, key, raw.get(key), wanted)
    if "siglip-so400m-patch14-384" not in raw["mm_vision_tower"]:
        raise ValueError(f"{where}: mm_vision_tower {raw['mm_vision_tower']}; siglip-so400m-patch14-384 is what can be read")
    keys = {key: value for key, value in raw.items() if key != "model_type"}
    config = _make_config(where, Qwen2Config.from_dict, keys)
    vision = get_architecture("llava-ov-7b").vision
    grids = _lmms_lab_grids(raw.get("image_grid_pinpoints"), vision.image_size, where)
    _check_grids(grids, vision.image_size, where)
    aspect_ratio = raw.get("image_aspect_ratio")
    if aspect_ratio == "anyres":  # nothing is shrunk: as many tiles may be kept as the largest grid has
        max_tiles = max(9, *(height * width // vision.image_size**2 for height, width in grids))
    else:
        max_tiles = _max_tiles("image_aspect_ratio", aspect_ratio, where)
    return Architecture(name, vision, _read_decoder(config, where), config.vocab_size, grids, max_tiles)


def _lmms_lab_grids(pinpoints, tile_size: int, where: str) -> tuple[tuple[int, int], ...]:
    """(height, width) in pixels, in the order of lmms-lab, which has the width first."""
    try:
        if isinstance(pinpoints, str) and "x" in pinpoints:  # "(1x1),...,(6x6)": all from the first to the last, in tiles
            (first, *_, last) = re.findall(r"(\d+)x(\d+)", pinpoints)
            columns, rows = (range(int(least), int(most) + 1) for least, most in zip(first, last))
            return tuple((tile_size * row, tile_size * column) for column in columns for row in rows)
        pairs = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        return tuple((height, width) for width, height in pairs)
    except (ValueError, TypeError, SyntaxError) as error:
        raise ValueError(f"{where}: image_grid_pinpoints is {pinpoints!r}; a list of [width, height] can be read") from error


def _read_tower(config: SiglipVisionConfig, where: str) -> VisionTower:
    _require(where, "model_type", config.model_type, "siglip_vision_model")
    _require(where, "hidden_act", config.hidden_act, "gelu_pytorch_tanh")
    _require(where, "num_channels", config.num_channels, 3)
    _require(where, "attention_dropout", config.attention_dropout, 0)
    for key in ("image_size", "patch_size"):
        if not isinstance(getattr(config, key), int):
            raise ValueError(f"{where}: {key} is {getattr(config, key)}; one number, the side of a square, can be read")
    return VisionTower(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        layernorm_epsilon=config.layer_norm_eps,
    )


def _read_decoder(config: Qwen2Config, where: str) -> Decoder:
    _require(where, "model_type", config.model_type, "qwen2")
    _require(where, "hidden_act", config.hidden_act, "silu")
    _require(where, "attention_dropout", config.attention_dropout, 0)
    # max_window_layers may be so many that use_sliding_window means no layer.
    _require(where, "use_sliding_window", "sliding_attention" in config.layer_types, False)
    head_size = config.hidden_size / config.num_attention_heads
    _require(where, "head_dim", getattr(config, "head_dim", None) or head_size, head_size)
    rope = config.rope_parameters  # also what older versions have as rope_theta and rope_scaling
    _require(where, "rope_scaling", rope["rope_type"], "default")
    _require(where, "partial_rotary_factor", rope.get("partial_rotary_factor", 1), 1)
    _require(where, "rope_theta", rope["rope_theta"], int(rope["rope_theta"]))  # a whole number, as --rotary-base is
    return Decoder(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        rotary_base=int(rope["rope_theta"]),
        rmsnorm_epsilon=config.rms_norm_eps,
    )


def _require(where: str, key: str, value, wanted) -> None:
    if value != wanted:
        raise ValueError(f"{where}: {key} is {value!r}; only {wanted!r} can be read")


def _max_tiles(key: str, aspect_ratio: str | None, where: str) -> int:
    match = re.fullmatch(r"anyres_max_([1-9]\d*)", str(aspect_ratio))
    if not match:
        raise ValueError(f"{where}: {key} is {aspect_ratio!r}; anyres_max_N can be read")
    return int(match[1])


def _check_grids(grids: tuple[tuple[int, int], ...], tile_size: int, where: str) -> None:
    wrong = [grid for grid in grids if any(side < tile_size or side % tile_size for side in grid)]
    if wrong or not grids:
        what = f"has {list(wrong[0])}" if wrong else "is empty"
        raise ValueError(f"{where}: image_grid_pinpoints {what}; multiples of image_size {tile_size} can be read")


def _check_image_processor(folder: Path, architecture: Architecture) -> None:
    """Refuse a folder whose images are prepared in another way than here: it is served with that way."""
    expected = _image_processor_config(architecture)
    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        content = _read_json_if_there(folder / name)
        found = content.get(part, {}) if part else content
        for key in _PIXEL_KEYS:
            _require(f"{folder}/{name}", key, found.get(key, expected[key]), expected[key])


def _load_config(folder: Path) -> PreTrainedConfig:
    _read_json(folder / "config.json")  # else a folder that is missing would be looked for on the hub
    return _make_config(f"{folder}/config.json", AutoConfig.from_pretrained, folder)


def _make_config(where: str, make: Callable, *arguments) -> PreTrainedConfig:
    try:
        return make(*arguments)
    except (StrictDataclassError, KeyError, TypeError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: name a folder in Hugging Face format") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read: no table of keys and values")
    return content


def _read_json_if_there(path: Path) -> dict:
    return _read_json(path) if path.is_file() else {}


def copy_model_files(source: Path, target: Path) -> None:
    """Every file of a Hugging Face folder but its weights, readable to old versions of transformers too."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in WEIGHT_PATTERNS):
            shutil.copyfile(file, target / file.name)
    _add_old_names(target)


def _add_old_names(folder: Path) -> None:
    """What transformers 5 saves under names or in files of its own, by those that 4.45 knows. 5 reads these as well.

    Without rope_theta an old version would take 10000, and without preprocessor_config.json find no processor.
    """
    config = _read_json_if_there(folder / "config.json")
    if "rope_theta" in (rope := config.get("text_config", {}).get("rope_parameters") or {}):
        config["text_config"]["rope_theta"] = rope["rope_theta"]
        _write_json(folder / "config.json", config)
    processor = _read_json_if_there(folder / "processor_config.json")
    parts = [name for name in _PROCESSOR_PARTS if name in processor]
    for name in parts:
        _write_json(folder / _PROCESSOR_PARTS[name], processor.pop(name))
    if parts:
        _write_json(folder / "processor_config.json", processor)
    tokenizer = _read_json_if_there(folder / "tokenizer_config.json")
    renamed = dict(tokenizer)
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        renamed["additional_special_tokens"] = renamed.pop("extra_special_tokens")
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        renamed["tokenizer_class"] = "PreTrainedTokenizerFast"
    template = folder / "chat_template.jinja"
    if template.is_file():
        renamed.setdefault("chat_template", template.read_text())
        if not (folder / "chat_template.json").is_file():
            _write_json(folder / "chat_template.json", {"chat_template": template.read_text()})
    if renamed != tokenizer:
        _write_json(folder / "tokenizer_config.json", renamed)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_model_files(folder: Path, architecture: Architecture, tokenizer: PreTrainedTokenizerBase) -> None:
    """Everything of a Hugging Face folder but its weights. Gives the tokenizer <image> and <video> where it has none."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [token for token in (IMAGE_TOKEN, VIDEO_TOKEN) if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    if len(tokenizer) > architecture.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} ids ({' and '.join(missing) or 'none'} added), "
            f"the model {architecture.vocab_size} word embeddings"
        )
    tokenizer.chat_template = _CHAT_TEMPLATE  # a text model's own would not show the images
    tokenizer.save_pretrained(folder)
    for name, content in {
        "config.json": _config(architecture, tokenizer),
        "generation_config.json": _generation_config(tokenizer),
        "preprocessor_config.json": _image_processor_config(architecture),
        "video_preprocessor_config.json": _video_processor_config(architecture),
        "processor_config.json": _processor_config(architecture),
        "chat_template.json": {"chat_template": _CHAT_TEMPLATE},
    }.items():
        _write_json(folder / name, content)
    _add_old_names(folder)


def _config(architecture: Architecture, tokenizer: PreTrainedTokenizerBase) -> dict:
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


def _generation_config(tokenizer: PreTrainedTokenizerBase) -> dict:
    ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return {"eos_token_id": sorted({end for end in ends if end is not None}), "pad_token_id": tokenizer.pad_token_id}


def _pixels(architecture: Architecture) -> dict:
    # SigLIP's mean and deviation: the class defaults are CLIP's.
    side = architecture.vision.image_size
    return {"do_convert_rgb": True, "do_resize": True, "size": {"height": side, "width": side}, "resample": 3,
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3}  # fmt: skip


def _image_processor_config(architecture: Architecture) -> dict:
    return _pixels(architecture) | {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
        "do_pad": True,
        "image_grid_pinpoints": [list(resolution) for resolution in architecture.grid_pinpoints],
    }


def _video_processor_config(architecture: Architecture) -> dict:
    return _pixels(architecture) | {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "processor_class": "LlavaOnevisionProcessor",
    }


def _processor_config(architecture: Architecture) -> dict:
    return {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": architecture.vision.tokens_per_side**2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": f"anyres_max_{architecture.max_tiles}",
        "image_token": IMAGE_TOKEN,
        "video_token": VIDEO_TOKEN,
    }
