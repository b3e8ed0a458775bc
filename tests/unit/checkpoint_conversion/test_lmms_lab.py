"""The original checkpoints' configs are read as their code reads them, or refused by their key."""

import dataclasses
import json
from pathlib import Path

import pytest

from checkpoint_conversion.lmms_lab import is_lmms_lab, read_lmms_lab
from rsa_megatron.anyres import ImageLayout
from rsa_megatron.models.architectures import get_architecture

PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
# What lmms-lab/llava-onevision-qwen2-7b-ov has.
LMMS_LAB = dict(
    architectures=["LlavaQwenForCausalLM"],
    mm_newline_position="one_token",
    attention_dropout=0.0,
    bos_token_id=151643,
    eos_token_id=151645,
    hidden_act="silu",
    hidden_size=3584,
    image_token_index=151646,
    image_aspect_ratio="anyres_max_9",
    image_crop_resolution=None,
    image_grid_pinpoints=PINPOINTS,
    image_split_resolution=None,
    initializer_range=0.02,
    intermediate_size=18944,
    max_position_embeddings=32768,
    max_window_layers=28,
    mm_hidden_size=1152,
    mm_patch_merge_type="spatial_unpad",
    mm_projector_lr=None,
    mm_projector_type="mlp2x_gelu",
    mm_resampler_type=None,
    mm_spatial_pool_mode="bilinear",
    mm_tunable_parts="mm_vision_tower,mm_mlp_adapter,mm_language_model",
    mm_use_im_patch_token=False,
    mm_use_im_start_end=False,
    mm_vision_select_feature="patch",
    mm_vision_select_layer=-2,
    mm_vision_tower="google/siglip-so400m-patch14-384",
    mm_vision_tower_lr=2e-06,
    model_type="llava",
    num_attention_heads=28,
    num_hidden_layers=28,
    num_key_value_heads=4,
    pos_skipping_range=4096,
    rms_norm_eps=1e-06,
    rope_scaling=None,
    rope_theta=1000000.0,
    sliding_window=131072,
    tie_word_embeddings=False,
    tokenizer_model_max_length=32768,
    tokenizer_padding_side="right",
    torch_dtype="bfloat16",
    transformers_version="4.40.0.dev0",
    use_cache=True,
    use_mm_proj=True,
    use_pos_skipping=False,
    use_sliding_window=False,
    vision_tower_pretrained=None,
    vocab_size=152064,
)


def write_config(folder: Path, config: dict) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_original_7b_is_the_hubs_but_for_its_added_rows(tmp_path):
    actual, expected = read_lmms_lab(write_config(tmp_path, LMMS_LAB)), get_architecture("llava-ov-7b")
    assert actual.decoder == expected.decoder and actual.vision == expected.vision and actual.max_tiles == 9
    assert actual.vocab_size == expected.vocab_size - 64
    assert is_lmms_lab(tmp_path)
    assert sorted(actual.grid_pinpoints) == sorted(expected.grid_pinpoints)
    tied = read_lmms_lab(write_config(tmp_path, LMMS_LAB | {"tie_word_embeddings": True, "rope_theta": 10000.0}))
    assert tied.decoder == dataclasses.replace(expected.decoder, tie_word_embeddings=True, rotary_base=10_000)


@pytest.mark.parametrize(
    "pinpoints, expected",
    [
        ([[384, 768], [1152, 384]], [(768, 384), (384, 1152)]),
        ("[(384, 768), (1152, 384)]", [(768, 384), (384, 1152)]),
        ("(1x1),...,(2x3)", [(384, 384), (768, 384), (1152, 384), (384, 768), (768, 768), (1152, 768)]),
        ("(2x1),...,(2x2)", [(384, 768), (768, 768)]),
    ],
)
def test_lmms_lab_names_the_width_first(tmp_path, pinpoints, expected):
    architecture = read_lmms_lab(write_config(tmp_path, LMMS_LAB | {"image_grid_pinpoints": pinpoints}))
    assert architecture.grid_pinpoints == tuple(expected)


@pytest.mark.parametrize(
    "ratio, pinpoints, expected",
    [
        ("anyres_max_9", "(1x1),...,(6x6)", 9),
        ("anyres_max_4", "(1x1),...,(6x6)", 4),
        ("anyres", "(1x1),...,(2x2)", 9),
        ("anyres", "(1x1),...,(6x6)", 36),
    ],
)
def test_plain_anyres_shrinks_nothing(tmp_path, ratio, pinpoints, expected):
    config = LMMS_LAB | {"image_aspect_ratio": ratio, "image_grid_pinpoints": pinpoints}
    architecture = read_lmms_lab(write_config(tmp_path, config))
    assert architecture.max_tiles == expected
    grid = architecture.grid_pinpoints[-1]
    packed = ImageLayout(*grid, grid[0] // 384, grid[1] // 384).packed_grid(27, architecture.max_tiles)
    assert ((packed.rows, packed.columns) == (packed.shrunk_rows, packed.shrunk_columns)) == (ratio == "anyres")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(architectures=["LlavaLlamaForCausalLM"]), "architectures is ['LlavaLlamaForCausalLM']"),
        (
            dict(mm_vision_tower="openai/clip-vit-large-patch14-336"),
            "mm_vision_tower openai/clip-vit-large-patch14-336",
        ),
        (dict(mm_projector_type="linear"), "mm_projector_type is 'linear'"),
        (dict(mm_patch_merge_type="flat"), "mm_patch_merge_type is 'flat'"),
        (dict(mm_resampler_type="spatial_pool"), "mm_resampler_type is 'spatial_pool'"),
        (dict(mm_use_im_start_end=True), "mm_use_im_start_end is True"),
        (dict(image_aspect_ratio="pad"), "image_aspect_ratio is 'pad'"),
        (dict(image_aspect_ratio=None), "image_aspect_ratio is None"),
        (dict(image_grid_pinpoints=None), "image_grid_pinpoints is None"),
        (dict(image_grid_pinpoints="[(384, 768)"), "image_grid_pinpoints is '[(384, 768)'"),
        (dict(image_grid_pinpoints="(6x6)"), "image_grid_pinpoints is '(6x6)'"),
        (dict(image_grid_pinpoints=[[336, 672]]), "image_grid_pinpoints has [672, 336]"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling is 'linear'"),
        (dict(use_sliding_window=True, max_window_layers=2), "use_sliding_window is True"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(num_hidden_layers="28"), "num_hidden_layers"),
    ],
)
def test_what_else_the_original_code_can_do_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError) as refusal:
        read_lmms_lab(write_config(tmp_path, LMMS_LAB | changes))
    assert words in str(refusal.value) and f"{tmp_path}/config.json" in str(refusal.value)
