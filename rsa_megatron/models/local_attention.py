"""The attention of local layers by PyTorch's scaled_dot_product_attention, whose fused kernels make no matrix of scores.

Megatron's own makes the scores of every head, [B, heads, S, S], and keeps their softmax for the backward pass, in fp32 and once more
in bf16: of a sequence of 8192 positions 5.6 GB a layer of the 0.5B. (PyTorch has such kernels for CPUs, and for bf16 and fp16 on GPUs since
Ampere; elsewhere, with grouped queries, it makes scores too.) What this does not do (a mask of its own, windows, dropout, softmax offsets,
packed sequences, keys from a cache) goes to Megatron's, of which this is a subclass.

Shapes: S positions, B samples, N heads and G groups of keys of this tensor-parallel rank, W width of a head.
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
        """Attend: [S, B, N * W] of query [S, B, N, W], key and value [S, B, G, W]."""
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

    def _is_plain(self, query, key, attention_mask, attention_bias=None, packed_seq_params=None) -> bool:
        config = self.config
        return (
            attention_mask is None
            and attention_bias is None
            and packed_seq_params is None
            and len(query) == len(key)
            and self.attn_mask_type in (AttnMaskType.causal, AttnMaskType.no_mask)
            and not (self.training and self.attention_dropout.p > 0)
            and not config.apply_query_key_layer_scaling
            and self.softmax_offset is None
            and self.scale_mask_softmax.window_size is None
        )
