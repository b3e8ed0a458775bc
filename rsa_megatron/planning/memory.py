"""How much memory a rank needs, by component: only arithmetic, checked in tests/distributed/test_layout_memory.py.

What stays for the whole run is counted exactly: parameters, Megatron's gradient buffers and Adam's state. What comes and
goes with a micro-batch is the sum of what each layer stores for its backward pass, and "working memory": the most that
comes on top of it at once. That is where the last stage makes its logits, or where one layer goes backward.

Bytes a parameter, for Megatron with Adam; what is frozen has only the first line (its gradient buffers hold what is trained):
                                   bf16            fp32
    parameter                      2               4
    gradient buffer                4 (fp32)        4
    main parameter and moments     4 + 8           8
The last line is divided over the data-parallel ranks by the distributed optimizer.

What a layer stores is in activation_memory.py. Not counted: the CUDA context, NCCL's buffers, what the allocator loses between
blocks, and the forward pass of a frozen tower, which stores nothing.
"""

import torch

from rsa_megatron.hooks.pipeline_payload import num_rows
from rsa_megatron.models.architectures import Architecture
from rsa_megatron.planning.activation_memory import (
    count_backward_bytes,
    count_stored_bytes,
    make_decoder_layer,
    make_tower_layer,
)
from rsa_megatron.planning.parallel_layout import Layout, Run


def peak_memory(run: Run, layout: Layout) -> tuple[int, dict[str, float]]:
    """Return the pipeline stage that needs most, and the bytes of a rank of it, by component; their sum is the peak."""
    stages = [stage_memory(run, layout, stage) for stage in range(layout.pipeline)]
    worst = max(range(layout.pipeline), key=lambda stage: sum(stages[stage].values()))
    return worst, stages[worst]


def stage_memory(run: Run, layout: Layout, stage: int) -> dict[str, float]:
    """Count the bytes that a rank of a pipeline stage needs, by component."""
    counts = parameter_counts(run.architecture, layout, stage)
    num_trained = sum(count for part, count in counts.items() if part in run.trainable)
    state = (12 if run.bf16 else 8) / (layout.data if layout.distributed_optimizer else 1)
    # One forward, one backward: a stage starts as many micro-batches as there are stages from it on, and then ends one.
    in_flight = min(layout.num_micro_batches, layout.pipeline - stage)
    first, last = stage == 0, stage == layout.pipeline - 1
    return {
        "parameters": sum(counts.values()) * run.number_size,
        "gradients": num_trained * 4,
        "optimizer": num_trained * state,
        "tower": first * in_flight * _count_tower(run, layout),
        "projector": first * in_flight * _count_projector(run, layout),
        "decoder": in_flight * _count_decoder(run, layout, last),
        "payload": (run.rsa and not first) * in_flight * _count_payload(run, layout),
        "RSA": (run.rsa and last) * _count_rsa(run, layout),
        "working memory": _count_working_memory(run, layout, stage),
    }


