"""A small random LLaVA-OneVision in Hugging Face format, of sizes that hide no mistake, and images for it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.processing_utils import ProcessorMixin

from rsa_megatron.models.architectures import Architecture, Decoder, VisionTower, square_grids
from rsa_megatron.models.hf_files import write_model_files

# (height, width): square, wide and tall, more than the grids hold, less than a tile, and one whose number of tokens
# hangs on the rounding.
IMAGE_SIZES = [
    (58, 58),
    (60, 80),
    (80, 60),
    (42, 63),
    (113, 128),
    (135, 240),
    (240, 135),
    (20, 200),
    (200, 20),
    (150, 150),
    (234, 104),
    (348, 348),
    (17, 23),
]


def architecture(*, tied: bool) -> Architecture:
    """No width is a power of two, 6 heads share 2 groups, 58 = 4 * 14 + 2, and 1043 rows are not even."""
    return Architecture(
        name="tiny-hf",
        vision=VisionTower(
            num_layers=3, hidden_size=36, ffn_hidden_size=52, num_attention_heads=4, image_size=58, patch_size=14
        ),
        decoder=Decoder(
            num_layers=4,
            hidden_size=60,
            ffn_hidden_size=92,
            num_attention_heads=6,
            num_query_groups=2,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
        ),
        vocab_size=1043,
        grid_pinpoints=square_grids(58, 3, 3),
        max_tiles=4,
    )


def write(folder: Path, tokenizer: Path, *, tied: bool, dtype: torch.dtype = torch.float32) -> Path:
    """The whole folder, its weights random, named as the hub's checkpoints name them."""
    write_model_files(folder, architecture(tied=tied), AutoTokenizer.from_pretrained(tokenizer))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": str(dtype).removeprefix("torch.")}))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in LlavaOnevisionForConditionalGeneration(
        AutoConfig.from_pretrained(folder)
    ).named_parameters():
        if not (tied and name == "lm_head.weight"):
            tensors[_hub_name(name)] = _random(name, parameter.shape, generator).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _hub_name(name: str) -> str:
    for ours, hubs in (
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", ""),
    ):
        if name.startswith(ours):
            return hubs + name.removeprefix(ours)
    raise AssertionError(name)


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 0.3 * values + (1 if name.endswith("weight") else 0)
    if "vision_tower.embeddings" in name:
        return 0.002 * values  # so small that a norm's epsilon of 1e-5 in the place of 1e-6 is seen
    return values / shape[-1] ** 0.5 if len(shape) == 2 else 0.3 * values


def load_processor(folder: Path) -> ProcessorMixin:
    """As a user would, with the image processor that works on Pillow's images: torchvision's rounds otherwise."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor
