"""Attention that takes packed sequences, as Transformer Engine's does and Megatron's local one does not.

It stands where Transformer Engine would on a machine without it, so that what surrounds it (packing, rotary positions that
begin anew, pipeline, recomputation) runs for real. Each sequence goes through Megatron's local attention.
"""

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention


class PackedAttention(torch.nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
        self.one_sequence = DotProductAttention(*args, **kwargs)

    def forward(self, query, key, value, attention_mask, packed_seq_params=None, **kwargs):
        if packed_seq_params is None:
            return self.one_sequence(query, key, value, attention_mask, **kwargs)
        assert attention_mask is None and packed_seq_params.qkv_format == "thd"
        outputs = []
        for start, end in zip(
            packed_seq_params.cu_seqlens_q[:-1].tolist(), packed_seq_params.cu_seqlens_q[1:].tolist()
        ):
            if end > start:
                one = (part[start:end, None] for part in (query, key, value))
                outputs.append(self.one_sequence(*one, None, **kwargs)[:, 0])
        return torch.cat(outputs)


def use() -> None:
    """In this process, decoders of local layers have it."""
    from megatron.core.models.multimodal import llava_model

    from rsa_megatron.models import layer_specs

    llava_model.TEDotProductAttention = PackedAttention  # LLaVAModel asks for it under sequence parallelism

    right = layer_specs.decoder_model_with_local_default_spec

    def with_packed_attention():
        spec = right()
        spec.submodules.self_attention.submodules.core_attention = PackedAttention
        return spec

    layer_specs.decoder_model_with_local_default_spec = with_packed_attention
