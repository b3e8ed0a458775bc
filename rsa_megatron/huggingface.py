"""What a Hugging Face folder says of a model beside its weights: sizes to read; config, tokenizer, processor to write.

Read: LLaVA-OneVision as transformers has it, the original LLaVA-NeXT configs of lmms-lab, and a SigLIP tower and a
Qwen2 decoder that are not one model yet. What the Megatron model cannot do is refused here, by its key.

Written: the keys that transformers had from 4.45 on (rope_theta, torch_dtype, chat_template.json), which its later
versions and the inference servers read too.
"""

import json
import re
import shutil
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase, Qwen2Config, SiglipVisionConfig

from rsa_megatron.data.conversation import IMAGE_TOKEN
from rsa_megatron.llava.architectures import Architecture, Decoder, VisionTower, get_architecture, square_grids

VIDEO_TOKEN = "<video>"
#: What a folder may hold that is weights, or about them.
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf", "*.h5",
                   "*.msgpack", "*.onnx", "*.distcp")  # fmt: skip
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
    config = AutoConfig.from_pretrained(folder)
    _require(where, "vision_feature_layer", config.vision_feature_layer, -1)
    _require(where, "vision_feature_select_strategy", config.vision_feature_select_strategy, "full")
    _require(where, "projector_hidden_act", config.projector_hidden_act, "gelu")
    _require(where, "multimodal_projector_bias", config.multimodal_projector_bias, True)
    return Architecture(
        name=folder.name,
        vision=_read_tower(config.vision_config, f"{where}, vision_config", config.vision_config.num_hidden_layers),
        decoder=_read_decoder(config.text_config, f"{where}, text_config", config.tie_word_embeddings),
        vocab_size=config.text_config.vocab_size,
        grid_pinpoints=tuple((height, width) for height, width in config.image_grid_pinpoints),
        max_tiles=_max_tiles(config.vision_aspect_ratio, where),
    )


def read_towers(vision: Path, language: Path) -> Architecture:
    """The model that a SigLIP and a Qwen2 checkpoint make together, in LLaVA-OneVision's way.

    A tower of L layers is used up to the one before its last. The vocabulary gets rows for <image> and <video>, and is
    rounded up to a multiple of 64, as in the published checkpoints.
    """
    vision_config, text_config = AutoConfig.from_pretrained(vision), AutoConfig.from_pretrained(language)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    tower = _read_tower(vision_config, f"{vision}/config.json", _layers_used(vision_config.num_hidden_layers))
    return Architecture(
        name=f"{vision.name}+{language.name}",
        vision=tower,
        decoder=_read_decoder(text_config, f"{language}/config.json", text_config.tie_word_embeddings),
        vocab_size=-(-(text_config.vocab_size + 2) // 64) * 64,
        grid_pinpoints=square_grids(tower.image_size, 6, 6),
    )


def _layers_used(num_layers: int) -> int:
    """Of SigLIP-so400m's 27 layers 26 are used. A tower of 26 has lost its last one already."""
    return num_layers - 1 if num_layers == 27 else num_layers


def _from_lmms_lab(raw: dict, where: str, name: str) -> Architecture:
    _require(where, "mm_projector_type", raw.get("mm_projector_type"), "mlp2x_gelu")
    if "siglip-so400m-patch14-384" not in raw["mm_vision_tower"]:
        raise ValueError(f"{where}: mm_vision_tower {raw['mm_vision_tower']}; siglip-so400m-patch14-384 is what can be read")
    keys = {key: raw[key] for key in Qwen2Config().to_dict() if key in raw and key != "model_type"}
    keys |= {key: raw[key] for key in ("rope_theta", "tie_word_embeddings") if key in raw}
    decoder = _read_decoder(Qwen2Config(**keys), where, raw.get("tie_word_embeddings", False))
    vision = get_architecture("llava-ov-7b").vision
    pinpoints = raw.get("image_grid_pinpoints", "(1x1),...,(6x6)")
    if isinstance(pinpoints, str):  # "(1x1),...,(6x6)": all grids from the first to the last
        rows, columns = (int(number) for number in re.findall(r"\d+", pinpoints)[-2:])
        grids = square_grids(vision.image_size, rows, columns)
    else:
        grids = tuple((height, width) for width, height in pinpoints)  # lmms-lab has the width first
    aspect_ratio = raw.get("image_aspect_ratio", "anyres_max_9")
    # Grids of plain "anyres" are never large enough to be shrunk.
    max_tiles = 9 if aspect_ratio == "anyres" else _max_tiles(aspect_ratio, where)
    return Architecture(name, vision, decoder, raw["vocab_size"], grids, max_tiles)


def _read_tower(config: SiglipVisionConfig, where: str, num_layers: int) -> VisionTower:
    _require(where, "model_type", config.model_type, "siglip_vision_model")
    _require(where, "hidden_act", config.hidden_act, "gelu_pytorch_tanh")
    _require(where, "num_channels", config.num_channels, 3)
    _require(where, "attention_dropout", config.attention_dropout, 0)
    return VisionTower(
        num_layers=num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        layernorm_epsilon=config.layer_norm_eps,
    )


def _read_decoder(config: Qwen2Config, where: str, tie_word_embeddings: bool) -> Decoder:
    _require(where, "model_type", config.model_type, "qwen2")
    _require(where, "hidden_act", config.hidden_act, "silu")
    _require(where, "use_sliding_window", config.use_sliding_window, False)
    rope = config.rope_parameters
    _require(where, "rope type", rope.get("rope_type", "default"), "default")
    return Decoder(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        rotary_base=int(rope["rope_theta"]),
        rmsnorm_epsilon=config.rms_norm_eps,
    )


def _require(where: str, key: str, value, wanted) -> None:
    if value != wanted:
        raise ValueError(f"{where}: {key} is {value!r}; only {wanted!r} can be read")


def _max_tiles(vision_aspect_ratio: str, where: str) -> int:
    match = re.fullmatch(r"anyres_max_(\d+)", vision_aspect_ratio)
    if not match:
        raise ValueError(f"{where}: vision_aspect_ratio is {vision_aspect_ratio!r}; anyres_max_N can be read")
    return int(match[1])


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: name a folder in Hugging Face format") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def copy_model_files(source: Path, target: Path) -> None:
    """Every file of a Hugging Face folder but its weights."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in WEIGHT_PATTERNS):
            shutil.copyfile(file, target / file.name)


def write_model_files(folder: Path, architecture: Architecture, tokenizer: PreTrainedTokenizerBase) -> None:
    """Everything of a Hugging Face folder but its weights. Gives the tokenizer <image> and <video> where it has none."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [token for token in (IMAGE_TOKEN, VIDEO_TOKEN) if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    if len(tokenizer) > architecture.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} ids ({' and '.join(missing) or 'none'} added), the "
            f"model {architecture.vocab_size} word embeddings"
        )
    tokenizer.save_pretrained(folder)
    for name, content in {
        "config.json": _config(architecture, tokenizer),
        "generation_config.json": _generation_config(tokenizer),
        "preprocessor_config.json": _image_processor_config(architecture),
        "video_preprocessor_config.json": _video_processor_config(architecture),
        "processor_config.json": _processor_config(architecture),
        "chat_template.json": {"chat_template": _CHAT_TEMPLATE},
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


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
