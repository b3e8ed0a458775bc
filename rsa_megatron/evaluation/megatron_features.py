"""The vector of an image, or of a caption, after any layer of either backbone, on a model in whatever layout it trains.

An image goes through the tower by itself, its caption through the decoder by itself. In the training pass the caption's
states have seen the image through attention: they share neighbours with it without any training, so nothing is read
there.

Layers are numbered as in layer_hooks.py. Hooks pool each layer's states as they come: no more than one layer's tokens are held.

Shapes: B samples of a micro-batch, n of all micro-batches, S caption tokens, L positions, D and E widths of v and t.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from rsa_megatron.hooks import token_positions
from rsa_megatron.hooks.broadcast import broadcast_tensors
from rsa_megatron.hooks.caption_pooling import caption_vectors, sequence_shards
from rsa_megatron.hooks.layer_hooks import on_decoder_layers, on_tower_layers


@dataclass
class Pairs:
    """One micro-batch: images and captions, each by itself. A sample that is not eligible has a dummy's place."""

    #: the whole picture of each sample in one tile, [B, 3, height, width], or its embedding, [B, D]
    images: Tensor
    #: caption tokens from the left, [B, S], and 1 where there is one
    tokens: Tensor
    mask: Tensor
    eligible_B: Tensor

    @classmethod
    def of(cls, images: Tensor, captions: Sequence[Tensor], eligible_B: Tensor) -> "Pairs":
        """Make a micro-batch from the token ids of each caption."""
        tokens = torch.zeros(len(captions), max(1, *map(len, captions)), dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, caption in enumerate(captions):
            tokens[row, : len(caption)], mask[row, : len(caption)] = caption, 1
        return cls(images, tokens, mask, eligible_B)

    def mark_ineligible(self) -> "Pairs":
        """Return the same micro-batch with no sample eligible."""
        return Pairs(self.images, self.tokens, self.mask, torch.zeros_like(self.eligible_B))

    def to_host(self, dtype: torch.dtype | None) -> "Pairs":
        """Copy to host memory; the images in `dtype`, or none of them."""
        images = self.images[:0] if dtype is None else self.images.to(dtype)
        return Pairs(*(tensor.cpu() for tensor in (images, self.tokens, self.mask, self.eligible_B)))

    def broadcast(self: "Pairs | None", tp_group) -> "Pairs":
        """Give every tensor-parallel rank of a stage the first one's micro-batch; `self` is None on the others."""
        integers = self and dict(tokens=self.tokens, mask=self.mask, eligible=self.eligible_B)
        integers = broadcast_tensors(["tokens", "mask", "eligible"], integers, torch.int64, tp_group)
        images = broadcast_tensors(["images"], self and dict(images=self.images), torch.float32, tp_group)["images"]
        return Pairs(images, integers["tokens"], integers["mask"], integers["eligible"])


def unwrap_chunks(model: Iterable[torch.nn.Module]) -> list[LLaVAModel]:
    """Return the LLaVAModels within Megatron's wrappers."""
    return [get_attr_wrapped_model(chunk, "image_token_index", return_model_obj=True) for chunk in model]


@torch.no_grad()
def image_vectors(first: LLaVAModel, images: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """Compute v of each image after each of `layers`, [B, D] in float32: the mean of its tokens (paper, eq. 1)."""
    tower, pooled = first.vision_model, {}
    if images.dim() == 2:  # embeddings, which are what the tower would give
        return {number: images.float() for number in layers}

    def keep(number, state_PBD):
        pooled[number] = state_PBD.mean(dim=0, dtype=torch.float32)

    hooks = on_tower_layers(tower, layers, keep)
    try:
        tower(images.to(next(tower.parameters()).dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return {number: pooled[number] for number in layers}


@torch.no_grad()
def projected_vectors(first: LLaVAModel, images: Tensor) -> Tensor:
    """Average each image's tokens as the projector hands them to the decoder, [B, E] in float32.

    The one image vector that lies in the same space as the captions': among the word embeddings, the decoder's layer 0.
    """
    tower = first.vision_model
    tokens_BPD = tower(images.to(next(tower.parameters()).dtype))
    # The projector's own forward pass; what a subclass adds to it (packing) is not of one image.
    projected_PBE = MultimodalProjector.forward(first.vision_projection, tokens_BPD.transpose(0, 1).contiguous())
    return projected_PBE.mean(dim=0, dtype=torch.float32)


@torch.no_grad()
def caption_vectors_of_layers(
    model: Sequence[torch.nn.Module],
    pairs: Sequence[Pairs],
    layers: Sequence[int],
    *,
    micro_batch_size: int,
    seq_length: int,
) -> dict[int, Tensor]:
    """Compute t of each caption after each of `layers`, [n, E] in float32, on every rank: its tokens' mean (paper, eq. 2).

    Every rank of the pipeline must call it. Through Megatron's own forward-only schedule.

    Args:
        model: this rank's chunks, as Megatron holds them, in evaluation mode.
        pairs: the micro-batches, on any device; None on stages between the first and the last.
        seq_length: as the model was made for; the pipeline's shapes.
    """
    chunks = unwrap_chunks(model)
    groups = chunks[0].pg_collection
    masks = [_broadcast_mask(pair, groups.pp) for pair in pairs]
    pooled: dict[int, list[Tensor]] = {number: [] for number in layers}
    current = {}

    def keep(number, state_LBE):
        mask_BL = _shard_mask(masks[current["number"]].float(), len(state_LBE), chunks[0])
        pooled[number].append(caption_vectors(state_LBE, mask_BL, chunks[0].config, groups)[0])

    counts = {chunk: iter(range(len(pairs))) for chunk in chunks}

    def forward_step(data_iterator, wrapped):
        (chunk,) = unwrap_chunks([wrapped])
        current["number"] = next(counts[chunk])
        if not (chunk.pre_process or chunk.post_process):
            output, _ = wrapped(None, None, None, None)
        else:
            output = _run_decoder(wrapped, pairs[current["number"]])
        return output, lambda output, non_loss_data: None

    hooks = [hook for chunk in chunks for hook in on_decoder_layers(chunk, layers, keep)]
    has_output = [chunk.language_model.post_process for chunk in chunks]
    try:
        for chunk in (
            chunks
        ):  # GPTModel then ends at the hidden states: logits of a large vocabulary would be most of the memory
            chunk.language_model.post_process = False
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None] * len(model) if len(model) > 1 else None,
            model=list(model),
            num_microbatches=len(pairs),
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    finally:
        for hook in hooks:
            hook.remove()
        for chunk, before in zip(chunks, has_output):
            chunk.language_model.post_process = before
    num_rows, width = sum(len(mask) for mask in masks), chunks[0].config.hidden_size
    return {number: _reduce_from_stage(parts, num_rows, width, groups.pp) for number, parts in pooled.items()}


def _run_decoder(chunk: torch.nn.Module, pair: Pairs) -> Tensor:
    device = torch.cuda.current_device()
    tokens = pair.tokens.to(device)
    output, _ = chunk(
        pair.images[:0].to(device),
        tokens,
        torch.arange(tokens.shape[1], device=device).expand_as(tokens),
        None,
        labels=tokens,
        loss_mask=pair.mask.float().to(device),
        sound_clips=torch.zeros(0, device=device),
    )
    return output


def _shard_mask(mask_BS: Tensor, num_states: int, chunk: LLaVAModel) -> Tensor:
    """Shard a sequence's mask to this context-parallel rank, whose tensor-parallel ranks have `num_states` states each."""
    cp, shards = chunk.pg_collection.cp, sequence_shards(chunk.config, chunk.pg_collection.tp)
    whole = torch.nn.functional.pad(mask_BS, (0, num_states * shards * cp.size() - mask_BS.shape[1]))
    return token_positions.context_parallel_part(whole, cp.size(), cp.rank())


def _broadcast_mask(pair: Pairs | None, pp_group) -> Tensor:
    # Captions start their sequences, with no image before them: their mask is the sequence's.
    return broadcast_tensors(["mask"], pair and dict(mask=pair.mask), torch.int64, pp_group)["mask"]


def _reduce_from_stage(parts: list[Tensor], num_rows: int, width: int, pp_group) -> Tensor:
    own = torch.cat(parts) if parts else torch.zeros(num_rows, width, device=torch.cuda.current_device())
    if pp_group.size() > 1:
        torch.distributed.all_reduce(own, group=pp_group)  # zeros from all stages but one
    return own
