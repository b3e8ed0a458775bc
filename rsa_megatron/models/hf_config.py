"""Reads a model's sizes from Hugging Face folders: LLaVA-OneVision's, or a SigLIP's and a Qwen2's.

What the Megatron model does not support raises an error here that names its key.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError

from rsa_megatron.models.architectures import (
    Architecture,
    Decoder,
    VisionTower,
    get_architecture,
    square_grids,
)
from rsa_megatron.models.hf_files import (
    REPLACED_FILES,
    make_image_processor_config,
    read_json,
    read_json_if_there,
)
from rsa_megatron.models.trained_files import shows_one_tile

if TYPE_CHECKING:  # only for annotations: the known architectures need no transformers, which takes a second to import
    from transformers import PreTrainedConfig, Qwen2Config, SiglipVisionConfig

# How images are prepared.
_PIXEL_KEYS = (
    "do_convert_rgb",
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_pad",
    "image_grid_pinpoints",
    "do_center_crop",
    "crop_size",
)
# Those that config.json has too, by its name of them.
_OF_CONFIG = {"size": "image_size", "image_grid_pinpoints": "image_grid_pinpoints"}

# What other decoders' configs have and a Qwen2 has not, by the value that changes nothing. transformers' Qwen2 passes these
# keys over: where one says something else, the weights are of another model.
_OF_OTHER_DECODERS = {
    "quantization_config": None,
    "is_causal": True,
    "query_pre_attn_scalar": None,
    "attention_chunk_size": None,
    "no_rope_layers": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    **dict.fromkeys(
        ["qk_norm", "use_qk_norm", "qk_layernorm", "use_sinks", "attention_sinks", "use_parallel_residual"], False
    ),
    **dict.fromkeys(
        ["num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank", "linear_num_key_heads"], 0
    ),
    **dict.fromkeys(["attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"], 1),
    **dict.fromkeys(["logit_scale", "scale_emb"], 1),
}


def is_model_folder(model: str) -> bool:
    """Return whether --model names a folder with a config.json, and not one of the known architectures."""
    return (Path(model) / "config.json").is_file()


def find_architecture(model: str) -> Architecture:
    """Return the architecture that --model names."""
    return read_architecture(Path(model)) if is_model_folder(model) else get_architecture(model)


def read_architecture(folder: Path) -> Architecture:
    """Read the sizes in a folder's config.json.

    Raises:
        ValueError: another kind of model, or a setting that the Megatron model does not support; names the key.
    """
    raw = read_json(folder / "config.json")
    where = f"{folder}/config.json"
    if shows_one_tile(folder):
        # An export of a model that was shown one tile an image: its config as LLaVA-OneVision's.
        raw = json.loads(read_json(folder / REPLACED_FILES)["config.json"])
    if "mm_vision_tower" in raw:
        raise ValueError(
            f"{where} is in lmms-lab's format; convert the folder (rsa-megatron convert hf-to-megatron) and name OUT/hf"
        )
    if raw.get("model_type") != "llava_onevision":
        raise ValueError(
            f"{where}: model_type is {raw.get('model_type')!r}; only llava_onevision is supported (for a SigLIP and a "
            "Qwen2 checkpoint: rsa-megatron convert hf-to-megatron --vision DIR --language DIR)"
        )
    require(where, "quantization_config", raw.get("quantization_config"), None)
    for part, wanted in (("text_config", "qwen2"), ("vision_config", "siglip_vision_model")):
        content = raw.get(part)
        _check_type(f"{where}, {part}", content if isinstance(content, dict) else {}, wanted)
    from transformers import LlavaOnevisionConfig

    config = make_config(where, LlavaOnevisionConfig.from_dict, raw)
    require(where, "vision_feature_layer", config.vision_feature_layer, -1)
    require(where, "vision_feature_select_strategy", config.vision_feature_select_strategy, "full")
    require(where, "projector_hidden_act", config.projector_hidden_act, "gelu")
    require(where, "multimodal_projector_bias", config.multimodal_projector_bias, True)
    tower = _read_tower(config.vision_config, f"{where}, vision_config")
    decoder = read_decoder(config.text_config, f"{where}, text_config")
    architecture = Architecture(
        name=folder.name,
        vision=tower,
        # Embeddings are tied where one of the two configs says so; the hub's 0.5b has it in text_config.
        decoder=dataclasses.replace(decoder, tie_word_embeddings=config.tie_word_embeddings),
        vocab_size=config.text_config.vocab_size,
        grid_pinpoints=tuple(tuple(grid) for grid in config.image_grid_pinpoints),
        max_tiles=read_max_tiles("vision_aspect_ratio", config.vision_aspect_ratio, where),
    )
    check_grids(architecture.grid_pinpoints, tower.image_size, where)
    _check_image_processor(folder, architecture)
    return architecture


def read_towers(vision: Path, language: Path) -> Architecture:
    """Read the model that a SigLIP and a Qwen2 checkpoint make together, in LLaVA-OneVision's way.

    The vocabulary gets rows for <image> and <video>, and is rounded up to a multiple of 64, as in the published
    checkpoints. Embeddings stay tied or untied, as they are: Qwen2-1.5B-Instruct's are tied, those of the paper's
    llava-ov-1.5b are not (hf-to-megatron --untie-embeddings-and-output-weights).
    """
    raw = read_json(vision / "config.json")
    if raw.get("model_type") != "siglip":  # a SigLIP with its text tower
        _check_type(f"{vision}/config.json", raw, "siglip_vision_model")
    _check_type(f"{language}/config.json", read_json(language / "config.json"), "qwen2")
    vision_config, text_config = _load_config(vision), _load_config(language)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    tower = _read_tower(vision_config, f"{vision}/config.json")
    tower = dataclasses.replace(tower, num_layers=_count_used_layers(tower.num_layers))
    return Architecture(
        name=f"{vision.name}+{language.name}",
        vision=tower,
        decoder=read_decoder(text_config, f"{language}/config.json"),
        vocab_size=-(-(text_config.vocab_size + 2) // 64) * 64,
        grid_pinpoints=square_grids(tower.image_size, 6, 6),
    )


def _check_type(where: str, raw: dict, wanted: str) -> None:
    """Raise ValueError for another kind of model before transformers reads it: it would not know the newest."""
    require(where, "model_type", raw.get("model_type", wanted), wanted)


def _count_used_layers(num_layers: int) -> int:
    """Count the layers used: of SigLIP-so400m's 27, 26. A tower of 26 has lost its last one already; others are used whole."""
    return num_layers - 1 if num_layers == 27 else num_layers


