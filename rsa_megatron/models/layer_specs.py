"""Transformer layers of the tower, the projector and the decoder: Megatron's own, local or Transformer Engine's."""

import copy

from megatron.core.extensions.transformer_engine import HAVE_TE, TEColumnParallelLinear, TERowParallelLinear
from megatron.core.models.multimodal.llava_spec import (
    decoder_model_with_local_default_spec,
    decoder_model_with_transformer_engine_default_spec,
)
from megatron.core.models.vision.vit_layer_specs import (
    get_vit_layer_with_local_spec,
    get_vit_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from rsa_megatron.models.local_attention import LocalAttention

# Transformer Engine's linear layers hold the norm before them. Local layers store theirs under those names,
# so that a checkpoint written with one implementation loads with the other.
_STORED_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


#: Megatron arguments, by their names in the parsed namespace, whose defaults need kernels of Transformer Engine or apex.
LOCAL_ARGUMENTS = dict(
    transformer_impl="local",
    gradient_accumulation_fusion=False,
    masked_softmax_fusion=False,
    bias_gelu_fusion=False,
    bias_swiglu_fusion=False,
    bias_dropout_fusion=False,
    apply_rope_fusion=False,
    no_persist_layer_norm=True,
    attention_softmax_in_fp32=True,
)


def layer_specs(transformer_impl: str) -> tuple[ModuleSpec, ModuleSpec, MLPSubmodules]:
    """Return the specs of a vision layer, a decoder layer and the projector for --transformer-impl.

    Raises:
        ValueError: another implementation, or Transformer Engine where it is not installed.
    """
    if transformer_impl == "transformer_engine":
        if not HAVE_TE:
            raise ValueError(
                "--transformer-impl transformer_engine: Transformer Engine is not installed; install it "
                "(pip install 'rsa-megatron[te]' on a machine with CUDA) or pass --transformer-impl local"
            )
        projector = MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
        return (
            get_vit_layer_with_transformer_engine_spec(),
            decoder_model_with_transformer_engine_default_spec(),
            projector,
        )
    if transformer_impl != "local":
        raise ValueError(f"--transformer-impl {transformer_impl}: choose local or transformer_engine")
    specs = [get_vit_layer_with_local_spec(), decoder_model_with_local_default_spec()]
    for spec in specs:
        spec.submodules.sharded_state_dict_keys_map = copy.copy(_STORED_NAMES)
        attention = spec.submodules.self_attention.submodules
        if attention.core_attention is DotProductAttention:
            attention.core_attention = LocalAttention
    return *specs, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
