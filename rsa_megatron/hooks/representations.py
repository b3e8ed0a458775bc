"""Reads the two representations out of a host model that knows nothing of it.

Hooks on one model chunk; no wrapper around the model, no parameter, no buffer, so that training scripts and checkpoints see the
model they know. They fire in this order, and each works on the one `MicroBatch` of this forward pass:

    before the forward pass    transport takes the payload off what the stage before has sent; selection says which samples take
                               part, and the caption mask is put on (first and last stage)
    within it                  capture keeps v and the decoder's states; the splice says where the text has come to lie; the
                               language model is given the loss mask without the caption mask
    after it                   the caption mask is taken off and the payload unpacked (last stage), or the payload is put on (others)

With --rsa-text-source caption the captions are copied to the end of their rows before it, and kept apart in the decoder
(isolated_captions.py); in packed rows the data has them as sequences of their own.

Shapes: B rows, n samples (B of them, or those packed into one row), L positions of the decoder's row, D and E widths of v and t.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rsa_megatron.batch import RSASamples
from rsa_megatron.config import RSAConfig
from rsa_megatron.hooks import caption_mask, checks, isolated_captions
from rsa_megatron.hooks.capture import Capture
from rsa_megatron.hooks.host import Host
from rsa_megatron.hooks.layer_hooks import layer_number
from rsa_megatron.hooks.micro_batch import MicroBatch
from rsa_megatron.hooks.packed_row import is_packed, sequence_bounds
from rsa_megatron.hooks.sample_selection import Selection, select_samples
from rsa_megatron.hooks.transport import Transport


@dataclass
class Representations:
    """What the last stage has of one micro-batch once its forward pass is over. Layers are named as --rsa-layers names them."""

    #: image vectors of each vision layer, [n, D] float32; a row of zeros for a sample without an image
    v: dict[int, Tensor]
    #: states of the text layers that this stage has, [L, B, E], or this rank's part of the sequence
    hidden: dict[int, Tensor]
    #: of those that stages before it have, the sums over this context-parallel rank's caption rows, [n, E]
    sums: dict[int, Tensor]
    #: where a row of the whole sequence (this context-parallel rank's part of it) is a caption token's, [B, L]: 1, or
    #: in a packed row s for its sample s = 1 .. n
    caption_mask_BL: Tensor
    samples: RSASamples
    #: whether the samples share one row; their number then differs from rank to rank
    is_packed: bool
    #: positions that copies of captions have added to each row
    num_copied: int


class RepresentationHooks:
    """The hooks of one model chunk."""

    def __init__(self, host: Host, config: RSAConfig):
        self._host = host
        self._vision_layers = list(dict.fromkeys(pair.vision for pair in config.layer_pairs))
        depth = host.config.num_layers
        # The text layers and their numbers. The last is on the last stage; each other has a place in the payload.
        text_layers = {
            pair.text: layer_number(pair.text, depth, named="--rsa-layers, text layer") for pair in config.layer_pairs
        }
        inner_layers = [layer for layer, number in text_layers.items() if number != depth]
        self._micro_batch = MicroBatch()
        self._transport = Transport(host, self._vision_layers, inner_layers)
        self._copies_captions = config.text_source == "caption"
        if self._copies_captions:
            isolated_captions.SegmentedAttention(
                host, lambda: self._micro_batch.start_B, reads_inner_layers=bool(inner_layers)
            )
        if self._copies_captions or self._transport.carries_mask:
            host.on_splice(self._num_added, self._keep_positions)
        if self._transport.carries_mask and host.is_first:
            host.decoder.register_forward_pre_hook(self._keep_length, with_kwargs=True)
        if host.is_last:
            host.on_loss_mask(self._without_caption_mask)
        host.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        host.model.register_forward_hook(self._after_forward)
        Capture(host, config, self._vision_layers, text_layers, lambda: self._micro_batch)

    def start_micro_batch(self, read_selection: Callable[[], RSASamples | Selection | None]) -> None:
        """Announce a micro-batch. `read_selection()` gives its selection on the ranks that have read the batch, else None."""
        self._micro_batch = MicroBatch(read_selection)

    def pop(self) -> Representations | None:
        """Return what was read of the micro-batch that has just gone forward; None where there was nothing to read."""
        batch, self._micro_batch = self._micro_batch, MicroBatch()
        if not self._host.is_last or batch.samples is None or batch.caption_mask_BL is None:
            return None
        v = {layer: batch.v[layer] for layer in self._vision_layers}
        return Representations(
            v, batch.hidden, batch.sums, batch.caption_mask_BL, batch.samples, batch.num_packed > 0, batch.num_copied
        )

    def _before_forward(self, model, args, kwargs):
        host, read_selection = self._host, self._micro_batch.read_selection
        bound = host.bind(args, kwargs)
        batch = self._micro_batch = MicroBatch(read_selection, is_followed=not host.generates_text(bound.arguments))
        if not batch.is_followed:
            return None
        if not host.is_first:
            self._transport.take_off(batch)
            checks.check_bounds_are_known(host, bound.arguments, batch.num_packed)
        if read_selection is None and model.training:
            raise RuntimeError(
                "RSA's hooks are on the model, and its forward step is not wrapped: use RSAPlugin.wrap_forward_step"
            )
        if read_selection is None:
            return None
        # (The first stage learns it from the splice; a packed row has its copies from the start.)
        if self._copies_captions and not host.is_first and not batch.num_packed:
            batch.start_B = self._transport.start_of_copies(batch)
        if not (host.is_first or host.is_last):
            return None
        self._select(batch, bound.arguments)
        return bound.args, bound.kwargs

    def _select(self, batch: MicroBatch, arguments: dict) -> None:
        """Which samples take part, and where their captions are; on the last stage the caption mask is put on."""
        host = self._host
        needs_captions = host.is_last or self._transport.carries_mask or self._copies_captions
        batch.samples = select_samples(arguments, host, batch.read_selection, at_end=self._copies_captions)
        host.check_arguments(arguments, needs_captions=needs_captions)
        packed, are_copies = is_packed(arguments), batch.samples.captions_are_copies
        checks.check_packing(packed, reads_captions_alone=self._copies_captions, captions_are_copies=are_copies)
        num_packed = len(batch.samples.eligible) if packed else 0
        if not host.is_first:
            checks.check_same_number(batch.num_packed, num_packed)
        batch.num_packed = num_packed
        if packed:
            batch.bounds = sequence_bounds(arguments["packed_seq_params"])
        if self._copies_captions and not are_copies:
            batch.samples, batch.num_copied = isolated_captions.append(arguments, batch.samples)
        if host.is_last:
            mask_BS = batch.samples.caption_mask
            batch.loss_mask_dtype = host.put_on_caption_mask(arguments, mask_BS, packed=packed)

    def _without_caption_mask(self, loss_mask_BL: Tensor) -> Tensor:
        """The loss mask as the language model would get it without RSA."""
        batch = self._micro_batch
        if batch.loss_mask_dtype is None:  # no caption mask was put on
            return loss_mask_BL
        return caption_mask.take_off(loss_mask_BL, batch.loss_mask_dtype, packed=batch.num_packed > 0)[0]

    def _num_added(self) -> int | None:
        """Positions that this forward pass adds to each row; None where it is not one that RSA reads."""
        return None if self._micro_batch.samples is None else self._micro_batch.num_copied

    def _keep_positions(self, positions_BS: Tensor) -> None:
        batch = self._micro_batch
        batch.positions_BS = positions_BS
        if batch.num_copied:
            batch.start_B = positions_BS[:, -batch.num_copied]

    def _keep_length(self, decoder, args, kwargs):
        self._transport.keep_length(self._micro_batch, kwargs["hidden_states"])

    def _after_forward(self, model, args, result):
        batch, host = self._micro_batch, self._host
        if not batch.is_followed:
            return None
        if not host.is_last:
            result = host.append_to_output(result, lambda output: self._transport.payload_to_send(batch, output))
            self._micro_batch = MicroBatch(batch.read_selection)  # nothing of it is needed here any longer
            return result
        if batch.samples is None:
            batch.hidden.clear()
            return None
        result, batch.caption_mask_BL = host.take_off_caption_mask(
            result, batch.loss_mask_dtype, packed=batch.num_packed > 0
        )
        if not host.is_first:
            self._transport.deliver(batch)
        batch.payload_KBH = None
        for layer in self._vision_layers:
            if layer not in batch.v:  # a batch of text
                shape = len(batch.samples.eligible), host.image_width
                batch.v[layer] = host.output_of(result).new_zeros(shape, dtype=torch.float32)
        return result
