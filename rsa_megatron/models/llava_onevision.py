"""LLaVA-OneVision on Megatron's LLaVAModel: a SigLIP tower, an AnyRes projector and a Qwen2 decoder.

LLaVAModel would build the tower itself, with a norm at its end that needs Transformer Engine and that
LLaVA-OneVision does not use. So it is built without an encoder and given ours, of Megatron's own classes.
"""

from collections.abc import Iterable
from functools import partial

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rsa_megatron.anyres import ImageLayout
from rsa_megatron.models import packed_rows
from rsa_megatron.models.anyres_projector import AnyResProjector
from rsa_megatron.models.architectures import Architecture
from rsa_megatron.models.embedding_dropout import SharedDropout
from rsa_megatron.models.layer_specs import layer_specs
from rsa_megatron.models.transformer_configs import make_projector_config, make_vision_config


class LlavaOneVision(LLaVAModel):
    """This rank's modules of the model (a chunk of them, under interleaved pipelines).

    Args:
        architecture: sizes of tower and vocabulary; the decoder's come from decoder_config.
        decoder_config: Megatron's config, as made from its flags; the tower's and projector's are derived from it.
        padded_vocab_size: rows of the word embeddings. Those beyond architecture.vocab_size are padding: no text has
            their ids, and their logits are as if they were not there.
        max_sequence_length: longest sequence, image tokens included. LLaVAModel truncates longer ones.
        image_token_index: the token id at which an image's tokens are put in.
        tie_word_embeddings: the output layer's weight is the word embeddings'.
        rotary_base: of the decoder's rotary position embedding.
        packs_rows: a row may be a packed row (packed_rows.py): the stages of a pipeline tell one another where its sequences end.
        pre_process: this is the first pipeline stage: it holds the tower, the projector and the embeddings.
        post_process: this is the last one: it holds the output layer.
        vp_stage: which of this rank's chunks, under interleaved pipelines.
        pg_collection: process groups; default: Megatron's global ones.
    """

    def __init__(
        self,
        architecture: Architecture,
        decoder_config: TransformerConfig,
        *,
        padded_vocab_size: int,
        max_sequence_length: int,
        image_token_index: int,
        tie_word_embeddings: bool,
        rotary_base: int,
        packs_rows: bool = False,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        vision_spec, decoder_spec, projector_spec = layer_specs(decoder_config.transformer_impl)
        vision, vision_config = architecture.vision, make_vision_config(decoder_config, architecture.vision)
        projector_config = make_projector_config(decoder_config)
        # A side that is no multiple of the patch (384 = 27 * 14 + 6) loses its last pixels in the patch convolution;
        # Megatron's classes ask for the side of which all is used.
        used_size = vision.tokens_per_side * vision.patch_size
        super().__init__(
            language_transformer_config=decoder_config,
            language_transformer_layer_spec=decoder_spec,
            language_vocab_size=padded_vocab_size,
            language_max_sequence_length=max_sequence_length,
            language_position_embedding_type="rope",
            language_rotary_base=rotary_base,
            share_embeddings_and_output_weights=tie_word_embeddings,
            vision_transformer_config=vision_config,
            vision_transformer_layer_spec=vision_spec,
            drop_vision_class_token=False,
            vision_projection_config=projector_config,
            vision_projection_layer_spec=projector_spec,
            pre_process=pre_process,
            post_process=post_process,
            add_encoder=False,
            img_h=used_size,
            img_w=used_size,
            patch_dim=vision.patch_size,
            image_token_index=image_token_index,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self._image_size, self._side, self._max_tiles = (
            vision.image_size,
            vision.tokens_per_side,
            architecture.max_tiles,
        )
        #: asked by RSA: stages that read no data know where the sequences of a packed row begin
        self.packs_rows = packs_rows
        self.img_seq_len = 1  # what LLaVAModel calls a tile is one token of AnyResProjector's
        #: rows behind the hidden state between stages, which hold the bounds of a packed row
        self.num_bounds_rows = 0
        if packs_rows and decoder_config.pipeline_model_parallel_size > 1:
            self.num_bounds_rows = packed_rows.count_bounds_rows(max_sequence_length, decoder_config.hidden_size)
            # The hidden state with its bounds is longer than the sequence: let the stages tell each other. (Set here because
            # TransformerConfig refuses it together with a default of its expert layers.)
            self.config.variable_seq_lengths = True
        # Megatron has no pipeline stages of the tower's own: it goes whole with the first decoder layers.
        self.add_encoder = pre_process
        if pre_process and decoder_config.sequence_parallel:
            self.language_model.embedding.embedding_dropout = SharedDropout(decoder_config.hidden_dropout)
        if pre_process:
            self._drop_vision_class_token = False
            self.vision_model = _Tower(
                vision_config,
                vision_spec,
                ln_post_impl=_UnusedNorm,
                add_class_token=False,
                class_token_len=0,
                patch_dim=vision.patch_size,
                img_h=used_size,
                img_w=used_size,
                model_subtype="siglip",
                pg_collection=self.pg_collection,
            )
            self.vision_model.out_hidden_size = architecture.projector_input_width
            self.vision_projection = AnyResProjector(
                projector_config,
                projector_spec,
                self.vision_model.out_hidden_size,
                side=self._side,
                max_tiles=self._max_tiles,
                tp_group=self.pg_collection.tp,
            )
            num_built = len(self.vision_model.decoder.layers)
            assert num_built == vision.num_layers, (
                f"the vision tower has {num_built} layers instead of {vision.num_layers}: "
                "a pipeline setting of the decoder reached its config"
            )
        if post_process:
            mask = partial(_mask_padding, architecture.vocab_size, padded_vocab_size, self.pg_collection.tp.rank())
            self.language_model.output_layer.register_forward_hook(mask)

    def forward(
        self,
        images: Tensor | None,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        inference_context=None,
        image_layouts: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs,
    ):
        """Run LLaVAModel's forward pass, with image_layouts instead of num_image_tiles.

        Args:
            images: all images' tiles in order, [T, 3, image_size, image_size]; or precomputed embeddings, [T, D], which
                bypass the tower.
            image_layouts: how each image lies in its tiles, [number of images, 6] (LlavaBatch). Without it each tile
                is an image, without a newline.
            packed_seq_params: of a packed row, on the first and the last stage (packed_rows.make_packed_seq_params).
            Others as LLaVAModel's.
        """
        has_bounds = self.num_bounds_rows and inference_context is None
        has_stages = self.config.pipeline_model_parallel_size > 1
        is_told = has_bounds and isinstance(packed_seq_params, packed_rows.PackedRowParams)
        if packed_seq_params is not None and has_stages and not is_told:
            raise ValueError(
                "a packed row under pipeline parallelism: the stages on the way must know of it, build the model with packs_rows=True "
                "and packed_seq_params with packed_rows.make_packed_seq_params"
            )
        if has_bounds and not self.pre_process:
            packed_seq_params = self._take_off_bounds(packed_seq_params)
        num_tokens = None
        if input_ids is not None:
            layouts = self._get_layouts(images, image_layouts)
            num_tokens = [layout.num_tokens(self._side, self._max_tiles) for layout in layouts]
            num_tokens = torch.tensor(num_tokens, dtype=torch.int, device=input_ids.device)
            if self.add_encoder:
                self.vision_projection.layouts = layouts
                if images is not None and not len(images) and torch.is_grad_enabled():
                    images = self._make_black_tile(images)
        output, loss_mask = super().forward(
            images,
            input_ids,
            position_ids,
            attention_mask,
            labels=labels,
            loss_mask=loss_mask,
            inference_context=inference_context,
            num_image_tiles=num_tokens,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )
        if has_bounds and not self.post_process:
            output = packed_rows.put_on_bounds(output, packed_seq_params, self.num_bounds_rows)
        return output, loss_mask

    def decoder_row_length(self, num_positions: int) -> int:
        """Return how long the decoder's row of so many positions is: LLaVAModel fills it up for a pipeline, or for the ranks that share it."""
        if self.config.pipeline_model_parallel_size > 1:
            return self._language_max_sequence_length
        cp = self.config.context_parallel_size
        multiple = self._num_shards * (2 * cp if cp > 1 else 1)
        return -(-min(num_positions, self._language_max_sequence_length) // multiple) * multiple

    @property
    def _num_shards(self) -> int:
        return self.pg_collection.tp.size() if self.config.sequence_parallel else 1

    def _take_off_bounds(self, own: PackedSeqParams | None) -> PackedSeqParams | None:
        """Take the bounds off what the stage before has sent; on the last stage, which has read the row, check that they are its own."""
        received = self.language_model.decoder.input_tensor
        hidden, packed = packed_rows.take_off_bounds(
            received, self.num_bounds_rows, self._num_shards, self.config.context_parallel_size
        )
        self.set_input_tensor([hidden])
        if self.post_process:
            packed_rows.check_same_bounds(packed, own)
        return packed

    def _preprocess_data(
        self,
        image_embeddings,
        language_embeddings,
        input_ids,
        loss_mask,
        labels,
        inference_kv_cache,
        inference_context,
        image_token_index,
        num_image_tiles,
        *args,
        **kwargs,
    ):
        """Splice as LLaVAModel; and train the token after an image where the loss mask says so, as LLaVA does.

        LLaVAModel masks all positions of an image, also its last, whose label is the next token of the text.
        """
        combined, new_labels, new_mask = super()._preprocess_data(
            image_embeddings,
            language_embeddings,
            input_ids,
            loss_mask,
            labels,
            inference_kv_cache,
            inference_context,
            image_token_index,
            num_image_tiles,
            *args,
            **kwargs,
        )
        if new_mask is not None:
            is_image_BS = input_ids == image_token_index
            lengths_BS = torch.ones_like(input_ids)
            lengths_BS[is_image_BS] = num_image_tiles.to(lengths_BS.dtype)
            last_BS = lengths_BS.cumsum(dim=1) - 1  # where each token's last position is in the spliced sequence
            is_image_BS &= last_BS < new_mask.shape[1]
            rows, _ = torch.where(is_image_BS)
            new_mask[rows, last_BS[is_image_BS]] = loss_mask[is_image_BS]
        return combined, new_labels, new_mask

    def _make_black_tile(self, images: Tensor) -> Tensor:
        """Make a tile that goes through the vision modules in a batch of text, and not into the text: a gradient of zero.

        Without it they would have none, and Megatron's overlapped gradient reduction would wait for it.
        """
        return images.new_zeros(1, *images.shape[1:])

    def _get_layouts(self, images: Tensor | None, image_layouts: Tensor | None) -> list[ImageLayout]:
        if image_layouts is not None:
            return [ImageLayout(*row) for row in image_layouts.tolist()]
        num_images = 0 if images is None else len(images)
        return [ImageLayout(self._image_size, self._image_size, newline=0)] * num_images


class _Tower(CLIPViTModel):
    """The tower; a precomputed embedding (ReVision's stages) is its own only token.

    The tower stays in such a model, so that its checkpoints are those of any other stage.
    """

    def forward(self, images: Tensor, *args, **kwargs) -> Tensor:
        """Return [T, P, D] of tiles, [T, 1, D] of embeddings [T, D]."""
        return images[:, None] if images.dim() == 2 else super().forward(images, *args, **kwargs)


class _UnusedNorm(torch.nn.Module):
    """SigLIP's last norm: LLaVA-OneVision takes the tokens as the last layer leaves them, but its checkpoints have it.

    Buffers, as nothing is trained: they go from checkpoint to checkpoint and back to Hugging Face as they are.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        self.register_buffer("weight", torch.ones(hidden_size))
        self.register_buffer("bias", torch.zeros(hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens


def _mask_padding(vocab_size: int, padded_vocab_size: int, tp_rank: int, layer, args, output):
    """Mask padding as a hook on the output layer: logits of padding rows go to the lowest number, out of softmax and gradient."""
    logits, bias = output
    width = logits.shape[-1]  # this rank's columns, or all of them where they were gathered
    first = 0 if width == padded_vocab_size else tp_rank * width
    if first + width > vocab_size:
        logits[..., max(0, vocab_size - first) :].fill_(torch.finfo(logits.dtype).min)
    return logits, bias


#: The modules that --trainable names, and where they are in the model.
PARTS = {
    "vision": ("vision_model.",),
    "projector": ("vision_projection.",),
    "embeddings": ("language_model.embedding.",),
    "language": ("language_model.decoder.", "language_model.output_layer."),
}


def get_part(parameter_name: str, parameter: torch.nn.Parameter) -> str:
    """Return the module of PARTS that a parameter of the model belongs to."""
    if getattr(parameter, "shared_embedding", False):
        return "embeddings"  # the last stage's copy of tied word embeddings is called output_layer
    return next(part for part, prefixes in PARTS.items() if parameter_name.startswith(prefixes))


def set_trainable(model: LLaVAModel, trainable: Iterable[str]) -> None:
    """Freeze all modules but those named."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = get_part(name, parameter) in trainable
