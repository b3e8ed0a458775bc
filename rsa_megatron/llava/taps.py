"""Reads the two representations out of a LLaVAModel that knows nothing of it.

Hooks and one instance attribute on one model chunk; no wrapper around the model, no parameter, no buffer, so
that training scripts and checkpoints see the model they know.

    vision_model               forward hook: v_i from its output, before the projector       (first stage)
    set_input_tensor           takes the carrier rows off what the stage before has sent      (other stages)
    language_model.decoder     forward hook: its output, after the final norm                (last stage)
    model, before and after    the caption mask on its way through LLaVAModel's splice; the carrier rows put on
    with text_source caption   caption_copies.py: the captions put on before, and kept apart in the decoder; LLaVAModel's
                               splice tells where they have come to lie                      (every stage)

The caption mask has to follow the tokens through everything LLaVAModel does to a row: image tokens spliced in,
padding, truncation, the split over context-parallel ranks. LLaVAModel does all that to the loss mask, moving its
numbers and computing nothing with them, so the caption mask rides in it as their sign (-0.0 is a caption's row that
is not learnt) and is read back from what is returned: exact in every float type and for every weight of 0 or more.

Shapes: B samples, S text positions, L positions of the spliced row, T tiles, D and E widths of v and t.
"""

import inspect
from dataclasses import dataclass

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from torch import Tensor

from rsa_megatron.alignment.pooling import pool_tiles
from rsa_megatron.batch import RSASamples
from rsa_megatron.config import RSAConfig
from rsa_megatron.llava import caption_copies, carrier
from rsa_megatron.llava.broadcast import broadcast_tensors

_FIELDS = ("eligible", "caption_mask", "num_tiles", "sample_id")


@dataclass
class Representations:
    """What the last stage has of one micro-batch once its forward pass is over."""

    #: image vectors, [B, D] float32; a row of zeros for a sample without an image
    v_BD: Tensor
    #: the decoder's output, [L, B, E], or this rank's part of the sequence
    hidden_LBE: Tensor
    #: 1 where a row of the whole sequence (this context-parallel rank's part of it) is a caption token's, [B, L]
    caption_mask_BL: Tensor
    samples: RSASamples
    #: positions that copies of captions have added to each row
    num_copied: int


