"""A whole training step with RSA against the same without, in turns: time and peak memory.

    python benchmarks/whole_step.py --demo demo [--processes 2] [--append results/benchmarks.jsonl] [-- flags of the training script]

Two runs of examples/pretrain_llava_rsa.py, alike but for --rsa-weight 0 in one of them, stand side by side; one trains while
the other waits, a few iterations each. A turn's time is taken from its first forward pass to the next turn's, so that
reading, both passes, the optimizer and the log are in it. The figure is the median, over pairs of turns that follow each
other, of time with RSA over time without; the two change who begins. The data and the tokenizer are the demo's (`--demo`: as `make
demo` leaves it, written where it is missing). Memory is the peak of a process's resident size, or on a GPU of its tensors.
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import demo_run
import machine
import torch
import turns
from demo_run import ROOT

SIDES = {"with": [], "without": ["--rsa-weight", "0"]}
# Asked before Megatron is imported, which without a CUDA device is given a stand-in for one.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main():
    args = parse()
    if args.side:
        return train(args)
    about = machine.description(DEVICE, threads_of(args))
    prepare = [
        sys.executable,
        ROOT / "examples" / "demo" / "prepare_data.py",
        "--out",
        args.demo,
        "--kinds",
        "captions",
    ]
    subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args, Path(folder))
    print(about)
    print(
        "| processes | ms an iteration with RSA | without | with over without | quartiles | peak memory with, MB | without | over |"
    )
    print("| --- " * 8 + "|")
    print(table_row(figures))
    machine.append(args.append, "whole_step", about, figures)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="folder with the demo's data")
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--turns", type=int, default=20, help="of each side, after one that is not counted")
    parser.add_argument("--iterations", type=int, default=3, help="of each turn")
    parser.add_argument("--append", type=Path, help="JSONL file to add the figures to")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # in a process of a run
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help="flags of the training script, after --")
    return parser.parse_args()


def measure(args, folder: Path) -> dict:
    num_iterations = (args.turns + 1) * args.iterations + 1  # the last ends the last turn
    flags = demo_run.flags(args.demo, "--log-interval", "10", "--train-iters", str(num_iterations)) + args.flags
    shared = dict(processes=args.processes, iterations=args.iterations, threads=threads_of(args))
    runs = {side: turns.start(__file__, side, folder, flags=flags + more, **shared) for side, more in SIDES.items()}
    times = {side: [] for side in SIDES}
    try:
        for turn in range(args.turns + 1):
            for side in list(SIDES)[:: 1 if turn % 2 else -1]:
                name = f"{side} RSA"
                taken = turns.take_turn(side, turn, folder, runs[side], ranks=args.processes, name=name)
                times[side].append(max(rank["seconds"] for rank in taken))
        for side, run in runs.items():
            turns.end(side, args.turns + 1, folder, run, name=f"{side} RSA")
    finally:
        for run in runs.values():
            run.kill()
    counted = {side: [seconds / args.iterations for seconds in taken[1:]] for side, taken in times.items()}
    ratios = [a / b for a, b in zip(counted["with"], counted["without"])]
    memory = {side: max(int(file.read_text()) for file in folder.glob(f"{side}-peak-*")) for side in SIDES}
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return dict(
        processes=args.processes,
        turns=args.turns,
        flags=args.flags,
        seconds={side: statistics.median(taken) for side, taken in counted.items()},
        ratio=statistics.median(ratios),
        quartiles=[quartiles[0], quartiles[2]],
        peak_bytes=memory,
        memory_ratio=memory["with"] / memory["without"],
    )


def threads_of(args) -> int:
    """Of each process: those of all share the cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // args.processes))


def train(args) -> None:
    """One rank of a run: the training script, whose forward step waits for its turns."""
    turns.train(args.flags, functools.partial(turns.Turns, args, DEVICE))
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else machine.resident_bytes("VmHWM")
    (args.folder / f"{args.side}-peak-{os.environ['RANK']}").write_text(str(peak))


def table_row(figures: dict) -> str:
    times = [f"{1000 * figures['seconds'][side]:.0f}" for side in SIDES]
    memory = [f"{figures['peak_bytes'][side] / 1e6:.0f}" for side in SIDES]
    row = [
        str(figures["processes"]),
        *times,
        f"{figures['ratio']:.3f}",
        "{:.3f} to {:.3f}".format(*figures["quartiles"]),
        *memory,
        f"{figures['memory_ratio']:.3f}",
    ]
    return f"| {' | '.join(row)} |"


if __name__ == "__main__":
    main()
