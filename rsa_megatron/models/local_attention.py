"""The attention of local layers by PyTorch's scaled_dot_product_attention, whose fused kernels make no matrix of scores.

Megatron's own makes the scores of every head, [B, heads, S, S], and keeps their softmax for the backward pass, in fp32 and once more
in bf16: of a sequence of 8192 positions 5.6 GB a layer of the 0.5B. (PyTorch has such kernels for CPUs, and for bf16 and fp16 on GPUs since
Ampere; elsewhere, with grouped queries, it makes scores too.) What this does not do (a mask of its own, windows, dropout, softmax offsets,
keys from a cache) goes to Megatron's, of which this is a subclass.

The sequences of a packed row go one by one, so that no pair of positions of two sequences is ever computed. Megatron's own takes no
packed rows.

Shapes: S positions, B samples, N heads and G groups of keys of this tensor-parallel rank, W width of a head, T positions of a packed row.
"""

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor


class LocalAttention(DotProductAttention):
    """Core attention of a Megatron layer, with DotProductAttention's arguments."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **rest,
    ) -> Tensor:
        """Attend: [S, B, N * W] of query [S, B, N, W], key and value [S, B, G, W].

        Of a packed row (packed_seq_params) [T, N * W] of query [T, N, W], key and value [T, G, W].
        """
        if (packed := rest.pop("packed_seq_params", None)) is not None:
            return self._attend_by_sequence(query, key, value, packed, attention_mask, **rest)
        if not self._is_plain(query, key, attention_mask, **rest):
            return super().forward(query, key, value, attention_mask, attn_mask_type=attn_mask_type, **rest)
        # (As in DotProductAttention the layer's own type of mask counts.)
        seen_BNSW = torch.nn.functional.scaled_dot_product_attention(
            *(x.permute(1, 2, 0, 3) for x in (query, key, value)),
            is_causal=self.attn_mask_type == AttnMaskType.causal,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return seen_BNSW.permute(2, 0, 1, 3).flatten(2)

    def _attend_by_sequence(self, query, key, value, packed, attention_mask, attention_bias=None) -> Tensor:
        if packed.qkv_format != "thd" or attention_mask is not None or attention_bias is not None:
            raise ValueError(
                "--transformer-impl local: the sequences of a packed row (qkv_format thd) are kept apart without a mask or bias; pass none"
            )
        # (Of a script's own parameters the bounds are read from the device, padding behind each sequence included.)
        bounds = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
        lengths = getattr(packed, "sequence_lengths", None) or bounds.diff().tolist()
        lengths = [*lengths, len(query) - sum(lengths)]  # the last: padding, which nothing reads
        *sequences, _ = zip(*(x[:, None].split(lengths) for x in (query, key, value)))
        seen = [self.forward(*sequence, None)[:, 0] for sequence in sequences if len(sequence[0])]
        return torch.cat([*seen, query.new_zeros(lengths[-1], seen[0].shape[1])])

    def _is_plain(self, query, key, attention_mask, attention_bias=None) -> bool:
        config = self.config
        return (
            attention_mask is None
            and attention_bias is None
            and len(query) == len(key)
            and self.attn_mask_type in (AttnMaskType.causal, AttnMaskType.no_mask)
            and not (self.training and self.attention_dropout.p > 0)
            and not config.apply_query_key_layer_scaling
            and self.softmax_offset is None
            and self.scale_mask_softmax.window_size is None
        )
