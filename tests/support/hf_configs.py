"""config.json files as the hub has them."""

import dataclasses
import json
from pathlib import Path

from rsa_megatron.models.architectures import Architecture

PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]


SIGLIP = dict(
    hidden_size=1152,
    image_size=384,
    intermediate_size=4304,
    model_type="siglip_vision_model",
    num_attention_heads=16,
    num_hidden_layers=26,
    patch_size=14,
    vision_use_head=False,
)


# What a llava-hf repository's config.json holds: transformers 4.45 left out what its config classes have as defaults.
QWEN2 = dict(
    architectures=["Qwen2ForCausalLM"],
    bos_token_id=151643,
    eos_token_id=151645,
    model_type="qwen2",
    rope_theta=1000000.0,
    torch_dtype="bfloat16",
)
HUB = dict(
    architectures=["LlavaOnevisionForConditionalGeneration"],
    ignore_index=-100,
    image_grid_pinpoints=PINPOINTS,
    image_token_index=151646,
    model_type="llava_onevision",
    projector_hidden_act="gelu",
    tie_word_embeddings=False,
    torch_dtype="float16",
    transformers_version="4.45.0.dev0",
    use_image_newline_parameter=True,
    video_token_index=151647,
    vision_aspect_ratio="anyres_max_9",
    vision_feature_layer=-1,
    vision_feature_select_strategy="full",
    vision_config=SIGLIP,
)


TEXT = {
    "llava-ov-0.5b": dict(
        QWEN2,
        hidden_size=896,
        intermediate_size=4864,
        max_window_layers=24,
        num_attention_heads=14,
        num_hidden_layers=24,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        vocab_size=152000,
    ),
    "llava-ov-7b": dict(
        QWEN2,
        hidden_size=3584,
        intermediate_size=18944,
        num_attention_heads=28,
        num_hidden_layers=28,
        num_key_value_heads=4,
        vocab_size=152128,
    ),
}


def write_config(folder: Path, config: dict, name: str = "config.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(config))
    return folder


def hub(name: str = "llava-ov-0.5b", *, vision=(), text=(), **changes) -> dict:
    """The hub's config, changed."""
    return HUB | dict(text_config=TEXT[name] | dict(text), vision_config=SIGLIP | dict(vision)) | changes


def unnamed(architecture: Architecture) -> Architecture:
    return dataclasses.replace(architecture, name="")


CONVERSATION = [
    {"from": "human", "value": "<image>\nHow many things are there?"},
    {"from": "gpt", "value": "three"},
    {"from": "human", "value": "Where is the boat?"},
    {"from": "gpt", "value": "on the left"},
]


MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many things are there?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "three"}]},
    {"role": "user", "content": "Where is the boat?"},
    {"role": "assistant", "content": "on the left"},
]
