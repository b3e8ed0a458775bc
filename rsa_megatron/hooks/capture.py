"""Reads the two representations out of a LLaVAModel that knows nothing of it.

Hooks and instance attributes on one model chunk; no wrapper around the model, no parameter, no buffer, so
that training scripts and checkpoints see the model they know.

    vision_model               forward hook: v_i from its output, before the projector       (first stage)
    set_input_tensor           takes the carrier rows off what the stage before has sent      (other stages)
    language_model.decoder     forward hook: its output, after the final norm                (last stage)
    layers of either           forward hooks on those that --rsa-layers names                (any stage)
    model, before and after    the caption mask on its way through LLaVAModel's splice; the carrier rows put on
    with text_source caption   isolated_captions.py: the captions put on before, and kept apart in the decoder; LLaVAModel's
                               splice tells where they have come to lie                      (every stage)

The caption mask has to follow the tokens through everything LLaVAModel does to a row: image tokens spliced in,
padding, truncation, the split over context-parallel ranks. LLaVAModel does all that to the loss mask on the last stage, and
the caption mask rides in it (caption_mask.py). Text layers of earlier stages are pooled where they are: the first stage
works out where the captions lie (token_positions.py), and the carrier takes mask and sums along.

Shapes: B rows, n samples (B of them, or those packed into one row), S text positions, L positions of the spliced row,
T tiles of P tokens, D and E widths of v and t.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from torch import Tensor

from rsa_megatron.alignment.pooling import image_vectors
from rsa_megatron.batch import RSASamples
from rsa_megatron.config import RSAConfig
from rsa_megatron.hooks import caption_mask as caption_marks
from rsa_megatron.hooks import checks, isolated_captions, pipeline_payload, token_positions
from rsa_megatron.hooks.broadcast import broadcast_tensors
from rsa_megatron.hooks.caption_pooling import caption_counts, caption_sums, sequence_shards
from rsa_megatron.hooks.layer_hooks import layer_number, on_decoder_layers, on_tower_layers
from rsa_megatron.hooks.pipeline_payload import Carried
from rsa_megatron.hooks.sample_selection import Selection, images_in, is_packed, samples_of

_FIELDS = ("eligible", "caption_mask", "num_tiles", "sample_id")


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


@dataclass
class _InHand:
    """What has been read of the micro-batch that is going forward."""

    samples: RSASamples | None = None
    v: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    sums: dict[int, Tensor] = field(default_factory=dict)
    caption_mask_BL: Tensor | None = None
    loss_mask_dtype: torch.dtype | None = None
    is_packed: bool = False
    num_copied: int = 0
    #: where the text positions lie in the spliced row, [B, S]
    positions_BS: Tensor | None = None


class Taps:
    """The hooks of one model chunk, and what they have read of the micro-batch in hand."""

    def __init__(self, model: LLaVAModel, config: RSAConfig):
        self.config = config
        self.is_first, self.is_last = model.pre_process, model.post_process
        self._model, self._model_config, self._pg_collection = model, model.config, model.pg_collection
        self._shards = sequence_shards(model.config, model.pg_collection.tp)
        self._signature = inspect.signature(model.forward)
        self._vision_layers = list(dict.fromkeys(pair.vision for pair in config.layer_pairs))
        depth = model.config.num_layers
        #: The text layers and their numbers. The last is on the last stage; each other has a place in the carrier.
        self._text_layers = {
            pair.text: layer_number(pair.text, depth, named="--rsa-layers, text layer") for pair in config.layer_pairs
        }
        self._inner_layers = [layer for layer, number in self._text_layers.items() if number != depth]
        self._carries_mask = bool(self._inner_layers) and not (self.is_first and self.is_last)
        self._image_width: int | None = None
        self._vector_width: int | None = None
        #: What has come from the stage before: all of it, and of that the carrier's rows.
        self._received: Tensor | None = None
        self._rows: Tensor | None = None
        self._in_hand = _InHand()
        self._active = self._tiles_are_checked = False
        self._read = None
        self._segments = None
        if config.text_source == "caption":
            self._segments = isolated_captions.SeparateSegments(model, reads_inner_layers=bool(self._inner_layers))
        if self._segments or self._carries_mask:
            self._splice, self._splice_signature = model._preprocess_data, inspect.signature(model._preprocess_data)
            model._preprocess_data = self._splice_with_copies
        self._put_hooks(model)

    def _put_hooks(self, model: LLaVAModel) -> None:
        model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        model.register_forward_hook(self._after_forward)
        on_decoder_layers(model, set(self._text_layers.values()), self._keep_states)
        if not self.is_first:
            self._set_input_tensor = model.set_input_tensor
            model.set_input_tensor = self._keep_received
            return
        tower = model.vision_model
        # A tower that ends in a merger says how wide that is.
        self._image_width = getattr(tower, "out_hidden_size", None) or tower.config.hidden_size
        inner = [layer for layer in self._vision_layers if layer != -1]
        numbers = {
            layer: layer_number(layer, tower.config.num_layers, named="--rsa-layers, vision layer") for layer in inner
        }
        for layer, number in numbers.items():
            on_tower_layers(
                tower, [number], lambda _, states_PTD, layer=layer: self._keep_tiles(layer, states_PTD.transpose(0, 1))
            )
        tower.register_forward_hook(lambda module, args, tokens_TPD: self._keep_tiles(-1, tokens_TPD))

    def begin(self, read: Callable[[], RSASamples | Selection | None]) -> None:
        """A micro-batch begins. `read()` gives what is said of it where this rank has read its batch, else None."""
        self._read = read

    def take(self) -> Representations | None:
        """What was read of the micro-batch that has just gone forward; None where there was nothing to read."""
        found, self._in_hand, self._read = self._in_hand, _InHand(), None
        if not self.is_last or found.samples is None or found.caption_mask_BL is None:
            return None
        return Representations(
            {layer: found.v[layer] for layer in self._vision_layers},
            found.hidden,
            found.sums,
            found.caption_mask_BL,
            found.samples,
            found.is_packed,
            found.num_copied,
        )

    # The hooks, in the order in which they fire.

    def _keep_received(self, input_tensor):
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self._set_input_tensor(input_tensor)

    def _take_off_carrier(self) -> None:
        """Before the forward pass, and not when it is received: text generation, which has no carrier, passes here too."""
        received, self._received = self._received, None
        self._vector_width = self._vector_width or pipeline_payload.vector_width(received)
        k = pipeline_payload.num_rows_received(received, self._vector_width, self._shards if self._carries_mask else 0)
        # Slices along dim 0 of what was received: no copy, and both parts' gradients return through it.
        self._rows = received[-k:]
        self._set_input_tensor([received[:-k]])

    def _before_forward(self, model, args, kwargs):
        bound = self._signature.bind(*args, **kwargs)
        self._active = bound.arguments.get("inference_context") is None
        self._in_hand = _InHand()
        if self._segments:
            self._segments.start_B = None
        if not self._active:
            return None
        if not self.is_first and self._received is not None:
            self._take_off_carrier()
        if self._read is None and model.training:
            raise RuntimeError(
                "RSA has its taps on the model and is told of no batch: wrap the forward step too "
                "(RSAPlugin.wrap_forward_step)"
            )
        if self._read is None:
            return None
        if self._segments and not self.is_first:  # the first stage learns it from the splice
            self._segments.start_B = self._unpacked(mask_length=0).start_B
        if not (self.is_first or self.is_last):
            return None
        self._in_hand.is_packed = is_packed(bound.arguments)
        self._in_hand.samples = self._samples(bound.arguments)
        checks.check_batch(
            bound.arguments,
            is_last=self.is_last,
            needs_captions=self.is_last or self._carries_mask or self._segments is not None,
            is_packed=self._in_hand.is_packed,
            has_stages=not (self.is_first and self.is_last),
            reads_captions_alone=self._segments is not None,
        )
        if self._segments:
            self._in_hand.samples, self._in_hand.num_copied = isolated_captions.append(
                bound.arguments, self._in_hand.samples
            )
        if self.is_last:
            mask_BS = bound.arguments["loss_mask"]
            self._in_hand.loss_mask_dtype = mask_BS.dtype
            marks_BS = self._in_hand.samples.caption_mask
            bound.arguments["loss_mask"] = caption_marks.put_on(mask_BS, marks_BS, packed=self._in_hand.is_packed)
        return bound.args, bound.kwargs

    def _splice_with_copies(self, *args, **kwargs):
        """LLaVAModel's splice, in rows longer by the copies than its longest; and where the text comes to lie."""
        given = self._splice_signature.bind(*args, **kwargs).arguments
        num_copied = self._in_hand.num_copied
        if self.is_first and self._in_hand.samples is not None:
            per_tile = 1 if given.get("is_packed_dynamic_res") else self._model.img_seq_len
            is_image_BS = given["input_ids"] == given["image_token_index"]
            positions_BS = token_positions.positions(is_image_BS, given["num_image_tiles"] * per_tile)
            self._in_hand.positions_BS = positions_BS
            if num_copied:
                self._segments.start_B = positions_BS[:, -num_copied]
        self._model._language_max_sequence_length += num_copied
        try:
            return self._splice(*args, **kwargs)
        finally:
            self._model._language_max_sequence_length -= num_copied

    def _keep_tiles(self, layer: int, tokens_TPD: Tensor) -> None:
        if not self._active or self._in_hand.samples is None or layer not in self._vision_layers:
            return
        if self._model._drop_vision_class_token:
            tokens_TPD = tokens_TPD[:, getattr(self._model.vision_model, "class_token_len", 0) :]
        count_n, num_tiles = self._in_hand.samples.num_tiles, tokens_TPD.shape[0]
        if not self._tiles_are_checked:  # once: it waits for the device
            self._tiles_are_checked = checks.check_tiles(count_n, num_tiles)
        pooling, base_tile = self.config.image_pooling, self.config.base_tile
        self._in_hand.v[layer] = image_vectors(tokens_TPD, count_n, pooling=pooling, base_tile=base_tile)

    def _keep_states(self, number: int, hidden_LBE: Tensor) -> None:
        if self._active:
            self._in_hand.hidden |= {layer: hidden_LBE for layer, n in self._text_layers.items() if n == number}

    def _after_forward(self, model, args, result):
        if not self._active:
            return None
        output, mask_BL = result
        found = self._in_hand
        if not self.is_last:
            return torch.cat([output, self._rows_to_send(output)]), mask_BL
        if found.samples is not None:
            mask_BL, found.caption_mask_BL = caption_marks.take_off(
                mask_BL, found.loss_mask_dtype, packed=found.is_packed
            )
            if not self.is_first:
                self._unpack(self._unpacked(mask_length=0))
            for layer in self._vision_layers:  # a batch of text
                if layer not in found.v:
                    found.v[layer] = self._no_image(output)
        else:
            found.hidden.clear()
        self._rows = None
        return output, mask_BL

    # What they need.

    def _unpacked(self, mask_length: int) -> Carried:
        return pipeline_payload.unpack(self._rows, self._vector_width, mask_length)

    def _samples(self, arguments: dict) -> RSASamples:
        """The batch's RSASamples, of whose captions no row is lost in LLaVAModel's splice."""
        samples = self._said_samples(arguments)
        is_image_BS = images_in(arguments, self._model)
        # (What is copied to the end of its row has no image after it.)
        keep = (
            samples.caption_mask * ~is_image_BS
            if self._segments
            else token_positions.readable(samples.caption_mask, is_image_BS)
        )
        return replace(samples, caption_mask=keep)

    def _said_samples(self, arguments: dict) -> RSASamples:
        """From the tensor-parallel rank that has read the batch, and from the model's arguments."""
        said = self._read() or Selection()
        not_said = torch.zeros(0, dtype=torch.int64)
        data = {name: getattr(said, name, None) for name in _FIELDS}
        data = {name: not_said if tensor is None else tensor for name, tensor in data.items()}
        data = broadcast_tensors(_FIELDS, data, torch.int64, self._pg_collection.tp)
        if data["sample_id"].numel():
            return RSASamples(**data)
        eligible, caption_mask = (data[name] if data[name].numel() else None for name in ("eligible", "caption_mask"))
        return samples_of(arguments, self._model, Selection(eligible, caption_mask))

    def _no_image(self, like_LBH: Tensor) -> Tensor:
        samples = self._in_hand.samples
        num_samples = like_LBH.shape[1] if samples is None else len(samples.eligible)
        return like_LBH.new_zeros(num_samples, self._image_width, dtype=torch.float32)

    def _rows_to_send(self, output_LBH: Tensor) -> Tensor:
        """The carrier's rows for the next stage: what has come, with the sums of this stage's layers in their places."""
        own_layers = [layer for layer in self._inner_layers if layer in self._in_hand.hidden]
        rows, self._rows = self._rows, None
        if not self.is_first and not own_layers:
            return rows
        length = output_LBH.shape[0] * self._shards * self._carries_mask
        if self.is_first:
            carried = self._first_carried(output_LBH, length)
        else:
            carried = pipeline_payload.unpack(rows, self._vector_width, length)
        vector_BF, hidden_width = carried.vector_BF, output_LBH.shape[2]
        first_sum = vector_BF.shape[1] - hidden_width * len(self._inner_layers)
        parts = list(vector_BF.split([first_sum] + [hidden_width] * len(self._inner_layers), dim=1))
        for place, layer in enumerate(self._inner_layers, start=1):
            if layer in own_layers:
                # As a mean: a sum over a long caption could leave fp16's range.
                hidden_LBE, mask_BL = self._in_hand.hidden[layer], carried.mask_BL
                sum_BE = caption_sums(hidden_LBE, mask_BL, len(mask_BL), self._model_config, self._pg_collection.tp)
                parts[place] = sum_BE / caption_counts(mask_BL, len(mask_BL)).clamp(min=1)[:, None]
        self._in_hand = _InHand()
        return pipeline_payload.pack(
            carried._replace(vector_BF=torch.cat(parts, dim=1)), hidden_width, output_LBH.dtype
        )

    def _first_carried(self, output_LBH: Tensor, length: int) -> Carried:
        found, (batch_size, hidden_width) = self._in_hand, output_LBH.shape[1:]
        v = [found.v[layer] if layer in found.v else self._no_image(output_LBH) for layer in self._vision_layers]
        empty = output_LBH.new_zeros(batch_size, hidden_width * len(self._inner_layers), dtype=torch.float32)
        no_id_B = torch.zeros(batch_size, dtype=torch.int64, device=output_LBH.device)
        sample_id_B, mask_BL = no_id_B, no_id_B[:, None].expand(batch_size, length)
        if found.samples is not None:
            sample_id_B = found.samples.sample_id
            if length:
                cp = self._pg_collection.cp
                whole_BL = token_positions.spliced(found.samples.caption_mask, found.positions_BS, length * cp.size())
                mask_BL = token_positions.context_parallel_part(whole_BL, cp.size(), cp.rank())
        start_B = self._segments.start_B if self._segments else None
        return Carried(torch.cat([*v, empty], dim=1), sample_id_B, no_id_B if start_B is None else start_B, mask_BL)

    def _unpack(self, carried: Carried) -> None:
        """On the last stage: v, and the sums of the layers that stages before it have."""
        checks.check_same_samples(carried.sample_id_B, self._in_hand.samples.sample_id)
        found, hidden_width = self._in_hand, self._model_config.hidden_size
        num_v, num_sums = len(self._vision_layers), len(self._inner_layers)
        image_width = (self._vector_width - hidden_width * num_sums) // num_v
        parts = carried.vector_BF.split([image_width] * num_v + [hidden_width] * num_sums, dim=1)
        found.v = dict(zip(self._vision_layers, parts))
        count_B = caption_counts(found.caption_mask_BL, len(found.caption_mask_BL)).clamp(min=1)
        means = zip(self._inner_layers, parts[num_v:])
        found.sums = {layer: mean_BE * count_B[:, None] for layer, mean_BE in means if layer not in found.hidden}
