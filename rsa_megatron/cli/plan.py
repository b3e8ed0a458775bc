"""Which layouts of a training run fit into the GPUs' memory, and which of them should be the fastest.

    rsa-megatron plan --model llava-ov-7b --stage 1.5 --gpus 224 --gpu-memory 80

The stage's recipe specifies what is trained, the batch, --seq-length and whether rows are packed. Every layout that Megatron and the
training script accept is tried (search.py). Memory (rsa_megatron/planning/memory.py) is for the worst case: every row as long as
--seq-length, every image cut into the most tiles, a packed row of the most tiles. Time (step_time.py) is for an average sample, or
for samples of the lengths that `rsa-megatron data fill --out` has measured. Neither has --rsa-text-source
caption: it makes sequences longer, and the decoder's local layers store scores (Run.keeps_scores). Needs no GPU and no Megatron.
"""

import argparse
import collections
import importlib.util
from dataclasses import fields
from pathlib import Path

from rsa_megatron.cli.plan_rows import FILL, check_row_flags, read_rows
from rsa_megatron.command_line import Parser, report_errors
from rsa_megatron.models.architectures import Architecture, get_architecture
from rsa_megatron.planning.most_tiles import count_most_tiles, count_row_tiles
from rsa_megatron.planning.parallel_layout import Layout, Run
from rsa_megatron.planning.search import DOES_NOT_FIT, Cluster, Plan, find_nearest_num_gpus, find_plans
from rsa_megatron.planning.step_time import Assumptions
from rsa_megatron.recipes import STAGES, recipe, unpack

GIB = 2**30
# Positions and tiles of an average sample: what the recipes' hours are estimated with. Of AnyRes, by its arithmetic on pictures of usual
# sizes and texts, with the mixtures' shares of text alone; of a precomputed embedding 576 positions and no tile (the one token in
# the projector is not counted).
AVERAGES = {"revision": (750, 0), "1": (900, 1), "1.5": (2750, 4), "2": (3450, 6)}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with report_errors(interrupted="interrupted"):
        run, cluster, assumed = read_run(args)
        fitting, too_large, rejected = find_plans(run, cluster, assumed)
        if not fitting:
            raise ValueError(explain_no_fit(run, cluster, too_large, args))
        unpacked = find_unpacked(args, run.samples_per_row) if run.packs else None
    rejected += [(plan.layout, f"{DOES_NOT_FIT}: needs {format_memory(plan.total)}") for plan in too_large]
    print_assumptions(run, assumed, args)
    print_layouts(fitting, rejected, run, args)
    print_best(fitting[0], run, args)
    if unpacked:
        print(unpacked)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="rsa-megatron plan", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="architecture, or a Hugging Face folder")
    parser.add_argument("--stage", required=True, help=f"training stage: {', '.join(STAGES)}")
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs in total")
    parser.add_argument("--gpu-memory", type=float, default=80, help="memory of one GPU, GiB (default: 80)")
    parser.add_argument(
        "--reserved",
        type=float,
        default=6,
        help="GiB of it for the CUDA context, NCCL and fragmentation (default: 6)",
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, help="limits tensor parallelism (default: 8)")
    parser.add_argument("--global-batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--seq-length", type=int, help="default: the recipe's")
    parser.add_argument("--most-tiles", type=int, help="most tiles of one sample; default: the recipe's largest grid")
    parser.add_argument(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        help="local: Megatron's local layers, which store more of each MLP; default: transformer_engine where it is installed",
    )
    parser.add_argument(
        "--gpu-tflops", type=float, default=989, help="peak bf16 rate of one GPU (default: 989, an H100's)"
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.4, help="fraction of the peak that is reached (default: 0.4)"
    )
    parser.add_argument(
        "--node-bandwidth", type=float, default=300, help="GB/s of a GPU within its node (default: 300)"
    )
    parser.add_argument(
        "--network-bandwidth", type=float, default=40, help="GB/s of a GPU to other nodes (default: 40)"
    )
    parser.add_argument("--mean-length", type=float, help="positions of an average sample; default: the stage's")
    parser.add_argument("--mean-tiles", type=float, help="tiles of an average sample; default: the stage's")
    parser.add_argument(
        "--lengths",
        type=Path,
        metavar="FILE",
        help="measured samples instead of an average one: `rsa-megatron data fill --out FILE`",
    )
    parser.add_argument(
        "--packing-buffer-size",
        type=int,
        help="samples among which a packed row's are chosen; 0: a row a sample; default: the recipe's",
    )
    parser.add_argument(
        "--packing-max-tiles", type=int, help="most tiles of a packed row; default: the training script's"
    )
    parser.add_argument(
        "--fill",
        type=float,
        help=f"share of a packed row that is samples'; default: {FILL} of AnyRes, else whole samples; of --lengths it is counted",
    )
    parser.add_argument("--show", type=int, default=10, help="number of layouts to print (default: 10)")
    parser.add_argument("--show-refused", action="store_true", help="print each rejected layout with the reason")
    args = parser.parse_args(argv)
    args.impl_is_default = args.transformer_impl is None
    if args.impl_is_default:  # the flags that are printed must run in the environment that prints them
        args.transformer_impl = "transformer_engine" if importlib.util.find_spec("transformer_engine") else "local"
    return args


