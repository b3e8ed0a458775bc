"""Hooks on the layers of the tower and of the decoder, and how layers are numbered.

Layer 0 is what goes into the first layer, layer l what comes out of the l-th, -1 the last. The decoder's last is taken after
its final norm. (transformers' hidden_states are numbered so.)

Shapes: P patches and class tokens, T tiles, S positions, B samples, D and E widths.
"""

from collections.abc import Callable, Collection

from megatron.core.models.multimodal.llava_model import LLaVAModel
from torch import Tensor
from torch.utils.hooks import RemovableHandle


def layer_number(layer: int, num_layers: int, *, named: str = "layer") -> int:
    """A layer's number from 0, where -1 is the last.

    Raises:
        ValueError: there is no such layer.
    """
    if not -num_layers - 1 <= layer <= num_layers:
        raise ValueError(f"{named} {layer}: it has {num_layers} layers; 0 is what goes into the first, -1 the last")
    return layer if layer >= 0 else num_layers + 1 + layer


def on_tower_layers(tower, layers: Collection[int], keep: Callable[[int, Tensor], None]) -> list[RemovableHandle]:
    """keep(l, states [P, T, D]) as each of the layers (numbers from 0) of a tower comes by; the last before its final norm."""
    hooks = [_after(tower.decoder.layers[number - 1], keep, number) for number in layers if number]
    if 0 in layers:
        hooks.append(_before(tower.decoder, keep, 0))
    return hooks


def on_decoder_layers(
    chunk: LLaVAModel, layers: Collection[int], keep: Callable[[int, Tensor], None]
) -> list[RemovableHandle]:
    """keep(l, states [S, B, E]) as each of the layers (numbers from 0) that this chunk has comes by.

    Within the decoder, so that S is without what other hooks add to a row between the stages of a pipeline.
    """
    decoder, depth = chunk.language_model.decoder, chunk.config.num_layers
    hooks = [_before(decoder, keep, 0)] if chunk.pre_process and 0 in layers else []
    inner = [block for block in decoder.layers if block.layer_number in layers and block.layer_number != depth]
    hooks += [_after(block, keep, block.layer_number) for block in inner]
    # Whether or not the last stage has layers of its own: it may have the norm and the loss alone.
    if chunk.post_process and depth in layers:
        hooks.append(_after(decoder, keep, depth))
    return hooks


def _before(module, keep, number: int) -> RemovableHandle:
    """A hook that keeps what goes into a module."""

    def hook(module, args, kwargs):
        keep(number, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _after(module, keep, number: int) -> RemovableHandle:
    return module.register_forward_hook(
        lambda module, args, output: keep(number, output[0] if isinstance(output, tuple) else output)
    )
