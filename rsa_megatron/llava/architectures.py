"""Sizes of the models that --model names: a SigLIP-shaped vision tower, a 2-layer projector, a Qwen2-shaped decoder."""

import dataclasses
from collections.abc import Mapping
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

    def with_arguments(self, arguments: Mapping[str, object]) -> "Architecture":
        """The architecture that is built once flags have overridden the decoder's sizes."""
        names = ("num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups "
                 "max_position_embeddings").split()  # fmt: skip
        sizes = {name: arguments[name] for name in names}
        sizes["tie_word_embeddings"] = not arguments["untie_embeddings_and_output_weights"]
        return dataclasses.replace(self, decoder=dataclasses.replace(self.decoder, **sizes))

    def parameter_counts(self, vocab_size: int) -> dict[str, int]:
        """Parameters of each part, as --trainable names them; vocab_size counts padding rows."""
        vision, decoder = self.vision, self.decoder
        width, ffn = vision.hidden_size, vision.ffn_hidden_size
        patches = 3 * vision.patch_size**2 * width + width
        # attention: q, k, v, out with biases; MLP: two matrices with biases; two norms of weight and bias
        vision_layer = 4 * (width**2 + width) + (2 * width * ffn + ffn + width) + 4 * width
        hidden = decoder.hidden_size
        projector = width * hidden + hidden + hidden**2 + hidden
        head = hidden // decoder.num_attention_heads
        qkv = hidden + 2 * decoder.num_query_groups * head
        # q, k, v with biases, out without; gate, up, down; two norms of one weight
        decoder_layer = qkv * (hidden + 1) + hidden**2 + 3 * hidden * decoder.ffn_hidden_size + 2 * hidden
        output_layer = 0 if decoder.tie_word_embeddings else vocab_size * hidden
        return {
            "vision": patches + vision.num_tokens * width + vision.num_layers * vision_layer,
            "projector": projector,
            "embeddings": vocab_size * hidden,
            "language": decoder.num_layers * decoder_layer + hidden + output_layer,
        }

    def check_layout(self, *, tensor: int, pipeline: int, chunks: int = 1) -> None:
        """Raise ValueError, naming flag and remedy, if the model cannot be split so.

        Args:
            tensor, pipeline: sizes of tensor and pipeline parallelism.
            chunks: chunks of each pipeline stage (virtual stages).
        """
        for what, size in (
            ("the tower's attention heads", self.vision.num_attention_heads),
            ("the tower's FFN width", self.vision.ffn_hidden_size),
            ("the decoder's attention heads", self.decoder.num_attention_heads),
            ("the decoder's query groups", self.decoder.num_query_groups),
            ("the decoder's FFN width", self.decoder.ffn_hidden_size),
        ):
            if size % tensor:
                raise ValueError(f"--tensor-model-parallel-size {tensor} does not divide {what}, {size}")
        if self.decoder.num_layers < pipeline * chunks:
            raise ValueError(
                f"--pipeline-model-parallel-size {pipeline} with {chunks} chunk(s) a stage needs as many decoder "
                f"layers as chunks; {self.name} has {self.decoder.num_layers}"
            )


_ARCHITECTURES = [
    # Small enough to train in minutes on two CPU cores. Two pipeline stages of two chunks hold a layer each, tensor
    # parallelism can halve heads and groups, and the tower is wider than the decoder: v takes two carrier rows.
    Architecture(
        name="demo",
        vision=VisionTower(
            num_layers=4, hidden_size=160, ffn_hidden_size=640, num_attention_heads=4, image_size=84, patch_size=14
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
