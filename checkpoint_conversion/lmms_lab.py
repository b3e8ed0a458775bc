"""Reads the configs of lmms-lab's original LLaVA-OneVision checkpoints (LLaVA-NeXT's format)."""

import ast
import re
from pathlib import Path

from rsa_megatron.models.architectures import Architecture, get_architecture
from rsa_megatron.models.hf_config import check_grids, make_config, read_decoder, read_max_tiles, require
from rsa_megatron.models.hf_files import read_json

# What a config must have.
_WANTED = {
    "architectures": ["LlavaQwenForCausalLM"],
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_resampler_type": None,
    "mm_use_im_start_end": False,
}


def is_lmms_lab(folder: Path) -> bool:
    return "mm_vision_tower" in read_json(folder / "config.json")


def read_lmms_lab(folder: Path) -> Architecture:
    """Read the sizes in a folder's config.json; ValueError names the key of what the Megatron model does not support."""
    from transformers import Qwen2Config  # takes a second, which --help is spared

    raw, where = read_json(folder / "config.json"), f"{folder}/config.json"
    for key, wanted in _WANTED.items():
        require(where, key, raw.get(key), wanted)
    if "siglip-so400m-patch14-384" not in raw["mm_vision_tower"]:
        raise ValueError(
            f"{where}: mm_vision_tower {raw['mm_vision_tower']}; only siglip-so400m-patch14-384 is supported"
        )
    keys = {key: value for key, value in raw.items() if key != "model_type"}
    config = make_config(where, Qwen2Config.from_dict, keys)
    vision = get_architecture("llava-ov-7b").vision
    grids = _parse_grids(raw.get("image_grid_pinpoints"), vision.image_size, where)
    check_grids(grids, vision.image_size, where)
    aspect_ratio = raw.get("image_aspect_ratio")
    if aspect_ratio == "anyres":  # nothing is shrunk: max_tiles is the largest grid's
        max_tiles = max(9, *(height * width // vision.image_size**2 for height, width in grids))
    else:
        max_tiles = read_max_tiles("image_aspect_ratio", aspect_ratio, where)
    return Architecture(folder.name, vision, read_decoder(config, where), config.vocab_size, grids, max_tiles)


def _parse_grids(pinpoints, tile_size: int, where: str) -> tuple[tuple[int, int], ...]:
    """Parse to (height, width) in pixels, in the order of lmms-lab, which has the width first."""
    try:
        if (
            isinstance(pinpoints, str) and "x" in pinpoints
        ):  # "(1x1),...,(6x6)": all from the first to the last, in tiles
            (first, *_, last) = re.findall(r"(\d+)x(\d+)", pinpoints)
            columns, rows = (range(int(least), int(most) + 1) for least, most in zip(first, last))
            return tuple((tile_size * row, tile_size * column) for column in columns for row in rows)
        pairs = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        return tuple((height, width) for width, height in pairs)
    except (ValueError, TypeError, SyntaxError) as error:
        raise ValueError(
            f"{where}: image_grid_pinpoints is {pinpoints!r}; only a list of [width, height] is supported"
        ) from error
