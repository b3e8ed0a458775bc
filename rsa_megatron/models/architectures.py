"""Sizes of the models that --model names: a SigLIP-shaped vision tower, a 2-layer projector, a Qwen2-shaped decoder."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rsa_megatron.models.folder_kinds import find_run, is_hf_folder


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
    def tokens_per_side(self) -> int:
        """Tokens along a side of one tile; pixels that fill no patch are dropped."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class Decoder:
    """A Qwen2 decoder: RMSNorm, SwiGLU, RoPE, grouped queries, biases only on q, k, v."""

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
    #: rows of the word embeddings without padding; ids of the tokenizer lie below
    vocab_size: int
    #: AnyRes: the grids to choose from, (height, width) in pixels, and how many tiles' tokens a grid may keep
    grid_pinpoints: tuple[tuple[int, int], ...]
    max_tiles: int = 9
    #: width of precomputed image embeddings, which bypass the tower; None for the tower's width
    image_embedding_width: int | None = None

    @property
    def projector_input_width(self) -> int:
        return self.image_embedding_width or self.vision.hidden_size

    def megatron_defaults(self) -> dict:
        """Return the decoder in the names of Megatron's arguments, so that each can be overridden by its flag."""
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
            # The rows of published checkpoints divide by every usual size of tensor parallelism: no padding.
            make_vocab_size_divisible_by=1,
        )

    def with_arguments(self, arguments: Mapping[str, object]) -> "Architecture":
        """Return the architecture after flags have overridden the decoder's sizes."""
        names = (
            "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups "
            "max_position_embeddings rotary_base"
        ).split()
        sizes = {name: arguments[name] for name in names}
        sizes["rmsnorm_epsilon"] = arguments["layernorm_epsilon"]
        sizes["tie_word_embeddings"] = not arguments["untie_embeddings_and_output_weights"]
        decoder = dataclasses.replace(self.decoder, **sizes)
        return dataclasses.replace(self, decoder=decoder, image_embedding_width=arguments.get("image_embedding_width"))

    def parameter_counts(self) -> dict[str, dict[str, int]]:
        """Count the parameters of each module, as --trainable names them, piece by piece; without padding rows of the vocabulary."""
        vision, decoder = self.vision, self.decoder
        width, ffn = vision.hidden_size, vision.ffn_hidden_size
        # attention: q, k, v, out with biases; MLP: two matrices with biases; two norms of weight and bias
        vision_layer = 4 * (width**2 + width) + (2 * width * ffn + ffn + width) + 4 * width
        hidden = decoder.hidden_size
        head = hidden // decoder.num_attention_heads
        qkv = hidden + 2 * decoder.num_query_groups * head
        # q, k, v with biases, out without; gate, up, down; two norms of one weight
        decoder_layer = qkv * (hidden + 1) + hidden**2 + 3 * hidden * decoder.ffn_hidden_size + 2 * hidden
        return {
            "vision": {
                "patches": 3 * vision.patch_size**2 * width + width,
                "positions": vision.tokens_per_side**2 * width,
                f"{vision.num_layers} layers": vision.num_layers * vision_layer,
            },
            "projector": {
                "two linear layers": self.projector_input_width * hidden + hidden + hidden**2 + hidden,
                "image_newline": hidden,
            },
            "embeddings": {f"{self.vocab_size:,} rows": self.vocab_size * hidden},
            "language": {
                f"{decoder.num_layers} layers": decoder.num_layers * decoder_layer,
                "norm": hidden,
                "output layer": 0 if decoder.tie_word_embeddings else self.vocab_size * hidden,
            },
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


def square_grids(tile_size: int, most_rows: int, most_columns: int) -> tuple[tuple[int, int], ...]:
    """List every grid of tiles up to a number of rows and columns, (height, width) in pixels."""
    return tuple(
        (tile_size * rows, tile_size * columns)
        for rows in range(1, most_rows + 1)
        for columns in range(1, most_columns + 1)
    )


# google/siglip-so400m-patch14-384 without its last layer: LLaVA-OneVision takes the tokens that leave the 26th.
_SIGLIP_SO400M = VisionTower(
    num_layers=26, hidden_size=1152, ffn_hidden_size=4304, num_attention_heads=16, image_size=384, patch_size=14
)


def _llava_onevision(name: str, decoder: Decoder, vocab_size: int) -> Architecture:
    return Architecture(name, _SIGLIP_SO400M, decoder, vocab_size, grid_pinpoints=square_grids(384, 6, 6))


_ARCHITECTURES = [
    # Small enough to train in minutes on two CPU cores. Two pipeline stages of two chunks hold a layer each, tensor
    # parallelism can halve heads and groups, and the tower is wider than the decoder: v takes two payload rows.
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
        vocab_size=1024,
        grid_pinpoints=square_grids(84, 2, 2),
    ),
    # The vocabularies are those of the published checkpoints: Qwen2's rows and two for image and video, rounded up to
    # a multiple of 64.
    _llava_onevision(
        "llava-ov-0.5b",
        Decoder(
            num_layers=24,
            hidden_size=896,
            ffn_hidden_size=4864,
            num_attention_heads=14,
            num_query_groups=2,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
        ),
        vocab_size=152_000,
    ),
    # The RSA paper's: Qwen2-1.5B-Instruct, its embeddings untied.
    _llava_onevision(
        "llava-ov-1.5b",
        Decoder(
            num_layers=28,
            hidden_size=1536,
            ffn_hidden_size=8960,
            num_attention_heads=12,
            num_query_groups=2,
            max_position_embeddings=32768,
            tie_word_embeddings=False,
        ),
        vocab_size=152_000,
    ),
    _llava_onevision(
        "llava-ov-7b",
        Decoder(
            num_layers=28,
            hidden_size=3584,
            ffn_hidden_size=18944,
            num_attention_heads=28,
            num_query_groups=4,
            max_position_embeddings=32768,
            tie_word_embeddings=False,
        ),
        vocab_size=152_128,
    ),
]
ARCHITECTURES = {architecture.name: architecture for architecture in _ARCHITECTURES}


def get_architecture(name: str) -> Architecture:
    """Return the architecture of that name; ValueError names the known ones."""
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        run = find_run(Path(name))
        if run and is_hf_folder(run / "hf"):
            raise ValueError(f"--model {name} is a Megatron checkpoint; its model is described by --model {run / 'hf'}")
        raise ValueError(f"--model {name}: neither a folder with a config.json nor one of {known}")
    return ARCHITECTURES[name]
