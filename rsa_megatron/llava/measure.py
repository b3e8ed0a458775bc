"""How well the two backbones agree, measured on a model in whatever layout it trains.

An image goes alone through the tower, its caption alone through the decoder. In the training pass the caption's
states have seen the image through attention: they share neighbours with it whether or not anything was learnt, so
nothing is read there.

Shapes: B samples a micro-batch, S caption tokens, D and E widths of v and t.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from rsa_megatron.alignment.gather import gather_rows
from rsa_megatron.alignment.metrics import mutual_knn
from rsa_megatron.alignment.pooling import pool_tiles
from rsa_megatron.batch import LlavaBatch
from rsa_megatron.llava.broadcast import broadcast_tensors
from rsa_megatron.llava.objective import caption_vectors


@torch.no_grad()
def measure_mutual_knn(
    model: list[torch.nn.Module],
    batches: Iterator[LlavaBatch] | None,
    *,
    num_samples: int,
    micro_batch_size: int,
    seq_length: int,
    k: int,
    base_tile: str = "first",
) -> tuple[float, int] | None:
    """mutual-kNN between last layers, image alone against caption alone (paper, eq. 9 and section 4.1).

    Every rank must call it. Only eligible samples count: one image, one caption.

    Args:
        model: this rank's chunks, as Megatron holds them, in evaluation mode.
        batches: the samples to measure on, each once; None where this rank reads no data.
        num_samples: how many to read, over all data-parallel ranks; fewer where there are fewer.
        micro_batch_size, seq_length: as in training; the pipeline's shapes.
        k: neighbours.
        base_tile: which tile of an image is the whole picture, "first" or "last" (RSAConfig.base_tile).

    Returns:
        The score and the number of pairs it was taken over, on ranks of the last pipeline stage; else None.
        With k pairs or fewer there is no score: nan.
    """
    chunks = [get_attr_wrapped_model(chunk, "image_token_index", return_model_obj=True) for chunk in model]
    groups = chunks[0].pg_collection
    first = next((chunk for chunk in chunks if chunk.pre_process), None)
    last = next((chunk for chunk in chunks if chunk.post_process), None)
    pairs = _read(batches, -(-num_samples // (micro_batch_size * groups.dp.size())), first or last, groups, base_tile)
    if not pairs:
        return (float("nan"), 0) if last else None
    v_ND = torch.cat([_image_vectors(first, pair) for pair in pairs]) if first else None
    v_ND = _from_first_stage(v_ND, len(pairs) * micro_batch_size, groups.pp)
    vectors = _caption_vectors(model, last, pairs, micro_batch_size, seq_length)
    if last is None:
        return None
    t_NE, count_N = (torch.cat(parts) for parts in zip(*vectors))
    valid_N = (torch.cat([pair.eligible_B for pair in pairs]) > 0) & (count_N > 0)
    gathered, _ = gather_rows(torch.cat([v_ND, t_NE], dim=1), valid_N, groups.dp)
    v_ND, t_NE = gathered.split([v_ND.shape[1], t_NE.shape[1]], dim=1)
    v_ND, t_NE = v_ND[:num_samples], t_NE[:num_samples]
    num_pairs = v_ND.shape[0]
    return (mutual_knn(v_ND, t_NE, k) if num_pairs > k else float("nan")), num_pairs


@dataclass
class _Pairs:
    """One micro-batch: images and captions, each for itself. A sample that is not eligible keeps a dummy's place."""

    #: base image of each sample, [B, 3, height, width]
    images: Tensor
    #: caption tokens from the left, [B, S], and 1 where there is one
    tokens: Tensor
    mask: Tensor
    eligible_B: Tensor


