"""The share of a training step that is spent waiting for data, in the demo's training run, with 0, 1 and 2 data workers.

    python benchmarks/waiting_for_data.py [--processes 2] [--workers 0 1 2] [--runs 3] [--append results/benchmarks.jsonl]

Stage 1 of the demo model by examples/pretrain_llava_rsa.py, from random weights, on as many processes. A clock runs in each
whenever it asks its loader for a batch; the first iterations do not count. Settings go round in turns, figures are medians.
Ranks wait for each other at the end of each step, so the share is given of the rank that waits longest for its own data.
"""

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import demo_run
import machine
import torch

# The demo's batch and micro-batch (rsa_megatron/recipes.py).
_BATCH, _MICRO_BATCH = 32, 16


def main():
    args = parse()
    if args.train:
        return train(args.train)
    description = machine.description(torch.device("cpu"), args.threads) | {"processes": args.processes}
    print(description)
    taken = collections.defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="waiting-") as folder:
        demo_run.prepare(Path(folder), args.samples)
        for _ in range(args.runs):
            for workers in args.workers:
                taken[workers].append(measure(Path(folder), workers, args))
    figures = {
        workers: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for workers, runs in taken.items()
    }
    print(
        "| workers | ms a step | ms waiting for data | share of the step | of runs |\n| --- | --- | --- | --- | --- |"
    )
    for workers, row in figures.items():
        shares = [run["share"] for run in taken[workers]]
        row["spread"] = [min(shares), max(shares)]
        print(
            f"| {workers} | {row['step_s'] * 1e3:.0f} | {row['waiting_s'] * 1e3:.1f} | {row['share']:.1%} | "
            f"{min(shares):.1%} to {max(shares):.1%} |"
        )
    machine.append(args.append, "waiting_for_data", description, {"workers": figures})


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="data workers of each process")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--uncounted", type=int, default=5, help="iterations at the beginning that do not count")
    parser.add_argument(
        "--samples", type=int, default=2000, help="in the training data; more than its shuffle buffer of 1000"
    )
    parser.add_argument("--runs", type=int, default=3, help="of each number of workers")
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # a rank of the training run
    machine.add_arguments(parser).set_defaults(threads=max(1, os.cpu_count() // 2))
    return parser.parse_args()


def measure(folder: Path, workers: int, args) -> dict[str, float]:
    """Seconds of a step, and of these the waiting of the rank that waits longest."""
    flags = demo_run.flags(folder, "--train-iters", str(args.iterations), "--num-workers", str(workers))
    port = demo_run.free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--train", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=demo_run.environment(rank, args.processes, port, args.threads),
        )
        for rank in range(args.processes)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    for rank, output in zip(ranks, outputs):
        if rank.returncode:
            sys.exit(f"the training run failed:\n{output[-3000:]}")
    asked = [json.loads(output.splitlines()[-1]) for output in outputs]
    return max((of_whole_steps(of_rank, args) for of_rank in asked), key=lambda figures: figures["share"])


def of_whole_steps(asked: list[tuple[float, float]], args) -> dict[str, float]:
    """From when each batch was asked for and when it came; what follows the last step's first batch is no whole step."""
    num_micro_batches = _BATCH // (_MICRO_BATCH * args.processes)
    first, last = args.uncounted * num_micro_batches, len(asked) - num_micro_batches
    num_steps = (last - first) // num_micro_batches
    waiting_s = sum(came - began for began, came in asked[first:last]) / num_steps
    step_s = (asked[last][0] - asked[first][0]) / num_steps
    return {"step_s": step_s, "waiting_s": waiting_s, "share": waiting_s / step_s}


def train(flags: list[str]) -> None:
    """One rank of the training script, which ends with a line of when it asked for each batch and when that came."""
    sys.path.insert(0, str(demo_run.SCRIPT.parent))
    import pretrain_llava_rsa

    from rsa_megatron.data.loaders import TrainLoader

    asked, read = [], TrainLoader.__next__

    def timed(loader):
        began = time.perf_counter()
        batch = read(loader)
        asked.append((began, time.perf_counter()))
        return batch

    TrainLoader.__next__ = timed
    sys.argv = [str(demo_run.SCRIPT), *flags]
    pretrain_llava_rsa.main()
    print(f"\n{json.dumps(asked)}", flush=True)
    os._exit(0)  # data workers would be waited for, and what they say would come after this line


if __name__ == "__main__":
    main()