def read_run(args) -> tuple[Run, Cluster, Assumptions]:
    """Read run, cluster and assumptions from the flags; fill in the recipe's defaults."""
    settings, architecture = recipe(args.model, args.stage), read_architecture(args.model)
    args.recipe_packs = settings.get("packing_buffer_size", 0) > 0
    if args.packing_buffer_size is None:
        args.packing_buffer_size = settings.get("packing_buffer_size", 0)
    elif args.packing_buffer_size == 0:
        settings = unpack(settings)
    length, tiles = AVERAGES[args.stage]
    for name, value in {
        "global_batch_size": settings["global_batch_size"],
        "seq_length": settings["seq_length"],
        "most_tiles": count_most_tiles(settings, architecture),
    }.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    packs = args.packing_buffer_size > 0
    if packs and args.packing_max_tiles is None:
        default = count_row_tiles(settings | {"seq_length": args.seq_length}, architecture).default
        args.packing_max_tiles = max(args.most_tiles, default)
    check_row_flags(args, packs)
    args.mean_length = min(length, args.seq_length) if args.mean_length is None else args.mean_length
    args.mean_tiles = min(tiles, args.most_tiles) if args.mean_tiles is None else args.mean_tiles
    may_be_0 = ["reserved", "packing_buffer_size"] + ["most_tiles", "mean_tiles"] * ("image_positions" in settings)
    for name, value in vars(args).items():
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or value > 0
            or (value == 0 and name in may_be_0)
        ):
            continue
        raise ValueError(f"--{name.replace('_', '-')} {value:g} must be above 0")
    rows = read_rows(
        args, packs, varies="image_positions" not in settings and settings["image_aspect_ratio"] == "anyres"
    )
    run = Run(
        architecture,
        tuple(settings["trainable"]),
        args.seq_length,
        args.packing_max_tiles * (args.most_tiles > 0) if packs else args.most_tiles,
        packs=packs,
        samples_per_row=rows.mean.num_samples,
        transformer_engine=args.transformer_impl == "transformer_engine",
        rsa=settings.get("rsa_weight", 1) > 0,
    )
    usable = (args.gpu_memory - args.reserved) * GIB
    cluster = Cluster(args.gpus, args.gpus_per_node, usable, args.global_batch_size)
    rates = {field.name: getattr(args, field.name) for field in fields(Assumptions) if field.name != "rows"}
    return run, cluster, Assumptions(**rates, rows=rows)


