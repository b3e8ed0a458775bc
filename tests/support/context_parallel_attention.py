"""Attention under context parallelism without Transformer Engine: plain, over gloo, on any device.

It stands where Transformer Engine's ring attention would on a machine without it, so that all that surrounds it (the split
of rows and labels, rotary positions, pooling by parts, gradients over ranks) runs for real. Each rank gathers the keys and
values of all and answers the queries of its own positions, with the whole matrix of scores: for tests, not for training.

Megatron cuts a row into 2C parts for C ranks and gives rank c parts c and 2C-1-c ("zigzag"), so that each rank has as many
pairs of positions to look at. What a position may see is told by its true place in the row.

Shapes: S positions of a row, P of them on this rank, B samples, N heads, G groups of keys, W width of a head.
"""

import types

import torch

from tests.support.adjoint_gather import all_gather_with_adjoint


def positions(rank: int, size: int, length: int) -> torch.Tensor:
    """Where in a row of `length` positions those of a context-parallel rank lie, [length / size], in the rank's order."""
    parts = torch.arange(length).chunk(2 * size)
    return torch.cat([parts[rank], parts[2 * size - 1 - rank]])


def attention(query_PBNW, key_PBGW, value_PBGW, group, *, scale: float | None = None) -> torch.Tensor:
    """What this rank's positions see of their rows, [P, B, N, W]. forward: AG of keys and values; backward: their RS."""
    size, length = group.size(), len(query_PBNW) * group.size()
    own_PB = torch.cat([key_PBGW, value_PBGW], dim=-1)  # one collective for both
    counts = [len(own_PB)] * size
    whole_SBG = all_gather_with_adjoint(own_PB.flatten(1), counts, group).view(length, *own_PB.shape[1:])
    key_SBGW, value_SBGW = whole_SBG.chunk(2, dim=-1)
    # Gathered in the order of ranks: the keys need not be sorted, only their positions known.
    key_position_S = torch.cat([positions(rank, size, length) for rank in range(size)])
    may_see_PS = positions(group.rank(), size, length)[:, None] >= key_position_S
    seen_BNPW = torch.nn.functional.scaled_dot_product_attention(
        *(x.permute(1, 2, 0, 3) for x in (query_PBNW, key_SBGW, value_SBGW)),
        attn_mask=may_see_PS.to(query_PBNW.device),
        scale=scale,
        enable_gqa=True,
    )
    return seen_BNPW.permute(2, 0, 1, 3)


class ContextParallelAttention(torch.nn.Module):
    """Causal core attention of a Megatron layer whose rows lie split over context-parallel ranks."""

    def __init__(self, config, *, attn_mask_type, attention_type, softmax_scale=None, pg_collection, **kwargs):
        super().__init__()
        assert config.attention_dropout == 0 and attention_type == "self" and attn_mask_type.name == "causal"
        self.scale, self.group = softmax_scale, pg_collection.cp

    def forward(self, query, key, value, attention_mask, packed_seq_params=None, **kwargs):
        assert attention_mask is None
        if packed_seq_params is None:  # one sequence a row, from its first position on
            return attention(query, key, value, self.group, scale=self.scale).flatten(2)
        bounds = packed_seq_params.cu_seqlens_q
        assert packed_seq_params.cu_seqlens_q_padded is bounds and not (bounds % (2 * self.group.size())).any()
        lengths = (bounds.diff() // self.group.size()).tolist()
        sequences = zip(*(x[:, None].split(lengths) for x in (query, key, value)))
        seen = [attention(*sequence, self.group, scale=self.scale)[:, 0] for sequence in sequences]
        return torch.cat(seen).flatten(1)


def partitioned_indices(bounds, length: int, size: int, rank: int) -> torch.Tensor:
    """Which positions of a packed row a rank has: of each sequence the two parts that it would have of it alone. (Transformer Engine's
    thd_get_partitioned_indices.)"""
    assert bounds[-1] == length
    return torch.cat(
        [start + positions(rank, size, end - start) for start, end in zip(bounds.tolist(), bounds[1:].tolist())]
    )


def use() -> None:
    """In this process, decoders of local layers have it, and what asks for Transformer Engine is told that it is there."""
    from megatron.core.models.multimodal import llava_model, llava_spec

    from rsa_megatron.training import arguments

    llava_spec.DotProductAttention = llava_model.TEDotProductAttention = ContextParallelAttention
    llava_model.is_te_min_version = lambda version: True
    llava_model.HAVE_TEX = True
    llava_model.tex = types.SimpleNamespace(thd_get_partitioned_indices=partitioned_indices)
    arguments.check_parallelism = lambda args: None


def in_order() -> None:
    """A mistake to be seen: attention that takes the ranks' positions for halves of the row."""
    global positions
    use()

    def positions(rank, size, length):
        return torch.arange(length).chunk(size)[rank]
