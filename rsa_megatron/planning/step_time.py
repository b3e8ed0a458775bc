"""How long a training step may take: arithmetic on assumptions, none of it measured at the sizes it is meant for.

    step = (m + p - 1) x slowest stage's time for a micro-batch + gradients
    a stage's time = operations / (t x peak rate x utilisation) + tensor-parallel bytes / bandwidth within a node

with t, p sizes of tensor and pipeline parallelism and m micro-batches a step: p - 1 of m + p - 1 turns are the pipeline's
bubble (without interleaving). Operations are flops.py's, and with full recomputation the layers' forward pass once more.
Nothing overlaps: neither the reduction of gradients nor tensor parallelism's with arithmetic. Under pipeline parallelism rows are
padded to --seq-length; without it a rank waits for the one that has most to do (rows.py; where lengths are measured). Not counted:
what stages send each other, the optimizer's own step, the RSA loss, and waiting for data.
"""

import functools
from dataclasses import dataclass, replace

from rsa_megatron.models.architectures import Architecture
from rsa_megatron.planning.flops import training_flops
from rsa_megatron.planning.memory import parameter_counts
from rsa_megatron.planning.parallel_layout import Layout, Run
from rsa_megatron.planning.rows import Row, Rows


@dataclass(frozen=True)
class Assumptions:
    """What the time depends on besides the layout."""

    #: peak of a GPU's matrix products in the training's type, TFLOP a second, and the fraction of it that is reached
    gpu_tflops: float
    utilisation: float
    #: that one GPU has to others of its node, and to other nodes, GB a second
    node_bandwidth: float
    network_bandwidth: float
    #: what the run reads
    rows: Rows


def step_time(run: Run, layout: Layout, assumed: Assumptions) -> float:
    """Estimate the seconds of a step."""
    stages = [_estimate_stage_time(run, layout, assumed, stage) for stage in range(layout.pipeline)]
    return (layout.num_micro_batches + layout.pipeline - 1) * max(stages) + _estimate_gradient_time(
        run, layout, assumed
    )


def _estimate_stage_time(run: Run, layout: Layout, assumed: Assumptions, stage: int) -> float:
    """Estimate the seconds that a stage needs for one micro-batch, forward and backward."""
    row, waiting = assumed.rows.mean, 1.0
    if layout.pipeline > 1:
        row = _pad(run, row)
    else:
        waiting = assumed.rows.estimate_waiting(
            _get_costs(run.architecture, tuple(run.trainable)),
            num_ranks=layout.data,
            num_micro_batches=layout.num_micro_batches,
            micro_batch_size=layout.micro_batch_size,
        )
    rate = layout.tensor * assumed.gpu_tflops * 1e12 * assumed.utilisation
    operations = layout.micro_batch_size * _count_operations(run, layout, row, stage)
    num_bytes = layout.micro_batch_size * _count_tensor_parallel_bytes(run, layout, row, stage)
    return waiting * (operations / rate + num_bytes / (assumed.node_bandwidth * 1e9))


def _pad(run: Run, row: Row) -> Row:
    """Pad a row to --seq-length: in a packed row the padding is one more sequence, else it is part of the only one."""
    length = run.row_length
    squares = row.squared_lengths + (length - row.num_positions) ** 2 if run.packs else length**2
    return replace(row, num_positions=length, squared_lengths=squares)


@functools.cache
def _get_costs(architecture: Architecture, trainable: tuple[str, ...]) -> tuple[float, float, float]:
    """Count operations of a tile, of a position, and of a unit of a sequence's length squared."""
    none = dict(num_tiles=0, num_positions=0, squared_lengths=0, num_image_tokens=0)
    tile = dict(num_tiles=1, num_image_tokens=architecture.vision.tokens_per_side**2)
    units = (tile, dict(num_positions=1), dict(squared_lengths=1))
    return tuple(sum(training_flops(architecture, trainable, **none | unit).values()) for unit in units)


def _count_operations(run: Run, layout: Layout, row: Row, stage: int) -> float:
    """Count a stage's operations for one row."""
    architecture, decoder = run.architecture, run.architecture.decoder
    sizes = dict(
        num_tiles=row.num_tiles,
        num_positions=row.num_positions,
        squared_lengths=row.squared_lengths,
        num_image_tokens=row.num_tiles * architecture.vision.tokens_per_side**2,
    )
    without_layers = replace(architecture, decoder=replace(decoder, num_layers=0))

    def passes(trainable, *, output: bool, tower: bool = True) -> float:
        first, last = stage == 0, stage == layout.pipeline - 1
        parts, after = (training_flops(one, trainable, **sizes) for one in (architecture, without_layers))
        layers = (parts["language"] - after["language"]) / layout.pipeline
        return (
            first * (tower * parts["vision"] + output * parts["projector"]) + layers + last * output * after["language"]
        )

    again = passes((), output=False, tower=run.trains("vision")) if layout.recompute == "full" else 0
    return passes(run.trainable, output=True) + again


def _count_tensor_parallel_bytes(run: Run, layout: Layout, row: Row, stage: int) -> float:
    """Count what a rank sends and receives for one row, in all-reduces of activations.

    Two a layer forward, two backward, and two more where it is recomputed; each moves 2 (t - 1) / t of what is reduced, and
    with sequence parallelism as much, in two halves.
    """
    t, vision, decoder = layout.tensor, run.architecture.vision, run.architecture.decoder
    again = 2 * (layout.recompute == "full")
    tokens = row.num_tiles * vision.tokens_per_side**2
    reduced = (
        decoder.num_layers
        / layout.pipeline
        * row.num_positions
        * decoder.hidden_size
        * (2 + 2 * bool(run.trainable) + again)
    )
    if stage == 0:
        reduced += vision.num_layers * tokens * vision.hidden_size * (2 + (2 + again) * run.trains("vision"))
    return reduced * run.number_size * 2 * (t - 1) / t


def _estimate_gradient_time(run: Run, layout: Layout, assumed: Assumptions) -> float:
    """Estimate the seconds to reduce fp32 gradients over the data-parallel ranks, of the stage that has most.

    An all-reduce moves 2 (d - 1) / d of them; the distributed optimizer half of that and then its parameters back.
    """
    d = layout.data
    counts = [parameter_counts(run.architecture, layout, stage) for stage in range(layout.pipeline)]
    num_trained = max(sum(count for part, count in stage.items() if part in run.trainable) for stage in counts)
    bytes_each = 4 + run.number_size if layout.distributed_optimizer else 8
    return num_trained * bytes_each * (d - 1) / d / (assumed.network_bandwidth * 1e9)
