"""What one layer of the tower or the decoder stores for its backward pass, and needs while that runs. Only arithmetic.

What a layer stores, in numbers a position ("trained": only if its weights are; a linear layer needs its input only for them):
                                                        decoder, local        decoder, TE      tower
    inputs of the two norms                             2 H                   2 H              2 D
    their outputs, inputs of linear layers (trained)    2 H                   2 H              2 D
    q, k, v                                             2 H + 3 G             2 H + 3 G        3 D
    what attention gives                                H                     H                D
    MLP: gate and up, activation, up once more          2 M + M + M           2 M              F
    input of its second layer (trained)                 M                     M                F
The first two lines are on every tensor-parallel rank, unless sequence parallelism divides the decoder's; the others are
divided. q and k are stored once as rotated (H + G), and v within the projection that it is a view of (H + 2 G). Under TE
(Transformer Engine) SwiGLU is one kernel. On the CPU RMSNorm is not a single kernel and stores more. Not counted: the 4 bytes
that attention stores of each position and head. The numbers of the local layers, Megatron's with the attention of
local_attention.py, are from measured runs; those of TE are what its kernels should have to store, and no run has been
measured with them.

Local layers with Megatron's own attention (Run.keeps_scores) differ. They store scores, L^2 a sequence and head (P^2 a tile
and head), as softmax's fp32 output and as bf16. The decoder's have k and v repeated for all heads, so that q, k and v are
3 H; and store what attention gives only where weights are trained.

Recomputation "full" stores the first input of each layer, and recomputes the rest as working memory. "selective" recomputes
attention: it saves the scores. Where there are none it saves what attention gives, where no weight is trained.

Shapes: L positions of a sequence, P tokens of a tile; D, F width and FFN width of the tower; H, M, G width, FFN width and width
of k of the decoder.
"""

from dataclasses import dataclass

from rsa_megatron.planning.parallel_layout import Layout, Run


@dataclass(frozen=True)
class Layer:
    """One layer of the tower or the decoder, and one micro-batch on one rank."""

    num_positions: float
    #: numbers a position: of the layer's input
    input_width: float
    #: of what attention stores but scores, and of what the MLP stores
    attention: float
    mlp: float
    #: of the MLP's width
    ffn: float
    #: heads x length^2, over all sequences or tiles; 0 where attention makes none
    num_scores: float


def make_tower_layer(run: Run, layout: Layout) -> Layer:
    """Make a layer of a tower that is trained."""
    vision, t = run.architecture.vision, layout.tensor
    width, ffn, num_tokens = vision.hidden_size, vision.ffn_hidden_size / t, vision.tokens_per_side**2
    num_tiles = layout.micro_batch_size * run.num_tiles
    num_scores = run.makes_scores("vision") * num_tiles * vision.num_attention_heads / t * num_tokens**2
    return Layer(num_tiles * num_tokens, width, 2 * width + 4 * width / t, 2 * width + 2 * ffn, ffn, num_scores)


def make_decoder_layer(run: Run, layout: Layout) -> Layer:
    """Make a layer of the decoder, where something in or before it is trained."""
    decoder, t, is_trained = run.architecture.decoder, layout.tensor, run.trains("language")
    hidden, ffn = decoder.hidden_size, decoder.ffn_hidden_size / t
    keys = hidden // decoder.num_attention_heads * decoder.num_query_groups
    input_width = hidden / t if layout.sequence_parallel else hidden
    norm = (1 + is_trained) * input_width
    mlp = (2 if run.transformer_engine else 4) * ffn
    if layout.recompute == "selective":
        heads = 2 * hidden + 3 * keys + is_trained * hidden
    elif run.makes_scores("language"):
        heads = 3 * hidden + is_trained * hidden
    else:
        heads = 3 * hidden + 3 * keys
    num_positions = layout.micro_batch_size * run.row_length
    num_scores = run.makes_scores("language") * num_positions * decoder.num_attention_heads / t * run.row_length
    return Layer(num_positions, input_width, norm + heads / t, norm + mlp + is_trained * ffn, ffn, num_scores)


def count_stored_bytes(run: Run, layout: Layout, layer: Layer) -> float:
    """Count the bytes that a layer stores from its forward to its backward pass."""
    if layout.recompute == "full":
        return layer.num_positions * layer.input_width * run.number_size
    scores = 0 if layout.recompute == "selective" else layer.num_scores * _get_score_size(run)
    return layer.num_positions * (layer.attention + layer.mlp) * run.number_size + scores


def _get_score_size(run: Run) -> int:
    # The softmax is taken in fp32 and stored, and stored again as bf16 for the product with v.
    return 6 if run.bf16 else 4


def count_backward_bytes(run: Run, layout: Layout, layer: Layer) -> float:
    """Count the bytes on top of it while one layer goes backward: gradients, and what is recomputed."""
    size = run.number_size
    mlp_kept, attention_kept = (layer.num_positions * numbers * size for numbers in (layer.mlp, layer.attention))
    # 1. The MLP: gradients of its product, of gate and up, and of the layer's output and input.
    mlp = layer.num_positions * (3 * layer.ffn + 2 * layer.input_width) * size
    # 2. Attention, when the MLP has freed what it stored. Of the scores: the softmax's gradient and that of its input, in
    #    fp32; in bf16 the copy for the product with v has gone by then, 4 + 4 - 2.
    attention = layer.num_scores * (6 if run.bf16 else 8) - mlp_kept
    if layout.recompute == "selective":
        attention += layer.num_scores * _get_score_size(run)
    again = mlp_kept + attention_kept + layer.num_scores * _get_score_size(run) if layout.recompute == "full" else 0
    return again + max(mlp, attention)
