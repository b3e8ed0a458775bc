"""How well the two backbones agree, on validation pairs, while the model is trained.

Shapes: N pairs, B samples a micro-batch, D and E widths of v and t.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed
from torch import Tensor

from rsa_megatron.alignment.gather import gather_rows
from rsa_megatron.alignment.metrics import MUTUAL_KNN, describe_too_few, find_chance
from rsa_megatron.alignment.nearest_neighbours import nearest_neighbours, shared_neighbours
from rsa_megatron.alignment.shuffled_pairs import draw_orders, score_with_shuffled
from rsa_megatron.batch import LlavaBatch
from rsa_megatron.evaluation.megatron_features import (
    Pairs,
    caption_vectors_of_layers,
    image_vectors,
    unwrap_chunks,
)
from rsa_megatron.hooks.layer_hooks import layer_number

#: A layer of the tower and one of the decoder; -1 is the last (paper, section 3.2), 0 what goes into the first.
LayerPair = tuple[int, int]


@dataclass(frozen=True)
class Score:
    value: float
    #: of pairs that are none: k / (N - 1) of mutual-kNN, else the mean over shuffled pairs
    chance: float


def read_pairs(
    model: list[torch.nn.Module],
    batches: Iterator[LlavaBatch] | None,
    *,
    num_samples: int,
    micro_batch_size: int,
    base_tile: str = "first",
) -> list[Pairs | None]:
    """Read what to measure on, micro-batch by micro-batch, into host memory: once, for every evaluation.

    Every rank must call it. A micro-batch is None on the stages between the first and the last. Images are stored where the
    tower is, in its type: 1000 of 384 x 384 in bfloat16 are 0.9 GB, divided by the data-parallel size, on each
    tensor-parallel rank.

    Args:
        batches: the samples, each once; None where this rank reads no data.
        num_samples: how many to read, over all data-parallel ranks; fewer where there are fewer.
        base_tile: which tile of an image is the whole picture, "first" or "last" (RSAConfig.base_tile).
    """
    chunks = unwrap_chunks(model)
    groups = chunks[0].pg_collection
    first = next((chunk for chunk in chunks if chunk.pre_process), None)
    needs_data = any(chunk.pre_process or chunk.post_process for chunk in chunks)
    wanted = -(-num_samples // (micro_batch_size * groups.dp.size()))
    reads = needs_data and groups.tp.rank() == 0
    # Only captions and base images are stored: a batch's other tiles may be gigabytes.
    own = [_separate(batch, base_tile) for batch in islice(batches, wanted)] if reads else []
    smallest = torch.tensor([len(own) if reads else wanted], device=torch.cuda.current_device())
    torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN)
    own = own[: int(smallest)] if reads else [None] * int(smallest)
    if len(model) > 1 and own:
        # Interleaved schedules take a multiple of the pipeline's size: what is missing is made up, and does not count.
        own += [own[0] and own[0].mark_ineligible()] * (-len(own) % groups.pp.size())
    if not needs_data:
        return own
    dtype = next(first.vision_model.parameters()).dtype if first else None
    return [Pairs.broadcast(pair, groups.tp).to_host(dtype) for pair in own]


def measure_alignment(
    model: list[torch.nn.Module],
    pairs: list[Pairs | None],
    *,
    num_samples: int,
    micro_batch_size: int,
    seq_length: int,
    k: int,
    layer_pairs: Sequence[LayerPair] = ((-1, -1),),
    metrics: Sequence[str] = (MUTUAL_KNN,),
) -> tuple[dict[tuple[str, LayerPair], Score | str], int] | None:
    """Score alignment between layers, image only against caption only (paper, eq. 9 and section 4.1).

    Every rank must call it. Only eligible samples count: one image, one caption.

    Args:
        model: this rank's chunks, as Megatron holds them, in evaluation mode.
        pairs: of read_pairs.
        num_samples: how many of them count, over all data-parallel ranks.
        micro_batch_size, seq_length: as in training; the pipeline's shapes.
        k: neighbours, for the metrics that have some.
        layer_pairs: which layers of tower and decoder to compare.
        metrics: names of alignment.metrics.METRICS.

    Returns:
        The score of each metric and pair of layers, and the number of samples they were taken over, on ranks of the last
        pipeline stage; else None. Where a metric says nothing (too few samples, all vectors of a layer equal), why.
    """
    chunks = unwrap_chunks(model)
    groups = chunks[0].pg_collection
    first = next((chunk for chunk in chunks if chunk.pre_process), None)
    last = next((chunk for chunk in chunks if chunk.post_process), None)
    wanted = [(metric, pair) for metric in metrics for pair in layer_pairs]
    if not pairs:
        return ({(metric, pair): describe_too_few(metric, k, 0) for metric, pair in wanted}, 0) if last else None
    depth = chunks[0].config.num_layers
    text_numbers = sorted({layer_number(text, depth) for _, text in layer_pairs})
    t_NE = caption_vectors_of_layers(
        model, pairs, text_numbers, micro_batch_size=micro_batch_size, seq_length=seq_length
    )
    num_vision_layers = _broadcast_from_first_stage(
        len(first.vision_model.decoder.layers) if first else None, groups.pp
    )
    numbers = sorted({layer_number(vision, num_vision_layers) for vision, _ in layer_pairs})
    v_ND = _compute_image_vectors(first, pairs, numbers, len(pairs) * micro_batch_size, groups.pp)
    if last is None:
        return None
    valid_N = torch.cat([(pair.eligible_B > 0) & (pair.mask.sum(dim=1) > 0) for pair in pairs])
    valid_N = valid_N.to(torch.cuda.current_device())

    def gather(vectors: dict[int, Tensor]) -> dict[int, Tensor]:
        return {number: gather_rows(x_nW, valid_N, groups.dp)[0][:num_samples] for number, x_nW in vectors.items()}

    vision, text = gather(v_ND), gather(t_NE)
    num_pairs = len(next(iter(vision.values())))
    scores = {}
    for metric in metrics:
        few = describe_too_few(metric, k, num_pairs)
        if few:
            scores |= {(metric, pair): few for pair in layer_pairs}
            continue
        # Neighbours once a layer, not once a pair of layers.
        prepare, score = _NEIGHBOURS if metric == MUTUAL_KNN else (_get_rows, _score_beside_chance)
        of_vision = {number: _try(prepare, x_ND, k) for number, x_ND in vision.items()}
        of_text = {number: _try(prepare, x_NE, k) for number, x_NE in text.items()}
        for pair in layer_pairs:
            sides = of_vision[layer_number(pair[0], num_vision_layers)], of_text[layer_number(pair[1], depth)]
            reasons = [side for side in sides if isinstance(side, str)]
            scores[metric, pair] = reasons[0] if reasons else _try(score, metric, *sides, k)
    return scores, num_pairs


def _score_lists(metric: str, a_Nk: Tensor, b_Nk: Tensor, k: int) -> Score:
    return Score(shared_neighbours(a_Nk, b_Nk), find_chance(metric, k, len(a_Nk)))


def _score_beside_chance(metric: str, a_ND: Tensor, b_NE: Tensor, k: int) -> Score | str:
    value, shuffled = score_with_shuffled(metric, a_ND, b_NE, k, draw_orders(metric, len(a_ND)))
    return Score(value, sum(shuffled) / len(shuffled)) if math.isfinite(value) else "no finite value"


_NEIGHBOURS = nearest_neighbours, _score_lists


def _get_rows(rows_ND: Tensor, k: int) -> Tensor:
    return rows_ND


def _try(function, *arguments):
    """Return what it returns, or the reason why a space allows no score, such as one that has collapsed. Training continues."""
    try:
        return function(*arguments)
    except ValueError as error:
        return str(error)


def _separate(batch: LlavaBatch, base_tile: str) -> Pairs:
    """Take the captions out of their sequences and the base images out of the tiles."""
    captions = [row[mask > 0] for row, mask in zip(batch.tokens, batch.rsa.caption_mask)]
    images = torch.zeros(len(captions), *batch.images.shape[1:])
    has_image = batch.rsa.num_tiles > 0
    last = batch.rsa.num_tiles.cumsum(0) - 1
    base = last if base_tile == "last" else last - batch.rsa.num_tiles + 1
    images[has_image] = batch.images[base[has_image]]
    return Pairs.of(images, captions, batch.rsa.eligible)


def _compute_image_vectors(first, pairs, layers: list[int], num_rows: int, pp_group) -> dict[int, Tensor]:
    """Compute v after each layer, [n, D], on every stage."""
    device = torch.cuda.current_device()
    of_pairs = [image_vectors(first, pair.images.to(device), layers) for pair in pairs] if first else []
    vectors = {number: torch.cat([pair[number] for pair in of_pairs]) for number in layers} if first else {}
    if pp_group.size() == 1:
        return vectors
    width = _broadcast_from_first_stage(vectors[layers[0]].shape[1] if first else None, pp_group)
    for number in layers:
        vectors.setdefault(number, torch.empty(num_rows, width, device=device))
        torch.distributed.broadcast(
            vectors[number], torch.distributed.get_process_group_ranks(pp_group)[0], group=pp_group
        )
    return vectors


def _broadcast_from_first_stage(number: int | None, pp_group) -> int:
    if pp_group.size() == 1:
        return number
    value = torch.tensor([number or 0], device=torch.cuda.current_device())
    torch.distributed.broadcast(value, torch.distributed.get_process_group_ranks(pp_group)[0], group=pp_group)
    return int(value)
