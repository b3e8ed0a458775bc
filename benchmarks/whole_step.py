"""A whole training step with RSA against the same without, in turns: time and peak memory.

    python benchmarks/whole_step.py --demo demo [--processes 2] [--append results/benchmarks.jsonl] [-- flags of the training script]

Two runs of examples/pretrain_llava_rsa.py, alike but for --rsa-weight 0 in one of them, stand side by side; one trains while
the other waits, a few iterations each. A turn's time is taken from its first forward pass to the next turn's, so that
reading, both passes, the optimizer and the log are in it. The figure is the median, over pairs of turns that follow each
other, of time with RSA over time without; the two change who begins. The data and the tokenizer are the demo's (`--demo`: as `make
demo` leaves it, written where it is missing). Memory is the peak of a process's resident size, or on a GPU of its tensors.
"""

import argparse
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
from demo_run import ROOT

SIDES = {"with": [], "without": ["--rsa-weight", "0"]}
# Asked before Megatron is imported, which without a CUDA device is given a stand-in for one.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_POLL_S = 0.0005


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
    runs = {side: start(side, args, folder) for side in SIDES}
    times = {side: [] for side in SIDES}
    try:
        for turn in range(args.turns + 1):
            for side in list(SIDES)[:: 1 if turn % 2 else -1]:
                times[side].append(take_turn(side, turn, args, folder, runs))
        for side, run in runs.items():
            (folder / f"{side}-go-{args.turns + 1}").touch()
            if run.wait():
                raise SystemExit(f"error: the run {side} RSA failed:\n{(folder / f'{side}.log').read_text()[-8000:]}")
    finally:
        for run in runs.values():
            run.kill()
    counted = {side: [seconds / args.iterations for seconds in turns[1:]] for side, turns in times.items()}
    ratios = [a / b for a, b in zip(counted["with"], counted["without"])]
    memory = {side: max(int(file.read_text()) for file in folder.glob(f"{side}-peak-*")) for side in SIDES}
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return dict(
        processes=args.processes,
        turns=args.turns,
        flags=args.flags,
        seconds={side: statistics.median(turns) for side, turns in counted.items()},
        ratio=statistics.median(ratios),
        quartiles=[quartiles[0], quartiles[2]],
        peak_bytes=memory,
        memory_ratio=memory["with"] / memory["without"],
    )


def start(side: str, args, folder: Path) -> subprocess.Popen:
    iterations = (args.turns + 1) * args.iterations + 1  # the last ends the last turn
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(args.processes),
        __file__,
        "--side",
        side,
        "--folder",
        folder,
        "--iterations",
        str(args.iterations),
        "--",
        *demo_run.flags(args.demo, "--log-interval", "10", "--train-iters", str(iterations)),
        *args.flags,
        *SIDES[side],
    ]
    log = open(folder / f"{side}.log", "w")
    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": str(threads_of(args))}
    )


def threads_of(args) -> int:
    """Of each process: those of all share the cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // args.processes))


def take_turn(side: str, turn: int, args, folder: Path, runs: dict) -> float:
    (folder / f"{side}-go-{turn}").touch()
    done = [folder / f"{side}-done-{turn}-{rank}" for rank in range(args.processes)]
    while not all(file.exists() for file in done):
        if runs[side].poll() is not None:
            raise SystemExit(f"error: the run {side} RSA ended early:\n{(folder / f'{side}.log').read_text()[-8000:]}")
        time.sleep(_POLL_S)
    return max(float(file.read_text()) for file in done)


def train(args) -> None:
    """One rank of a run: the training script, whose forward step waits for its turns."""
    sys.path.insert(0, str(ROOT / "examples"))
    sys.argv = ["pretrain_llava_rsa.py", *args.flags]
    import pretrain_llava_rsa

    pretrain_llava_rsa.forward_step = Turns(args, pretrain_llava_rsa.forward_step)
    pretrain_llava_rsa.main()
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else machine.resident_bytes("VmHWM")
    (args.folder / f"{args.side}-peak-{os.environ['RANK']}").write_text(str(peak))


class Turns:
    """A forward step that stops before the first micro-batch of every turn until it may go on, and says how long the turn took."""

    def __init__(self, args, forward_step):
        self._args, self._forward_step = args, forward_step
        self._calls, self._turn, self._begin = 0, -1, None

    def __call__(self, *args, **kwargs):
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        if self._calls % (self._args.iterations * get_num_microbatches()) == 0:
            self._change()
        self._calls += 1
        return self._forward_step(*args, **kwargs)

    def _change(self) -> None:
        machine.synchronize(DEVICE)
        name = self._args.folder / self._args.side
        if self._begin is not None:
            unfinished = Path(f"{name}-unfinished-{os.environ['RANK']}")
            unfinished.write_text(str(time.perf_counter() - self._begin))
            unfinished.rename(f"{name}-done-{self._turn}-{os.environ['RANK']}")
        self._turn += 1
        while not os.path.exists(f"{name}-go-{self._turn}"):
            time.sleep(_POLL_S)
        self._begin = time.perf_counter()


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
