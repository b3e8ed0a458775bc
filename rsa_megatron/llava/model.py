"""LLaVA on Megatron's LLaVAModel: a SigLIP tower, an MLP projector and a Qwen2 decoder.

LLaVAModel would build the tower itself, with a norm at its end that needs Transformer Engine and that
LLaVA-OneVision does not use. So it is built without an encoder and given ours, of Megatron's own classes.
"""

import dataclasses
from collections.abc import Iterable
from functools import partial

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig

from rsa_megatron.llava.architectures import Architecture, VisionTower
from rsa_megatron.llava.layer_specs import layer_specs


def build_llava(
    architecture: Architecture,
    decoder_config: TransformerConfig,
    *,
    vocab_size: int,
    max_sequence_length: int,
    image_token_index: int,
    tie_word_embeddings: bool,
    rotary_base: int,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> LLaVAModel:
    """This rank's part of the model (a chunk of it, under interleaved pipelines).

    Args:
        architecture: sizes of the tower; the decoder's come from decoder_config.
        decoder_config: Megatron's config, as made from its flags; the tower's and projector's are derived from it.
        vocab_size: rows of the word embeddings, padding included.
        max_sequence_length: longest row, image tokens included. Longer rows are cut by LLaVAModel.
        image_token_index: the token id at which an image's tokens are put in.
        tie_word_embeddings: the output layer's weight is the word embeddings'.
        rotary_base: of the decoder's rotary position embedding.
        pre_process: this is the first pipeline stage: it holds the tower, the projector and the embeddings.
        post_process: this is the last one: it holds the output layer.
        vp_stage: which of this rank's chunks, under interleaved pipelines.
        pg_collection: process groups; Megatron's global ones where there is none.
    """
    vision_spec, decoder_spec, projector_spec = layer_specs(decoder_config.transformer_impl)
    vision, vision_config = architecture.vision, _vision_config(decoder_config, architecture.vision)
    projector_config = _projector_config(decoder_config)
    model = LLaVAModel(
        language_transformer_config=decoder_config,
        language_transformer_layer_spec=decoder_spec,
        language_vocab_size=vocab_size,
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
        img_h=vision.image_size,
        img_w=vision.image_size,
        patch_dim=vision.patch_size,
        image_token_index=image_token_index,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
    # Megatron has no pipeline stages of the tower's own: it goes whole with the first decoder layers.
    model.add_encoder = pre_process
    if pre_process:
        model._drop_vision_class_token = False
        model.vision_model = CLIPViTModel(
            vision_config,
            vision_spec,
            ln_post_impl=IdentityOp,  # LLaVA-OneVision takes the last layer's tokens as they leave it
            add_class_token=False,
            class_token_len=0,
            patch_dim=vision.patch_size,
            img_h=vision.image_size,
            img_w=vision.image_size,
            model_subtype="siglip",
            pg_collection=model.pg_collection,
        )
        model.vision_projection = MultimodalProjector(
            projector_config, projector_spec, "mlp", vision.hidden_size, tp_group=model.pg_collection.tp
        )
        num_built = len(model.vision_model.decoder.layers)
        assert num_built == vision.num_layers, (
            f"the vision tower has {num_built} layers instead of {vision.num_layers}: "
            "a pipeline setting of the decoder reached its config"
        )
    return model


#: The parts that --trainable names, and where they are in the model.
PARTS = {
    "vision": ("vision_model.",),
    "projector": ("vision_projection.",),
    "embeddings": ("language_model.embedding.",),
    "language": ("language_model.decoder.", "language_model.output_layer."),
}


def part_of(parameter_name: str, parameter: torch.nn.Parameter) -> str:
    """The part that a parameter of the model belongs to."""
    if getattr(parameter, "shared_embedding", False):
        return "embeddings"  # the last stage's copy of tied word embeddings is called output_layer
    return next(part for part, prefixes in PARTS.items() if parameter_name.startswith(prefixes))


def set_trainable(model: LLaVAModel, trainable: Iterable[str]) -> None:
    """Freeze all parts but those named."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = part_of(name, parameter) in trainable


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
    # Set anew for the width and depth of these layers.
    init_method=None,
    output_layer_init_method=None,
    embedding_init_method=None,
    variable_seq_lengths=False,
)


def _vision_config(decoder_config: TransformerConfig, vision: VisionTower) -> TransformerConfig:
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


def _projector_config(decoder_config: TransformerConfig) -> TransformerConfig:
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
