"""Loaders of the demo data, and their saved positions."""

import random

import numpy
import torch
from megatron.energon import WorkerConfig
from transformers import AutoTokenizer

from rsa_megatron.data.loaders import TrainLoader
from rsa_megatron.data.task_encoder import LlavaTaskEncoder
from tests.support import processes


def make_encoder(demo, kind=LlavaTaskEncoder):
    tokenizer = AutoTokenizer.from_pretrained(demo / "tokenizer")
    return kind(
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


def train_loader(
    demo, encoder, *, num_workers=0, rank=0, world_size=1, micro_batch_size=4, shuffle_buffer_size=20, kind="captions"
):
    config = WorkerConfig(rank=rank, world_size=world_size, num_workers=num_workers, seed_offset=5)
    return processes.kept(
        TrainLoader(str(demo / "data" / kind), encoder, config, micro_batch_size, shuffle_buffer_size)
    )


def keys(loader, count):
    return [next(loader).keys for _ in range(count)]


def generator_states() -> tuple:
    """Of the generators on the CPU that a process shares: torch's, NumPy's and Python's."""
    return torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate()