def parameter_counts(architecture: Architecture, layout: Layout, stage: int) -> dict[str, int]:
    """Count the parameters that a rank of a pipeline stage holds, by module.

    Tensor parallelism divides matrices, and the biases of those whose output it divides; norms, other biases, the patch
    embedding, positions and image_newline are on every rank.
    """
    vision, decoder, t = architecture.vision, architecture.decoder, layout.tensor
    width, ffn, hidden = vision.hidden_size, vision.ffn_hidden_size, decoder.hidden_size
    keys = hidden // decoder.num_attention_heads * decoder.num_query_groups
    vision_layer = (4 * width**2 + 3 * width + 2 * width * ffn + ffn) // t + 6 * width
    patches = (3 * vision.patch_size**2 + 1) * width + vision.tokens_per_side**2 * width
    decoder_layer = (
        (hidden + 2 * keys) * (hidden + 1) + hidden**2 + 3 * hidden * decoder.ffn_hidden_size
    ) // t + 2 * hidden
    embeddings = -(-architecture.vocab_size // t) * hidden
    first, last = stage == 0, stage == layout.pipeline - 1
    # Tied, the output layer is the word embeddings; on another stage than they, a copy of them.
    copied = decoder.tie_word_embeddings and last and not first
    return {
        "vision": first * (patches + vision.num_layers * vision_layer),
        "projector": first * ((width * hidden + hidden + hidden**2) // t + 2 * hidden),
        "embeddings": (first + copied) * embeddings,
        "language": decoder.num_layers // layout.pipeline * decoder_layer
        + last * (hidden + (not decoder.tie_word_embeddings) * embeddings),
    }


def _count_tower(run: Run, layout: Layout) -> float:
    """Count the bytes that the tower stores of one micro-batch."""
    if not run.trains("vision"):
        return 0
    vision = run.architecture.vision
    # as they are read, fp32, and what the patch embedding stores of them
    pixels = layout.micro_batch_size * run.num_tiles * 3 * vision.image_size**2 * (6 if run.bf16 else 4)
    return pixels + vision.num_layers * count_stored_bytes(run, layout, make_tower_layer(run, layout))


def _count_projector(run: Run, layout: Layout) -> float:
    if not run.trains("vision", "projector"):
        return 0
    vision, hidden, is_trained = run.architecture.vision, run.architecture.decoder.hidden_size, run.trains("projector")
    # its input, what goes into GELU and what comes out
    numbers = is_trained * vision.hidden_size + (1 + is_trained) * hidden / layout.tensor
    return layout.micro_batch_size * run.num_tiles * vision.tokens_per_side**2 * numbers * run.number_size


def _count_decoder(run: Run, layout: Layout, last: bool) -> float:
    if not run.trainable:
        return 0
    layer = make_decoder_layer(run, layout)
    stored = run.architecture.decoder.num_layers / layout.pipeline * count_stored_bytes(run, layout, layer)
    # the final norm's input, and the output layer's where its weight is trained
    after = last * (1 + run.trains_output) * layer.num_positions * layer.input_width * run.number_size
    return stored + after


def _count_working_memory(run: Run, layout: Layout, stage: int) -> float:
    """Count the most that a stage needs for a moment, on top of what it stores."""
    first, last = stage == 0, stage == layout.pipeline - 1
    layers = [make_decoder_layer(run, layout)] if run.trainable else []
    layers += [make_tower_layer(run, layout)] if first and run.trains("vision") else []
    # Megatron's own attention writes products into one buffer for all layers, which stays.
    buffer = max((layer.num_scores for layer in layers), default=0) * run.number_size
    # Under pipeline parallelism: what comes from a neighbour and what goes to it.
    hidden_state = layout.micro_batch_size * run.row_length * run.architecture.decoder.hidden_size * run.number_size
    neighbours = 2 * (layout.pipeline > 1) * hidden_state
    moments = [count_backward_bytes(run, layout, layer) for layer in layers] + [last * _count_logits(run, layout)]
    return buffer + neighbours + max(moments)


def _count_logits(run: Run, layout: Layout) -> float:
    """Count logits; their fp32 copy, which becomes their softmax and its gradient in place; then the weight's gradient."""
    columns = -(-run.architecture.vocab_size // layout.tensor)
    logits = layout.micro_batch_size * run.row_length * columns
    weight = run.trains_output * columns * run.architecture.decoder.hidden_size * run.number_size
    if run.bf16:
        return max(6 * logits, 2 * logits + weight)
    return 4 * logits + weight


def _count_payload(run: Run, layout: Layout) -> float:
    """Count the positions that take v from stage to stage (pipeline_payload.py), of one micro-batch."""
    hidden = run.architecture.decoder.hidden_size
    rows = num_rows(run.architecture.vision.hidden_size, hidden, torch.bfloat16 if run.bf16 else torch.float32)
    return rows * layout.micro_batch_size * run.samples_per_row * hidden * run.number_size


def _count_rsa(run: Run, layout: Layout) -> float:
    """Count all ranks' v and t, gathered and centred, this rank's own and their gradients, a dozen blocks of distances; fp32."""
    num_own = layout.micro_batch_size * run.samples_per_row
    num_pairs = num_own * layout.data
    width = run.architecture.vision.hidden_size + run.architecture.decoder.hidden_size
    return 4 * (2 * (num_pairs + num_own) * width + 12 * min(num_pairs, 1024) ** 2)
