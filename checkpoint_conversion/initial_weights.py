"""Weights that a model starts from when its modules were not trained together: the projector, image_newline and rows for new tokens.

As LLaVA-OneVision starts them: projector weights N(0, 0.02), its biases 0, image_newline N(0, 1) / sqrt(hidden). New
rows of the vocabulary are the mean of the others, which no token is nearer to than to itself.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint_conversion.hf_weights import Readable, split_rows
from checkpoint_conversion.weight_map import EMBEDDINGS, IMAGE_NEWLINE, LM_HEAD, PROJECTOR, TOWER, Shape
from rsa_megatron.models.architectures import Architecture


@dataclass(frozen=True)
class MadeTensor:
    """A tensor that is in memory."""

    value: Tensor
    source: str

    @property
    def shape(self) -> Shape:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    def read(self, rows: slice = slice(None)) -> Tensor:
        return self.value[rows]


@dataclass(frozen=True)
class WithMeanRows:
    """A tensor with more rows, each the mean of its own."""

    tensor: Readable
    num_rows: int
    mean: Tensor

    @property
    def source(self) -> str:
        return self.tensor.source

    @property
    def shape(self) -> Shape:
        return (self.num_rows, *self.tensor.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, rows: slice = slice(None)) -> Tensor:
        start, stop, _ = rows.indices(self.num_rows)
        own = self.tensor.shape[0]
        new = self.mean.expand(max(0, stop - max(start, own)), -1)
        return torch.cat([self.tensor.read(slice(min(start, own), min(stop, own))), new])


def add_vocabulary_rows(tensors: dict[str, Readable], vocab_size: int) -> None:
    """Add the rows that word embeddings and output layer lack."""
    for name in (EMBEDDINGS, LM_HEAD):
        tensor = tensors.get(name)
        if tensor is not None and tensor.shape[0] < vocab_size:
            tensors[name] = WithMeanRows(tensor, vocab_size, _compute_mean_row(tensor))


def _compute_mean_row(tensor: Readable) -> Tensor:
    # In float64: the sum of 150,000 rows in float32 would lose digits.
    total = sum(tensor.read(rows).double().sum(0) for rows in split_rows(tensor.shape, tensor.dtype))
    return (total / tensor.shape[0]).to(tensor.dtype)


def drop_last_tower_layer(tensors: dict[str, Readable], num_layers: int) -> None:
    """Drop layer `num_layers` of the tower, if it has one: the one after the last that the model uses."""
    for name in list(tensors):
        match = re.match(re.escape(TOWER) + r"encoder\.layers\.(\d+)\.", name)
        if match and int(match[1]) == num_layers:
            del tensors[name]


def init_projector(architecture: Architecture, seed: int, dtype: torch.dtype) -> dict[str, Readable]:
    """Initialise projector and image_newline, the same for the same seed whatever the dtype."""
    width, hidden = architecture.vision.hidden_size, architecture.decoder.hidden_size
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    values = {
        PROJECTOR + "linear_1.weight": 0.02 * draw(hidden, width),
        PROJECTOR + "linear_1.bias": torch.zeros(hidden),
        PROJECTOR + "linear_2.weight": 0.02 * draw(hidden, hidden),
        PROJECTOR + "linear_2.bias": torch.zeros(hidden),
        IMAGE_NEWLINE: draw(hidden) / hidden**0.5,
    }
    return {name: MadeTensor(value.to(dtype), f"{name}, initialised at random") for name, value in values.items()}
