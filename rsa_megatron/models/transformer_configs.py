"""Megatron's configs of the tower, the projector and, where there are no Megatron arguments, the decoder."""

import dataclasses
from functools import partial

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from rsa_megatron.models.architectures import Architecture, VisionTower

# Whatever lays the decoder's layers out over pipeline stages, or its sequence over ranks, must not reach the
# tower: it is whole on the first stage. An uneven layout would otherwise build a tower of fewer layers, silently.
_WHOLE_ON_ONE_STAGE = dict(
    pipeline_model_parallel_size=1,
    virtual_pipeline_model_parallel_size=None,
    num_layers_in_first_pipeline_stage=None,
    num_layers_in_last_pipeline_stage=None,
    pipeline_model_parallel_layout=None,
    account_for_embedding_in_pipeline_split=False,
    account_for_loss_in_pipeline_split=False,
    microbatch_group_size_per_vp_stage=None,
    sequence_parallel=False,
    tp_comm_overlap=False,
    context_parallel_size=1,
    # Recomputed for the width and depth of these layers.
    init_method=None,
    output_layer_init_method=None,
    embedding_init_method=None,
    variable_seq_lengths=False,
)


def make_vision_config(decoder_config: TransformerConfig, vision: VisionTower) -> TransformerConfig:
    recomputed = decoder_config.recompute_num_layers
    config = dataclasses.replace(
        decoder_config,
        **_WHOLE_ON_ONE_STAGE,
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        num_query_groups=vision.num_attention_heads,
        kv_channels=vision.hidden_size // vision.num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=vision.layernorm_epsilon,
        gated_linear_unit=False,
        activation_func=partial(torch.nn.functional.gelu, approximate="tanh"),
        bias_activation_fusion=False,
        add_bias_linear=True,
        add_qkv_bias=True,
        qk_layernorm=False,
        apply_rope_fusion=False,
        recompute_num_layers=recomputed and min(recomputed, vision.num_layers),
    )
    config.vision_model_type = "siglip"  # LLaVAModel reads it from the config, which has no such field
    return config


def make_projector_config(decoder_config: TransformerConfig) -> TransformerConfig:
    return dataclasses.replace(
        decoder_config,
        **_WHOLE_ON_ONE_STAGE,
        num_layers=1,
        ffn_hidden_size=decoder_config.hidden_size,
        gated_linear_unit=False,
        activation_func=torch.nn.functional.gelu,
        bias_activation_fusion=False,
        add_bias_linear=True,
        recompute_granularity=None,
        recompute_method=None,
        recompute_num_layers=None,
    )


def make_local_decoder_config(architecture: Architecture, dtype: torch.dtype) -> TransformerConfig:
    """Make the decoder's config on one process with local layers, where there are no Megatron arguments."""
    decoder = architecture.decoder
    return TransformerConfig(
        num_layers=decoder.num_layers,
        hidden_size=decoder.hidden_size,
        ffn_hidden_size=decoder.ffn_hidden_size,
        num_attention_heads=decoder.num_attention_heads,
        num_query_groups=decoder.num_query_groups,
        normalization="RMSNorm",
        layernorm_epsilon=decoder.rmsnorm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        transformer_impl="local",
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        attention_softmax_in_fp32=True,
        use_cpu_initialization=True,
    )
