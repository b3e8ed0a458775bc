"""The one table of names: which Hugging Face tensors make up which tensor of a Megatron checkpoint.

Both directions, and the shape that each tensor must have, are derived from it. Hugging Face names are those of the
hub's llava-hf checkpoints, which every version of transformers reads (key_aliases.py brings others to them); Megatron
keys are those that its distributed checkpoints hold, the same for local layers and Transformer Engine's.

One transform covers every row: parts are joined along their first dimension in `groups` groups, [part 1 of group 1;
part 2 of group 1; ...; part 1 of group 2; ...]. A copy is one part; q, k, v go by query group, and gate and up are one
group, which Megatron splits over tensor-parallel ranks itself.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rsa_megatron.models.architectures import Architecture, Decoder, VisionTower

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One tensor of a Megatron checkpoint."""

    key: str
    #: name to shape, in the order in which they are joined; {layer} stands in the names of a stack's
    parts: dict[str, Shape]
    groups: int = 1
    #: of its stack, which is stored as one tensor, [num_layers, *shape]; 0: not of a stack
    num_layers: int = 0
    #: its rows are the vocabulary's, to which a checkpoint of training may have added padding
    is_vocabulary: bool = False

    @property
    def shape(self) -> Shape:
        """Of one layer."""
        first, *others = self.parts.values()
        return (first[0] + sum(other[0] for other in others), *first[1:])

    @property
    def stored_shape(self) -> Shape:
        return (self.num_layers, *self.shape) if self.num_layers else self.shape

    @property
    def layers(self) -> Iterable[int | None]:
        return range(self.num_layers) if self.num_layers else [None]

    def part_names(self, layer: int | None) -> list[str]:
        return [name.format(layer=layer) for name in self.parts]


def join(parts: list[Tensor], groups: int) -> Tensor:
    """Join the parts to what is stored."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def split(whole: Tensor, num_rows: Iterable[int], groups: int) -> list[Tensor]:
    """Invert join, for parts of `num_rows` rows each."""
    blocks = whole.unflatten(0, (groups, -1)).split([rows // groups for rows in num_rows], dim=1)
    return [block.flatten(0, 1) for block in blocks]


def walk(rows: Iterable[Row]) -> Iterator[tuple[Row, int | None]]:
    """Yield each tensor of the model with its layer, if it is of one, layer by layer: the order in which files hold them."""
    for _, section in itertools.groupby(rows, key=lambda row: row.layers):
        section = list(section)
        yield from ((row, layer) for layer in section[0].layers for row in section)


def expected_shapes(rows: Iterable[Row]) -> dict[str, Shape]:
    """Return every Hugging Face tensor's shape by its name."""
    return {name: shape for row, layer in walk(rows) for name, shape in zip(row.part_names(layer), row.parts.values())}


EMBEDDINGS = "language_model.model.embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"
IMAGE_NEWLINE = "image_newline"
TOWER = "vision_tower.vision_model."
PROJECTOR = "multi_modal_projector."


def table(architecture: Architecture) -> list[Row]:
    """Make the rows of every tensor of the model."""
    return [
        *_tower(architecture.vision),
        *_projector(architecture.vision.hidden_size, architecture.decoder.hidden_size),
        *_decoder(architecture.decoder, architecture.vocab_size),
    ]


def _stack(key: str, name: str, num_layers: int, rows: list[tuple]) -> list[Row]:
    """Make the rows of one layer, each (key, parts) or (key, parts, groups), under the prefixes of its stack."""
    return [
        Row(key + row_key, {name + part: shape for part, shape in parts.items()}, *groups, num_layers=num_layers)
        for row_key, parts, *groups in rows
    ]