def _read_tower(config: "SiglipVisionConfig", where: str) -> VisionTower:
    require(where, "model_type", config.model_type, "siglip_vision_model")
    require(where, "hidden_act", config.hidden_act, "gelu_pytorch_tanh")
    require(where, "num_channels", config.num_channels, 3)
    require(where, "attention_dropout", config.attention_dropout, 0)
    for key in ("image_size", "patch_size"):
        if not isinstance(getattr(config, key), int):
            raise ValueError(
                f"{where}: {key} is {getattr(config, key)}; only one number, the side of a square, is supported"
            )
    return VisionTower(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        layernorm_epsilon=config.layer_norm_eps,
    )


def read_decoder(config: "Qwen2Config", where: str) -> Decoder:
    require(where, "model_type", config.model_type, "qwen2")
    if config.hidden_act != "swish":  # another name of it
        require(where, "hidden_act", config.hidden_act, "silu")
    require(where, "attention_dropout", config.attention_dropout, 0)
    # max_window_layers may be so large that use_sliding_window means no layer.
    require(where, "use_sliding_window", "sliding_attention" in config.layer_types, False)
    other = [kind for kind in config.layer_types if kind != "full_attention"]
    require(where, "layer_types", other[0] if other else "full_attention", "full_attention")
    for key, neutral in _OF_OTHER_DECODERS.items():
        value = getattr(config, key, None)
        is_off = value is None or (neutral is None and not value)
        require(where, key, neutral if is_off else value, neutral)
    for key, size, divided in (
        ("num_attention_heads", config.num_attention_heads, config.hidden_size),
        ("num_key_value_heads", config.num_key_value_heads, config.num_attention_heads),
    ):
        if divided % size:
            raise ValueError(f"{where}: {key} is {size}, which does not divide {divided}")
    head_size = config.hidden_size // config.num_attention_heads
    require(where, "head_dim", getattr(config, "head_dim", None) or head_size, head_size)
    rotary_base = _read_rotary_base(config, where)
    return Decoder(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        rotary_base=rotary_base,
        rmsnorm_epsilon=config.rms_norm_eps,
    )