def _read(batches, wanted: int, needs_data: bool, groups: ProcessGroupCollection, base_tile: str) -> list[_Pairs]:
    """Up to `wanted` micro-batches, as many on every rank; nothing but their number on ranks between the stages."""
    reads = needs_data and groups.tp.rank() == 0
    # The captions and base images alone are kept: a batch's other tiles may be gigabytes.
    raw = [_separate(batch, base_tile) for batch in islice(batches, wanted)] if reads else []
    smallest = torch.tensor([len(raw) if reads else wanted], device=torch.cuda.current_device())
    torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN)
    raw = raw[: int(smallest)] if reads else [None] * int(smallest)
    return [_share(separated, groups.tp) for separated in raw] if needs_data else raw


def _share(separated: tuple[dict, dict] | None, tp_group) -> _Pairs:
    integers, floats = separated or (None, None)
    integers = broadcast_tensors(["tokens", "mask", "eligible"], integers, torch.int64, tp_group)
    images = broadcast_tensors(["images"], floats, torch.float32, tp_group)["images"]
    return _Pairs(images, integers["tokens"], integers["mask"], integers["eligible"])


def _separate(batch: LlavaBatch, base_tile: str) -> tuple[dict, dict]:
    """Take the captions out of their rows and the base images out of the tiles."""
    captions = [row[mask > 0] for row, mask in zip(batch.tokens, batch.rsa.caption_mask)]
    tokens = torch.zeros(len(captions), max(1, *map(len, captions)), dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, caption in enumerate(captions):
        tokens[row, : len(caption)], mask[row, : len(caption)] = caption, 1
    images = torch.zeros(len(captions), *batch.images.shape[1:])
    has_image = batch.rsa.num_tiles > 0
    last = batch.rsa.num_tiles.cumsum(0) - 1
    base = last if base_tile == "last" else last - batch.rsa.num_tiles + 1
    images[has_image] = batch.images[base[has_image]]
    return dict(tokens=tokens, mask=mask, eligible=batch.rsa.eligible), dict(images=images)


def _image_vectors(first: LLaVAModel, pair: _Pairs) -> Tensor:
    tower = first.vision_model
    tokens_BPD = tower(pair.images.to(next(tower.parameters()).dtype))
    return pool_tiles(tokens_BPD, torch.eye(len(pair.images), device=tokens_BPD.device))


def _from_first_stage(v_ND: Tensor | None, num_rows: int, pp_group) -> Tensor:
    if pp_group.size() == 1:
        return v_ND
    source = torch.distributed.get_process_group_ranks(pp_group)[0]
    width = torch.tensor([v_ND.shape[1] if v_ND is not None else 0], device=torch.cuda.current_device())
    torch.distributed.broadcast(width, source, group=pp_group)
    if v_ND is None:
        v_ND = torch.empty(num_rows, int(width), device=torch.cuda.current_device())
    torch.distributed.broadcast(v_ND, source, group=pp_group)
    return v_ND


def _caption_vectors(model, last, pairs, micro_batch_size, seq_length) -> list[tuple[Tensor, Tensor]]:
    """(t, number of tokens) of each micro-batch, through Megatron's own forward-only schedule; on the last stage."""
    read_state = []
    if last:
        hook = last.language_model.decoder.register_forward_hook(
            lambda module, args, output: read_state.append(output[0] if isinstance(output, tuple) else output)
        )

    def forward_step(data_iterator, chunk):
        llava = get_attr_wrapped_model(chunk, "image_token_index", return_model_obj=True)
        if not (llava.pre_process or llava.post_process):
            return chunk(None, None, None, None)[0], None
        pair = next(data_iterator)
        output, mask_BL = chunk(
            pair.images[:0],
            pair.tokens,
            torch.arange(pair.tokens.shape[1], device=pair.tokens.device).expand_as(pair.tokens),
            None,
            labels=pair.tokens,  # only so that the mask is laid out as the row is
            loss_mask=pair.mask.float(),
            sound_clips=pair.images.new_zeros(0),
        )
        return output, lambda output, non_loss_data: caption_vectors(
            read_state.pop(), mask_BL, llava.config, llava.pg_collection
        )

    iterators = [iter(pairs) for _ in model]
    vectors = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model,
        num_microbatches=len(pairs),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if last:
        hook.remove()
    return vectors