class Taps:
    """The hooks of one model chunk, and what they have read of the micro-batch in hand."""

    def __init__(self, model: LLaVAModel, config: RSAConfig):
        self.config = config
        self.is_first, self.is_last = model.pre_process, model.post_process
        self.vision_width: int | None = model.vision_model.config.hidden_size if self.is_first else None
        self.samples: RSASamples | None = None
        self._model_config, self._pg_collection = model.config, model.pg_collection
        self._signature = inspect.signature(model.forward)
        self._captured = None
        self._active = False
        self._v = self._hidden = self._caption_mask = self._carried = None
        self._mask_dtype = None
        self._num_copied = 0
        self._segments = None
        if config.text_source == "caption":
            self._segments = caption_copies.SeparateSegments(model)
            self._model, self._splice = model, model._preprocess_data
            model._preprocess_data = self._splice_with_copies

        model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        model.register_forward_hook(self._after_forward)
        if self.is_first:
            model.vision_model.register_forward_hook(self._after_vision)
        else:
            self._set_input_tensor = model.set_input_tensor
            model.set_input_tensor = self._take_off_carrier
        if self.is_last:
            model.language_model.decoder.register_forward_hook(self._after_decoder)

    def begin(self, captured) -> None:
        """A micro-batch begins. `captured()` gives its RSASamples where this rank has read the data, else None."""
        self._captured = captured

    def take(self) -> Representations | None:
        """What was read of the micro-batch that has just gone forward; None where there was nothing to read."""
        v, hidden, mask, samples = self._v, self._hidden, self._caption_mask, self.samples
        self._v = self._hidden = self._caption_mask = self.samples = self._captured = None
        if samples is None or hidden is None or mask is None:
            return None
        return Representations(v, hidden, mask, samples, self._num_copied)

    # The hooks, in the order in which they fire.

    def _take_off_carrier(self, input_tensor):
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if received is not None:
            self.vision_width = self.vision_width or carrier.vector_width(received)
            k = carrier.num_rows(self.vision_width, received.shape[2], received.dtype)
            # Slices along dim 0 of what was received: no copy, and both parts' gradients return through it.
            self._carried, received = received[-k:], received[:-k]
        self._set_input_tensor([received])

    def _before_forward(self, model, args, kwargs):
        bound = self._signature.bind(*args, **kwargs)
        self._active = bound.arguments.get("inference_context") is None
        self._num_copied = 0
        if self._segments:
            self._segments.start_B = None
        if not self._active:
            return None
        if self._captured is None and model.training:
            raise RuntimeError("RSA has its taps on the model and is told of no batch: wrap the forward step too "
                               "(RSAPlugin.wrap_forward_step)")  # fmt: skip
        self._v = self._hidden = self._caption_mask = None
        self.samples = self._broadcast_samples() if self.is_first or self.is_last else None
        if self._segments and self._captured and not self.is_first:  # the first stage learns it from the splice
            self._segments.start_B = carrier.unpack(self._carried, self.vision_width)[2]
        if self.samples is None:
            return None
        if self.is_last:
            self._check_loss_mask(bound.arguments.get("loss_mask"))
        if self._segments:
            self.samples, self._num_copied = caption_copies.append(bound.arguments, self.samples)
        if self.is_last:
            mask_BS = bound.arguments["loss_mask"]
            magnitude_BS = mask_BS if mask_BS.is_floating_point() else mask_BS.float()
            bound.arguments["loss_mask"] = torch.copysign(magnitude_BS, (0.5 - self.samples.caption_mask).to(magnitude_BS))
        return bound.args, bound.kwargs

    def _splice_with_copies(self, *args, **kwargs):
        """LLaVAModel's splice, in rows longer by the copies than its longest; and where they have come to lie."""
        given = inspect.signature(self._splice).bind(*args, **kwargs).arguments
        if self._num_copied and self.is_first:
            per_tile = 1 if given.get("is_packed_dynamic_res") else self._model.img_seq_len
            self._segments.start_B = caption_copies.starts(
                given["input_ids"], self._num_copied, given["image_token_index"], given["num_image_tiles"] * per_tile
            )
        self._model._language_max_sequence_length += self._num_copied
        try:
            return self._splice(*args, **kwargs)
        finally:
            self._model._language_max_sequence_length -= self._num_copied

    def _after_vision(self, module, args, tokens_TPD):
        if self._active and self.samples is not None:
            self._v = pool_tiles(tokens_TPD, self._tile_weights(tokens_TPD.shape[0]))

    def _after_decoder(self, module, args, output):
        if self._active:
            self._hidden = output[0] if isinstance(output, tuple) else output

    def _after_forward(self, model, args, result):
        if not self._active:
            return None
        output, mask_BL = result
        if self.is_last and self.samples is not None:
            self._caption_mask = mask_BL.signbit().to(mask_BL.dtype)
            mask_BL = mask_BL.abs().to(self._mask_dtype)
        if not self.is_last:
            return torch.cat([output, self._carrier_rows(output)]), mask_BL
        if not self.is_first and self.samples is not None:
            self._v, first_stage_ids, _ = carrier.unpack(self._carried, self.vision_width)
            self._check_same_samples(first_stage_ids)
        elif self._v is None and self.samples is not None:  # a batch of text
            self._v = output.new_zeros(self.samples.eligible.shape[0], self.vision_width, dtype=torch.float32)
        self._carried = None
        return output, mask_BL

    # What they need.

    def _check_loss_mask(self, mask_BS: Tensor | None) -> None:
        if mask_BS is None:
            raise ValueError("RSA finds the caption's rows by way of the loss mask: pass loss_mask to the model's forward")
        self._mask_dtype = mask_BS.dtype

    def _broadcast_samples(self) -> RSASamples | None:
        """The batch's RSASamples from the tensor-parallel rank that has read it, to those that share the layer."""
        if self._captured is None:
            return None
        samples = self._captured()
        data = {name: getattr(samples, name) for name in _FIELDS} if samples is not None else None
        return RSASamples(**broadcast_tensors(_FIELDS, data, torch.int64, self._pg_collection.tp))

    def _tile_weights(self, num_tiles: int) -> Tensor:
        """Part of each tile in each sample's mean, [B, T]: 1 for the base image, or 1/n for each of its n tiles."""
        count_B = self.samples.num_tiles
        end_B = count_B.cumsum(0)
        start_B = end_B - count_B
        tile_T = torch.arange(num_tiles, device=count_B.device)
        if self.config.image_pooling == "full":
            inside_BT = (tile_T >= start_B[:, None]) & (tile_T < end_B[:, None])
            return inside_BT / count_B.clamp(min=1)[:, None]
        base_B = start_B if self.config.base_tile == "first" else end_B - 1
        return ((tile_T == base_B[:, None]) & (count_B > 0)[:, None]).float()

    def _carrier_rows(self, output_LBH: Tensor) -> Tensor:
        if not self.is_first:
            carried, self._carried = self._carried, None
            return carried
        batch_size, hidden_width = output_LBH.shape[1:]
        v_BD, self._v = self._v, None
        if v_BD is None:  # a batch of text, or one that RSA was not told of: the rows keep their place
            v_BD = output_LBH.new_zeros(batch_size, self.vision_width, dtype=torch.float32)
        if self.samples is not None:
            sample_id_B, self.samples = self.samples.sample_id, None
        else:
            sample_id_B = torch.zeros(batch_size, dtype=torch.int64, device=output_LBH.device)
        start_B = self._segments.start_B if self._segments else None
        start_B = torch.zeros_like(sample_id_B) if start_B is None else start_B
        return carrier.pack(v_BD, sample_id_B, start_B, hidden_width, output_LBH.dtype)

    def _check_same_samples(self, first_stage_ids: Tensor) -> None:
        differ = (first_stage_ids != self.samples.sample_id).nonzero().flatten().tolist()
        if differ:
            pairs = ", ".join(f"{first_stage_ids[b]:#018x} against {self.samples.sample_id[b]:#018x}" for b in differ)
            raise RuntimeError(
                f"the first and the last pipeline stage read different samples (ids {pairs}): image and caption "
                "would be paired wrongly. Both stages must read the same data in the same order; a sample that "
                "only one of them could load, or a data folder that differs between nodes, breaks it."
            )
