"""The layouts that a run may have on N GPUs: which of them Megatron and the training script accept, and which fit."""

from dataclasses import dataclass, replace

from rsa_megatron.planning.memory import peak_memory
from rsa_megatron.planning.parallel_layout import Layout, Run
from rsa_megatron.planning.step_time import Assumptions, step_time

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
DOES_NOT_FIT = "does not fit"


@dataclass(frozen=True)
class Cluster:
    """What the run is to be split over."""

    num_gpus: int
    #: the most for tensor parallelism
    gpus_per_node: int
    #: of one GPU, what parameters and activations may take
    usable_bytes: float
    #: rows of a step, on all GPUs: samples, or packed ones
    global_batch_size: int


@dataclass(frozen=True)
class Plan:
    """A layout, and what it needs."""

    layout: Layout
    #: bytes by component, on the pipeline stage that needs most
    stage: int
    memory: dict[str, float]
    #: of a step
    seconds: float

    @property
    def total(self) -> float:
        return sum(self.memory.values())


def find_plans(
    run: Run, cluster: Cluster, assumed: Assumptions
) -> tuple[list[Plan], list[Plan], list[tuple[Layout, str]]]:
    """Find the layouts that fit, fastest first; those that do not, smallest first; and those rejected, with the reason.

    Times that differ by less than two digits show are equal. Among equals the one whose RSA kernel compares more pairs is first;
    those whose kernel has a single one, and so nothing to compare, come after all others that fit.
    """
    fitting, too_large, rejected = [], [], []
    for layout in list_layouts(run, cluster):
        reason = find_rejection(run, layout, cluster)
        if reason:
            rejected.append((layout, reason))
            continue
        for recompute in ("none", "full"):  # "selective" has next to nothing to save without scores
            made = _make_plans(run, replace(layout, recompute=recompute), assumed)
            fits = [plan for plan in made if plan.total <= cluster.usable_bytes]
            if fits:
                fitting.append(min(fits, key=lambda plan: plan.seconds))
            else:
                too_large.append(min(made, key=lambda plan: plan.total))
    fitting.sort(
        key=lambda plan: (
            run.rsa and not run.compares_pairs(plan.layout),
            float(f"{plan.seconds:.2g}"),
            -plan.layout.num_rows * run.rsa,
            plan.total,
        )
    )
    too_large.sort(key=lambda plan: plan.total)
    return fitting, too_large, rejected


def list_layouts(run: Run, cluster: Cluster) -> list[Layout]:
    """List every split over the GPUs, unchecked; `data` is rounded down where they do not divide."""
    sizes = (1,) if run.packs else MICRO_BATCH_SIZES
    layouts = []
    for tensor in range(1, cluster.gpus_per_node + 1):
        for pipeline in range(1, run.architecture.decoder.num_layers + 1):
            data = cluster.num_gpus // (tensor * pipeline)
            layouts += [_make_layout(run, cluster, tensor, pipeline, data, size) for size in (sizes if data else ())]
    return layouts


def _make_layout(run: Run, cluster: Cluster, tensor: int, pipeline: int, data: int, micro_batch_size: int) -> Layout:
    return Layout(
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        micro_batch_size=micro_batch_size,
        num_micro_batches=cluster.global_batch_size // (micro_batch_size * data),
        sequence_parallel=tensor > 1 and run.transformer_engine,
    )


def find_rejection(run: Run, layout: Layout, cluster: Cluster) -> str | None:
    """Return why Megatron or the training script would reject a layout, a kind of reason; None where they accept it."""
    tensor, pipeline = layout.tensor, layout.pipeline
    if cluster.num_gpus % (tensor * pipeline):
        return "TP x PP does not divide the GPUs"
    try:
        run.architecture.check_layout(tensor=tensor, pipeline=pipeline)
    except ValueError:
        return "TP does not divide the model's heads, query groups and FFN widths"
    if run.architecture.decoder.num_layers % pipeline:
        return "PP does not divide the decoder's layers"
    if layout.sequence_parallel and run.row_length % tensor:
        return "TP does not divide --seq-length, as sequence parallelism requires"
    if cluster.global_batch_size % (layout.micro_batch_size * layout.data):
        return "micro-batch x DP does not divide the global batch"
    return None


def find_nearest_num_gpus(run: Run, cluster: Cluster) -> int:
    """Find the nearest number of GPUs over which a layout can be split; one always can."""

    def accepts(tensor: int, pipeline: int, data: int) -> bool:
        layout = _make_layout(
            run, cluster, tensor, pipeline, data, 1
        )  # if any micro-batch divides the batch, one of 1 does
        return not find_rejection(run, layout, replace(cluster, num_gpus=tensor * pipeline * data))

    # Only what divides the batch can be DP: few numbers, where those around a large --gpus are thousands.
    divisors = [data for data in range(1, cluster.global_batch_size + 1) if cluster.global_batch_size % data == 0]
    found = {
        tensor * pipeline * data
        for tensor in range(1, cluster.gpus_per_node + 1)
        for pipeline in range(1, run.architecture.decoder.num_layers + 1)
        for data in divisors
        if accepts(tensor, pipeline, data)
    }
    return min(found, key=lambda num_gpus: (abs(num_gpus - cluster.num_gpus), num_gpus))


def _make_plans(run: Run, layout: Layout, assumed: Assumptions) -> list[Plan]:
    """Make plans without the distributed optimizer and, where it has ranks to divide its state over, with it."""
    layouts = [replace(layout, distributed_optimizer=on) for on in ((False, True) if layout.data > 1 else (False,))]
    return [Plan(one, *peak_memory(run, one), step_time(run, one, assumed)) for one in layouts]