def _tower(vision: VisionTower) -> list[Row]:
    width, ffn, heads, patch = vision.hidden_size, vision.ffn_hidden_size, vision.num_attention_heads, vision.patch_size
    square, vector = (width, width), (width,)
    layer = [
        ("self_attention.linear_qkv.layer_norm_weight", {"layer_norm1.weight": vector}),
        ("self_attention.linear_qkv.layer_norm_bias", {"layer_norm1.bias": vector}),
        ("self_attention.linear_qkv.weight", {f"self_attn.{x}_proj.weight": square for x in "qkv"}, heads),
        ("self_attention.linear_qkv.bias", {f"self_attn.{x}_proj.bias": vector for x in "qkv"}, heads),
        ("self_attention.linear_proj.weight", {"self_attn.out_proj.weight": square}),
        ("self_attention.linear_proj.bias", {"self_attn.out_proj.bias": vector}),
        ("mlp.linear_fc1.layer_norm_weight", {"layer_norm2.weight": vector}),
        ("mlp.linear_fc1.layer_norm_bias", {"layer_norm2.bias": vector}),
        ("mlp.linear_fc1.weight", {"mlp.fc1.weight": (ffn, width)}),
        ("mlp.linear_fc1.bias", {"mlp.fc1.bias": (ffn,)}),
        ("mlp.linear_fc2.weight", {"mlp.fc2.weight": (width, ffn)}),
        ("mlp.linear_fc2.bias", {"mlp.fc2.bias": vector}),
    ]
    embeddings = TOWER + "embeddings."
    positions = (vision.tokens_per_side**2, width)
    return [
        Row("vision_model.conv1.weight", {embeddings + "patch_embedding.weight": (width, 3, patch, patch)}),
        Row("vision_model.conv1.bias", {embeddings + "patch_embedding.bias": vector}),
        Row("vision_model.position_embeddings.weight", {embeddings + "position_embedding.weight": positions}),
        *_stack("vision_model.decoder.layers.", TOWER + "encoder.layers.{layer}.", vision.num_layers, layer),
        Row("vision_model.ln_post.weight", {TOWER + "post_layernorm.weight": vector}),
        Row("vision_model.ln_post.bias", {TOWER + "post_layernorm.bias": vector}),
    ]


def _projector(width: int, hidden: int) -> list[Row]:
    return [
        Row("vision_projection.encoder.linear_fc1.weight", {PROJECTOR + "linear_1.weight": (hidden, width)}),
        Row("vision_projection.encoder.linear_fc1.bias", {PROJECTOR + "linear_1.bias": (hidden,)}),
        Row("vision_projection.encoder.linear_fc2.weight", {PROJECTOR + "linear_2.weight": (hidden, hidden)}),
        Row("vision_projection.encoder.linear_fc2.bias", {PROJECTOR + "linear_2.bias": (hidden,)}),
        Row("vision_projection.image_newline", {IMAGE_NEWLINE: (hidden,)}),
    ]


def _decoder(decoder: Decoder, vocab_size: int) -> list[Row]:
    hidden, ffn, groups = decoder.hidden_size, decoder.ffn_hidden_size, decoder.num_query_groups
    # Heads of q, and groups of k and v, are of one width.
    rows = {"q": hidden, "k": groups * (hidden // decoder.num_attention_heads)}
    rows["v"] = rows["k"]
    layer = [
        ("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": (hidden,)}),
        ("self_attention.linear_qkv.weight", {f"self_attn.{x}_proj.weight": (rows[x], hidden) for x in rows}, groups),
        ("self_attention.linear_qkv.bias", {f"self_attn.{x}_proj.bias": (rows[x],) for x in rows}, groups),
        ("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (hidden, hidden)}),
        ("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": (hidden,)}),
        ("mlp.linear_fc1.weight", {f"mlp.{x}_proj.weight": (ffn, hidden) for x in ("gate", "up")}),
        ("mlp.linear_fc2.weight", {"mlp.down_proj.weight": (hidden, ffn)}),
    ]
    vocabulary = (vocab_size, hidden)
    head = [Row("language_model.output_layer.weight", {LM_HEAD: vocabulary}, is_vocabulary=True)]
    return [
        Row("language_model.embedding.word_embeddings.weight", {EMBEDDINGS: vocabulary}, is_vocabulary=True),
        *_stack("language_model.decoder.layers.", "language_model.model.layers.{layer}.", decoder.num_layers, layer),
        Row("language_model.decoder.final_layernorm.weight", {"language_model.model.norm.weight": (hidden,)}),
        *([] if decoder.tie_word_embeddings else head),
    ]
