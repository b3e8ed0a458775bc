"""What RSA needs of a host model, and how it is found.

A host is one chunk of a model. Another kind of model becomes one by a class with the members of `Host` (hosts/) and a line in
`find_host`; nothing else in hooks/ or in the plugin knows what model it is on.

Shapes: B rows, n samples (B of them, or those packed into one row), S text positions, L positions of the decoder's row, T tiles of
P tokens, D and E widths of tower and decoder.
"""

import inspect
from collections.abc import Callable, Collection
from typing import Protocol

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rsa_megatron.hooks.hosts.llava import LLaVAHost


class Host(Protocol):
    """One chunk of a model that RSA trains."""

    #: the module whose forward pass is followed
    model: torch.nn.Module
    #: of the decoder
    config: TransformerConfig
    pg_collection: ProcessGroupCollection
    #: whether this chunk has the tower, and whether it has the loss
    is_first: bool
    is_last: bool
    #: of the tower, or None on a chunk without one
    vision_config: object
    #: the decoder's block of layers
    decoder: torch.nn.Module
    #: width of the tower's output, on the first stage
    image_width: int

    def refusals(self) -> list[tuple[object, str]]:
        """Pairs of a setting that is on or not, and why RSA cannot train with it and what to do instead."""

    def bind(self, args: tuple, kwargs: dict) -> inspect.BoundArguments:
        """The arguments of the model's forward by their names."""

    def generates_text(self, arguments: dict) -> bool:
        """Whether this forward pass is part of text generation, which RSA leaves alone."""

    def check_arguments(self, arguments: dict, *, needs_captions: bool) -> None:
        """Raise ValueError for what a script passes to forward and RSA cannot read."""

    def knows_bounds(self, arguments: dict) -> bool:
        """Whether this stage's attention is told where the sequences of a packed row begin."""

    def images_in(self, arguments: dict) -> Tensor:
        """Where an image stands in the text, [B, S] bool."""

    def tiles_of_images(self, arguments: dict, is_image_BS: Tensor) -> Tensor:
        """Tiles of each image of the batch, in order."""

    def positions(self, arguments: dict, is_image_BS: Tensor, tiles: Tensor) -> Tensor:
        """Where each text position lies in the decoder's row, [B, S]."""

    def row_lengths(self, num_positions: int) -> set[int]:
        """How long the decoder's row of so many positions may be: as it is, cut, or filled up for the ranks that share it."""

    def keeps_caption(self, caption_mask_BS: Tensor, is_image_BS: Tensor, *, at_end: bool) -> Tensor:
        """The caption mask without positions that do not come through to the decoder; `at_end`: no image follows them."""

    def on_splice(self, num_added: Callable[[], int | None], keep: Callable[[Tensor], None]) -> None:
        """At each forward pass keep(positions [B, S]) on the first stage, and make room for `num_added()` more positions in a row;
        None: leave this forward pass as it is."""

    def on_vision(self, layers: Collection[int], keep: Callable[[int, Tensor], None]) -> None:
        """keep(layer, tokens [T, P, D]) as the tower's output comes by (-1, before the projector), or that of other layers."""

    def on_text(self, layers: Collection[int], keep: Callable[[int, Tensor], None]) -> None:
        """keep(number, states [L, B, E]) as each of these layers (numbers from 0) that this chunk has comes by."""

    def received(self) -> Tensor | None:
        """The hidden state from the stage before, as it will go into the decoder."""

    def set_received(self, hidden_LBH: Tensor) -> None:
        """Put another in its place."""

    def put_on_caption_mask(self, arguments: dict, mask_BS: Tensor, *, packed: bool) -> torch.dtype:
        """Let the caption mask ride along; what `take_off_caption_mask` needs to put back what it rode in."""

    def on_loss_mask(self, without_caption_mask: Callable[[Tensor], Tensor]) -> None:
        """Where the model gives what the caption mask rides in to its language model, give without_caption_mask(it)."""

    def take_off_caption_mask(self, result, dtype: torch.dtype, *, packed: bool) -> tuple[object, Tensor]:
        """The model's result as it would be without, and the caption mask, [B, L]."""

    def append_to_output(self, result, rows: Callable[[Tensor], Tensor]) -> object:
        """The model's result with rows(output) behind its output, [L, B, H]."""

    def output_of(self, result) -> Tensor:
        """The output within the model's result."""


def find_host(model: torch.nn.Module) -> Host:
    """The host in what Megatron has wrapped around it.

    Raises:
        ValueError: there is none.
    """
    # Modules come from the outside in: no more than the few wrappers are looked at.
    for module in model.modules():
        if isinstance(module, LLaVAModel):
            return LLaVAHost(module)
    raise ValueError(f"RSA is for megatron.core's LLaVAModel: there is none in {type(model).__name__}")