def find_unpacked(args, samples_per_row: float) -> str:
    """Say how fast the fastest layout with a row a sample is, at about as many samples a step."""
    flags = argparse.Namespace(**vars(args) | dict(packing_buffer_size=0, packing_max_tiles=None, fill=None))
    if args.lengths:
        flags.mean_length = flags.mean_tiles = None
    # As many for each GPU, so that no layout is left out for it.
    samples_per_gpu = args.global_batch_size * samples_per_row / args.gpus
    flags.global_batch_size = max(1, round(samples_per_gpu)) * args.gpus
    run, cluster, assumed = read_run(flags)
    plans = find_plans(run, cluster, assumed)[0]
    if not plans:
        return "\nwith a row a sample (--packing-buffer-size 0) no layout fits"
    speed = cluster.global_batch_size / plans[0].seconds
    return (
        f"\nthe fastest with a row a sample (--packing-buffer-size 0 --global-batch-size {cluster.global_batch_size}): "
        f"{describe(plans[0].layout)}, {format_two_digits(speed)} samples/s"
    )


def read_architecture(model: str) -> Architecture:
    if not (Path(model) / "config.json").is_file():
        return get_architecture(model)
    from rsa_megatron.models.hf_config import find_architecture  # imports transformers: seconds

    return find_architecture(model)


def explain_no_fit(run: Run, cluster: Cluster, too_large: list[Plan], args) -> str:
    """Name the smallest layout, or the nearest number of GPUs."""
    if too_large:
        nearest = too_large[0]
        return (
            f"no layout fits into {args.gpu_memory:g} GiB less {args.reserved:g} reserved; the smallest is "
            f"{describe(nearest.layout)}, which needs {format_memory(nearest.total)}: use larger GPUs or a smaller --seq-length"
        )
    return (
        f"--gpus {args.gpus} matches no layout of {args.model} with a global batch of {args.global_batch_size}; "
        f"--gpus {find_nearest_num_gpus(run, cluster)} does, or pass another --global-batch-size"
    )


def describe(layout: Layout) -> str:
    return (
        f"TP {layout.tensor}, PP {layout.pipeline}, DP {layout.data}, micro-batch {layout.micro_batch_size}, "
        f"recompute {layout.recompute}"
    )


def format_flags(layout: Layout, args) -> str:
    """Format the training script's command line."""
    flags = [f"--model {args.model} --stage {args.stage} --bf16 --transformer-impl {args.transformer_impl}"]
    flags += [f"--tensor-model-parallel-size {layout.tensor}"] * (layout.tensor > 1)
    flags += ["--sequence-parallel"] * layout.sequence_parallel
    flags += [f"--pipeline-model-parallel-size {layout.pipeline}"] * (layout.pipeline > 1)
    flags += [f"--micro-batch-size {layout.micro_batch_size} --global-batch-size {args.global_batch_size}"]
    flags += [f"--seq-length {args.seq_length}"]
    if args.packing_buffer_size or args.recipe_packs:
        flags += [f"--packing-buffer-size {args.packing_buffer_size}"]
    flags += [f"--packing-max-tiles {args.packing_max_tiles}"] * bool(args.packing_buffer_size)
    flags += ["--use-distributed-optimizer"] * layout.distributed_optimizer
    if layout.recompute == "full":
        flags += ["--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"]
    return " ".join(flags)