def _read_rotary_base(config: "Qwen2Config", where: str) -> int:
    rope = config.rope_parameters  # also what older versions have as rope_theta and rope_scaling
    if "rope_type" not in rope:
        raise ValueError(f"{where}: rope_parameters is {rope}; only one rope for all layers is supported")
    require(where, "rope_scaling", rope["rope_type"], "default")
    require(where, "partial_rotary_factor", rope.get("partial_rotary_factor", 1), 1)
    require(where, "mrope_section", rope.get("mrope_section"), None)
    theta = rope.get("rope_theta")
    if not isinstance(theta, (int, float)) or theta != int(theta):
        raise ValueError(f"{where}: rope_theta is {theta!r}; only a whole number, as --rotary-base is, is supported")
    return int(theta)


def require(where: str, key: str, value, wanted) -> None:
    if value != wanted:
        raise ValueError(f"{where}: {key} is {value!r}; only {wanted!r} is supported")


def read_max_tiles(key: str, aspect_ratio: str | None, where: str) -> int:
    match = re.fullmatch(r"anyres_max_([1-9]\d*)", str(aspect_ratio))
    if not match:
        raise ValueError(f"{where}: {key} is {aspect_ratio!r}; only anyres_max_N is supported")
    return int(match[1])


def check_grids(grids: tuple[tuple[int, int], ...], tile_size: int, where: str) -> None:
    wrong = [grid for grid in grids if any(side < tile_size or side % tile_size for side in grid)]
    if wrong or not grids:
        what = f"has {list(wrong[0])}" if wrong else "is empty"
        raise ValueError(
            f"{where}: image_grid_pinpoints {what}; only multiples of image_size {tile_size} are supported"
        )


def _check_image_processor(folder: Path, architecture: Architecture) -> None:
    """Raise ValueError if a folder prepares images in another way than we do: it would be served that way."""
    expected = make_image_processor_config(architecture) | {"do_center_crop": None, "crop_size": None}
    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        content = read_json_if_there(folder / name)
        found = content.get(part, {}) if part else content
        for key in _PIXEL_KEYS:
            value = found.get(key, expected[key])
            # The crop of a tile to its own size is none.
            is_off = key in ("do_center_crop", "crop_size") and (not value or value == expected["size"])
            if is_off or value == expected[key]:
                continue
            if key in _OF_CONFIG:
                raise ValueError(
                    f"{folder}/{name}: {key} is {value}, and {_OF_CONFIG[key]} in {folder}/config.json means {expected[key]}: "
                    "correct one of the two files"
                )
            require(f"{folder}/{name}", key, value, expected[key])


def _load_config(folder: Path) -> "PreTrainedConfig":
    from transformers import AutoConfig

    read_json(folder / "config.json")  # else a folder that is missing would be looked for on the hub
    return make_config(f"{folder}/config.json", AutoConfig.from_pretrained, folder)


def make_config(where: str, make: Callable, *arguments) -> "PreTrainedConfig":
    try:
        return make(*arguments)
    except (StrictDataclassError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where} cannot be read: {' '.join(str(error).split())[:500]}") from error
