"""Loaders of the demo data, and their saved positions."""

import torch
from transformers import AutoTokenizer

from rsa_megatron.data.task_encoder import LlavaTaskEncoder


def make_encoder(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo / "tokenizer")
    return LlavaTaskEncoder(
        tokenizer,
        image_size=28,
        patch_size=14,
        max_sequence_length=128,
        template="plain",
        image_aspect_ratio="square",
        grid_pinpoints=[],
        max_tiles=1,
    )


def save(loader, path):
    # As Megatron does (maybe_save_dataloader_state).
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"dataloader_state_dict": loader.save_state()}, path)