def print_assumptions(run: Run, assumed: Assumptions, args) -> None:
    names = [field.name for field in fields(assumed) if field.name != "rows"] + ["mean_length", "mean_tiles"]
    assumptions = ", ".join(f"{name.replace('_', ' ')} {getattr(args, name):.5g}" for name in names)
    row = assumed.rows.mean
    print(f"{args.model}, stage {args.stage}, bf16, {args.transformer_impl}; trained: {', '.join(run.trainable)}")
    print(f"{args.gpus} GPUs of {args.gpu_memory:g} GiB, {args.reserved:g} of them reserved")
    if run.packs:
        print(
            f"packed rows, from buffers of {args.packing_buffer_size} samples: {row.num_samples:.3g} samples a row, which fill it to "
            f"{row.num_positions / run.row_length:.3g}; the global batch of {args.global_batch_size} rows is "
            f"{args.global_batch_size * row.num_samples:.0f} samples"
        )
    print(f"memory: every row {run.row_length} positions and {run.num_tiles} tile(s)")
    print(f"time: {assumptions}; under PP every row is padded to {run.row_length}")
    if len(assumed.rows.rows) > 1:
        print(f"samples of {args.lengths}; without PP a step waits for the rank that has most to do (simulated)")
    if args.impl_is_default and args.transformer_impl == "local":
        print("Transformer Engine is not installed here; for where it is: --transformer-impl transformer_engine")
    print(
        "None of this has been measured at this size: memory estimates were within 4 % of small runs on local layers,"
    )
    print(
        "times follow from the assumptions. N: pairs that one RSA kernel compares, of all DP ranks' micro-batches; of layouts with"
    )
    print(
        "the same seconds the one with more pairs comes first, and those with N = 1, nothing to compare, come last.\n"
    )


def print_layouts(fitting: list[Plan], rejected: list[tuple[Layout, str]], run: Run, args) -> None:
    memory_unit, bytes_of_unit = choose_memory_unit(min(plan.total for plan in fitting[: args.show]))
    is_fast = min(plan.seconds for plan in fitting[: args.show]) < 0.1
    time_unit, seconds_of_unit = ("ms/step", 1e-3) if is_fast else ("s/step", 1)
    print(
        f"{'TP':>3}{'PP':>4}{'DP':>5}{'micro':>7}  {'recompute':<11}{'optimizer':<13}{memory_unit:>5}{'N':>7}{time_unit:>10}"
        f"{'samples/s':>11}"
    )
    for plan in fitting[: args.show]:
        one = plan.layout
        optimizer = "distributed" if one.distributed_optimizer else "-"
        num_pairs = round(one.num_rows * run.samples_per_row) if run.rsa else "-"
        speed = args.global_batch_size * run.samples_per_row / plan.seconds
        print(
            f"{one.tensor:>3}{one.pipeline:>4}{one.data:>5}{one.micro_batch_size:>7}  {one.recompute:<11}{optimizer:<13}"
            f"{plan.total / bytes_of_unit:>5.0f}{num_pairs:>7}{format_two_digits(plan.seconds / seconds_of_unit):>10}"
            f"{format_two_digits(speed):>11}"
        )
    print(f"\n{len(fitting)} layouts fit, {len(rejected)} are rejected")
    for reason, count in collections.Counter(reason.partition(":")[0] for _, reason in rejected).most_common():
        print(f"{count:>6}  {reason}")
    for layout, reason in rejected if args.show_refused else ():
        print(f"        {describe(layout)}: {reason}")


def print_best(best: Plan, run: Run, args) -> None:
    unit, bytes_of_unit = choose_memory_unit(best.total)
    print(f"\nmemory of the first layout in {unit}, on pipeline stage {best.stage}:")
    for part, num_bytes in best.memory.items():
        print(f"    {part:<16}{num_bytes / bytes_of_unit:>7.2f}")
    print(f"    {'total':<16}{best.total / bytes_of_unit:>7.2f}\n\n{format_flags(best.layout, args)}")
    if run.rsa and not run.compares_pairs(best.layout):
        print(
            "no layout that fits has pairs for RSA to compare: use more GPUs, a larger --global-batch-size, or --rsa-weight 0"
        )


def choose_memory_unit(num_bytes: float) -> tuple[str, int]:
    """Choose a unit that shows so many bytes as a number above 1: its name, and how many bytes it has."""
    return ("GiB", GIB) if num_bytes >= GIB else ("MiB", 2**20)


def format_memory(num_bytes: float) -> str:
    unit, bytes_of_unit = choose_memory_unit(num_bytes)
    return f"{num_bytes / bytes_of_unit:.{1 if num_bytes < 100 * GIB else 0}f} {unit}"


def format_two_digits(number: float) -> str:
    return f"{float(f'{number:.2g}'):g}"
