"""megatron-core's LLaVAModel as a host of RSA. Its private names stand in this file alone.

Shapes: B rows, S text positions, L positions of the decoder's row, T tiles of P tokens, H and D widths of decoder and tower.
"""

import functools
import inspect
from collections.abc import Callable, Collection

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rsa_megatron.hooks import caption_mask, token_positions
from rsa_megatron.hooks.layer_hooks import layer_number, on_decoder_layers, on_tower_layers


class LLaVAHost:
    """megatron-core's LLaVAModel: an image is one token of the text, and becomes its tiles' tokens within forward (the splice).

    The caption mask has to follow the text through the splice: image tokens put in, padding, truncation, the split over
    context-parallel ranks. LLaVAModel does all that to the loss mask on the last stage, and the caption mask rides in it
    (caption_mask.py) as far as the language model, which is given the loss mask without it.
    """

    def __init__(self, model: LLaVAModel):
        self.model = model

    @property
    def config(self) -> TransformerConfig:
        return self.model.config

    @property
    def vision_config(self):
        return getattr(self.model.vision_model, "config", None)

    @property
    def pg_collection(self) -> ProcessGroupCollection:
        return self.model.pg_collection

    @property
    def is_first(self) -> bool:
        return self.model.pre_process

    @property
    def is_last(self) -> bool:
        return self.model.post_process

    @property
    def decoder(self) -> torch.nn.Module:
        return self.model.language_model.decoder

    @property
    def image_width(self) -> int:
        tower = self.model.vision_model
        # A tower that ends in a merger says how wide that is.
        return getattr(tower, "out_hidden_size", None) or tower.config.hidden_size

    def refusals(self) -> list[tuple[object, str]]:
        model = self.model
        settings, tower = model.config, self.vision_config
        has_stages = settings.pipeline_model_parallel_size > 1
        has_dynamic_resolution = getattr(model, "dynamic_resolution", None) or getattr(
            model, "_dynamic_resolution", None
        )
        return [
            (
                not model.add_decoder or bool(model.add_encoder) != bool(model.pre_process),
                "the tower belongs to the first pipeline stage and to no other: build LLaVAModel with add_encoder=pre_process, "
                "add_decoder=True",
            ),
            (
                model.add_decoder and not hasattr(getattr(model.language_model, "decoder", None), "layers"),
                f"its language model is a {type(model.language_model).__name__} without Megatron's decoder layers: build LLaVAModel "
                "with Megatron's own in place of language_model_type hf://...",
            ),
            (
                tower and tower.tensor_model_parallel_size != settings.tensor_model_parallel_size,
                "tower and decoder are to share their ranks: give the tower's config the decoder's tensor_model_parallel_size",
            ),
            (
                has_dynamic_resolution or (getattr(model, "temporal_patch_dim", None) or 1) > 1,
                "it reads the tower's output tile by tile: leave dynamic resolution and video patches out",
            ),
            (
                has_stages and not self._drops_class_tokens and (self._num_class_tokens or 0) > 1,
                "LLaVAModel counts one class token on stages without a tower, and this one keeps several: drop them "
                "(drop_vision_class_token=True), or set --pipeline-model-parallel-size 1",
            ),
        ]

    def bind(self, args: tuple, kwargs: dict) -> inspect.BoundArguments:
        return self._signature.bind(*args, **kwargs)

    def generates_text(self, arguments: dict) -> bool:
        return arguments.get("inference_context") is not None

    def check_arguments(self, arguments: dict, *, needs_captions: bool) -> None:
        if needs_captions and arguments.get("loss_mask") is None:
            raise ValueError(
                "RSA finds the caption's rows by way of the loss mask: pass loss_mask to the model's forward"
            )
        if self.is_last and arguments.get("labels") is None:
            raise ValueError(
                "RSA needs the loss mask back, which LLaVAModel returns with labels alone: pass labels to its forward"
            )
        if arguments.get("imgs_sizes") is not None:
            raise ValueError(
                "RSA takes a tower's output tile by tile: it does not go with dynamic resolution (imgs_sizes)"
            )

    def knows_bounds(self, arguments: dict) -> bool:
        # A model whose stages tell one another has this attribute.
        return getattr(self.model, "packs_rows", False) or any(
            arguments.get(name) is not None for name in ("packed_seq_params", "attention_mask")
        )

    def images_in(self, arguments: dict) -> Tensor:
        image_token = arguments.get("image_token_index")
        return arguments["input_ids"] == (self.model.image_token_index if image_token is None else image_token)

    def tiles_of_images(self, arguments: dict, is_image_BS: Tensor) -> Tensor:
        tiles = arguments.get("num_image_tiles")
        if tiles is None:  # one each, as LLaVAModel has it
            return torch.ones(int(is_image_BS.sum()), dtype=torch.int64, device=is_image_BS.device)
        return torch.as_tensor(tiles, device=is_image_BS.device)

    def positions(self, arguments: dict, is_image_BS: Tensor, tiles: Tensor) -> Tensor:
        return token_positions.positions(is_image_BS, tiles * self.model.img_seq_len)

    def row_lengths(self, num_positions: int) -> set[int]:
        model = self.model
        cut = min(num_positions, model._language_max_sequence_length)
        shards = model.tensor_model_parallel_size_lm if model.sequence_parallel_lm else 1
        shards *= 2 * model.context_parallel_lm if model.context_parallel_lm > 1 else 1
        lengths = {num_positions, cut, -(-cut // shards) * shards}
        if model._language_is_pipeline_parallel:  # then LLaVAModel fills up every row
            lengths.add(model._language_max_sequence_length)
        return lengths

    def keeps_caption(self, caption_mask_BS: Tensor, is_image_BS: Tensor, *, at_end: bool) -> Tensor:
        if at_end:
            return caption_mask_BS * ~is_image_BS
        return token_positions.readable(caption_mask_BS, is_image_BS)

    def on_splice(self, num_added: Callable[[], int | None], keep: Callable[[Tensor], None]) -> None:
        model, splice = self.model, self.model._preprocess_data
        signature = inspect.signature(splice)

        @functools.wraps(splice)
        def with_room(*args, **kwargs):
            added = num_added()
            if added is None:
                return splice(*args, **kwargs)
            if self.is_first:
                given = signature.bind(*args, **kwargs).arguments
                tokens_per_tile = 1 if given.get("is_packed_dynamic_res") else model.img_seq_len
                is_image_BS = given["input_ids"] == given["image_token_index"]
                keep(token_positions.positions(is_image_BS, given["num_image_tiles"] * tokens_per_tile))
            # LLaVAModel cuts rows at this length.
            model._language_max_sequence_length += added
            try:
                return splice(*args, **kwargs)
            finally:
                model._language_max_sequence_length -= added

        model._preprocess_data = with_room

    def on_vision(self, layers: Collection[int], keep: Callable[[int, Tensor], None]) -> None:
        tower = self.model.vision_model
        for layer in layers:
            if layer == -1:
                tower.register_forward_hook(lambda module, args, tokens_TPD: keep(-1, self._patches(tokens_TPD)))
                continue
            number = layer_number(layer, tower.config.num_layers, named="--rsa-layers, vision layer")
            on_tower_layers(
                tower,
                [number],
                lambda _, states_PTD, layer=layer: keep(layer, self._patches(states_PTD.transpose(0, 1))),
            )

    def on_text(self, layers: Collection[int], keep: Callable[[int, Tensor], None]) -> None:
        on_decoder_layers(self.model, layers, keep)

    def received(self) -> Tensor | None:
        return self.decoder.input_tensor

    def set_received(self, hidden_LBH: Tensor) -> None:
        self.model.set_input_tensor([hidden_LBH])

    def put_on_caption_mask(self, arguments: dict, mask_BS: Tensor, *, packed: bool) -> torch.dtype:
        loss_mask_BS = arguments["loss_mask"]
        arguments["loss_mask"] = caption_mask.put_on(loss_mask_BS, mask_BS, packed=packed)
        return loss_mask_BS.dtype

    def on_loss_mask(self, without_caption_mask: Callable[[Tensor], Tensor]) -> None:
        def take_off(language_model, args, kwargs):
            if kwargs.get("loss_mask") is None:  # before 0.20 it is given none
                return None
            return args, kwargs | {"loss_mask": without_caption_mask(kwargs["loss_mask"])}

        self.model.language_model.register_forward_pre_hook(take_off, with_kwargs=True)

    def take_off_caption_mask(self, result, dtype: torch.dtype, *, packed: bool) -> tuple[object, Tensor]:
        output, marked_BL = result
        loss_mask_BL, mask_BL = caption_mask.take_off(marked_BL, dtype, packed=packed)
        return (output, loss_mask_BL), mask_BL

    def append_to_output(self, result, rows: Callable[[Tensor], Tensor]) -> object:
        output_LBH, loss_mask = result
        return torch.cat([output_LBH, rows(output_LBH)]), loss_mask

    def output_of(self, result) -> Tensor:
        return result[0]

    @functools.cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.model.forward)

    @property
    def _drops_class_tokens(self) -> bool:
        return getattr(self.model, "_drop_vision_class_token", False)

    @property
    def _num_class_tokens(self) -> int | None:
        return getattr(self.model.vision_model, "class_token_len", None)

    def _patches(self, tokens_TPD: Tensor) -> Tensor:
        return tokens_TPD[:, self._num_class_tokens or 0 :] if self._drops_class_tokens else tokens_TPD
