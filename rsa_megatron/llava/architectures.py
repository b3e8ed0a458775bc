"""Sizes of the models that --model names: a SigLIP-shaped vision tower, a 2-layer projector, a Qwen2-shaped decoder."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionTower:
    """A SigLIP vision transformer: no class token, learned positions, LayerNorm, tanh GELU, not causal."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    image_size: int
    """Side of the square input, pixels."""
    patch_size: int
    layernorm_epsilon: float = 1e-6

    @property
    def num_tokens(self) -> int:
        """Tokens of one tile."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class Decoder:
    """A Qwen2 decoder: RMSNorm, SwiGLU, RoPE, grouped queries, biases on q, k, v alone."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    rotary_base: int = 1_000_000
    rmsnorm_epsilon: float = 1e-6


@dataclass(frozen=True)
class Architecture:
    """One vision-language model."""

    name: str
    vision: VisionTower
    decoder: Decoder

    def megatron_defaults(self) -> dict:
        """The decoder in the names of Megatron's arguments, so that each can be overridden by its flag."""
        decoder = self.decoder
        return dict(
            num_layers=decoder.num_layers,
            hidden_size=decoder.hidden_size,
            ffn_hidden_size=decoder.ffn_hidden_size,
            num_attention_heads=decoder.num_attention_heads,
            group_query_attention=True,
            num_query_groups=decoder.num_query_groups,
            max_position_embeddings=decoder.max_position_embeddings,
            untie_embeddings_and_output_weights=not decoder.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=decoder.rotary_base,
            normalization="RMSNorm",
            layernorm_epsilon=decoder.rmsnorm_epsilon,
            swiglu=True,
            add_bias_linear=False,
            add_qkv_bias=True,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )


_ARCHITECTURES = [
    # Small enough to train in minutes on two CPU cores; 8 decoder layers so that two interleaved pipeline
    # stages of two chunks each hold two, heads and groups even so that tensor parallelism can halve them.
    Architecture(
        name="demo",
        vision=VisionTower(
            num_layers=4, hidden_size=128, ffn_hidden_size=512, num_attention_heads=4, image_size=84, patch_size=14
        ),
        decoder=Decoder(
            num_layers=4,
            hidden_size=128,
            ffn_hidden_size=384,
            num_attention_heads=4,
            num_query_groups=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        ),
    ),
]
ARCHITECTURES = {architecture.name: architecture for architecture in _ARCHITECTURES}


def get_architecture(name: str) -> Architecture:
    """The architecture of that name; ValueError names the known ones."""
    if name not in ARCHITECTURES:
        raise ValueError(f"--model {name}: unknown; choose one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]
