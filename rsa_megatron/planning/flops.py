"""Floating-point operations of one forward and backward pass, by module: only arithmetic.

Model FLOPs, as PaLM counts them (Chowdhery et al. 2022, appendix B) and Megatron does: what the mathematics requires,
whatever the implementation does. Only matrix products count, 2 operations a multiplication with its addition; norms,
softmax, rotations, bilinear shrinking, the losses and the optimizer do not. Recomputation does
not count, and of the decoder's attention only the half below the diagonal.

A product y = x W of n rows takes 2 n (rows of W) (columns of W) forward, as much again for the gradient of x, and as much
again for that of W. Frozen weights take no gradient of W. The gradient of x is taken where something before it is trained: a
frozen tower takes only its forward pass, but a frozen decoder behind a trained projector still takes that of x. The two
products of attention have no weights: their backward pass is twice the forward one.
"""

from collections.abc import Collection

from rsa_megatron.models.architectures import Architecture


def training_flops(
    architecture: Architecture,
    trainable: Collection[str],
    *,
    num_tiles: float,
    num_positions: float,
    squared_lengths: float,
    num_image_tokens: float,
) -> dict[str, float]:
    """Count operations of "vision", "projector" and "language", forward and backward.

    Linear in the four amounts, which may be tensors: the sum over batches is the count of their sums.

    Args:
        trainable: the modules that are trained, as --trainable names them ("vision", "projector", "embeddings", "language").
        num_tiles: image tiles that go through the tower; an embedding goes past it.
        num_positions: positions that go through the decoder and its output layer, the sum of the sequences' lengths.
        squared_lengths: the sum of the squares of the sequences' lengths.
        num_image_tokens: tokens that go through the projector: all of a tile's, as packing comes after it; one of an embedding.
    """
    is_trained = {part: part in trainable for part in ("vision", "projector", "embeddings", "language")}
    return {
        "vision": _count_vision(architecture, num_tiles, is_trained["vision"]),
        "projector": _count_projector(architecture, num_image_tokens, is_trained),
        "language": _count_language(architecture, num_positions, squared_lengths, is_trained),
    }


def _count_passes(*, weights: bool, inputs: bool) -> int:
    """Count the products of a linear layer, in units of its forward one."""
    return 1 + weights + inputs


def _count_vision(architecture: Architecture, num_tiles: float, is_trained: bool) -> float:
    vision = architecture.vision
    width, num_tokens = vision.hidden_size, vision.tokens_per_side**2
    # Nothing before the pixels is trained: the patch embedding takes no gradient of its input.
    patches = num_tokens * 2 * 3 * vision.patch_size**2 * width * _count_passes(weights=is_trained, inputs=False)
    # q, k, v, out; two matrices of the MLP
    weights = 4 * width**2 + 2 * width * vision.ffn_hidden_size
    # Every token attends to every one: q k^T and its product with v, 2 tokens^2 width each.
    attention = 2 * 2 * num_tokens**2 * width
    # Within the tower all or nothing is trained, from the patches on.
    layer = num_tokens * 2 * weights * _count_passes(weights=is_trained, inputs=is_trained) + attention * (
        1 + 2 * is_trained
    )
    return num_tiles * (patches + vision.num_layers * layer)


def _count_projector(architecture: Architecture, num_image_tokens: float, is_trained: dict[str, bool]) -> float:
    width, hidden = architecture.projector_input_width, architecture.decoder.hidden_size
    first = 2 * width * hidden * _count_passes(weights=is_trained["projector"], inputs=is_trained["vision"])
    second = (
        2
        * hidden**2
        * _count_passes(weights=is_trained["projector"], inputs=is_trained["vision"] or is_trained["projector"])
    )
    return num_image_tokens * (first + second)


def _count_language(
    architecture: Architecture, num_positions: float, squared_lengths: float, is_trained: dict[str, bool]
) -> float:
    decoder = architecture.decoder
    hidden = decoder.hidden_size
    keys = hidden // decoder.num_attention_heads * decoder.num_query_groups
    # q and out, k and v; gate, up, down. Looking up embeddings is not a product.
    weights = 2 * hidden**2 + 2 * hidden * keys + 3 * hidden * decoder.ffn_hidden_size
    # Every query head has its own product with the keys, however many groups share them. A position attends to those
    # before it: of the 2 x 2 length^2 hidden of the two products, half.
    attention = 2 * hidden
    # The first norm is trained with the layers: even if nothing before them is, all products take their input's gradient.
    inputs = any(is_trained.values())
    layer = num_positions * 2 * weights * _count_passes(weights=is_trained["language"], inputs=inputs)
    layer += squared_lengths * attention * (1 + 2 * inputs)
    # Tied, the output layer's weight is the word embeddings': one product, trained with them.
    output_is_trained = is_trained["embeddings" if decoder.tie_word_embeddings else "language"]
    output = (
        num_positions * 2 * hidden * architecture.vocab_size * _count_passes(weights=output_is_trained, inputs=inputs)
    )
    return decoder.num_layers * layer + output
