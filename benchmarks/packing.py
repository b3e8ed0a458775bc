"""What packing saves: how full rows are, the packer's time, and real tokens a second of training packed against padded.

    python benchmarks/packing.py --demo demo [--turns 6] [--append results/benchmarks.jsonl]

Fill: the samples of the demo's stages 1.5 and 2, as `rsa-megatron data fill` measures them, in rows of 1792 and in those that are trained
with below; and of the recipes of
llava-ov-7b, whose samples are assumed (ASSUMED), in rows of 8192 and 16384. Buffers of 1000. The packer's time is CPU time of one
thread.

Tokens: training runs of the demo's stages on two processes, packed and padded as without packing, that take turns (turns.py). A token
counts where it is a sample's: images spliced in, no padding, no label's last token. Once under data parallelism, where a micro-batch of 8 is padded
to its longest; once in two pipeline stages, where it is padded to --seq-length. Both read about as many samples in a step. The figure is
the median, over pairs of turns that follow each other, of tokens a second packed over padded; the two change who begins.
"""

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import torch
import turns
from demo_run import ROOT

from rsa_megatron.anyres import ImageLayout, choose_grid
from rsa_megatron.data.packing import pack_buffers
from rsa_megatron.data.row_fill import measure_fill
from rsa_megatron.models.architectures import get_architecture
from rsa_megatron.planning.most_tiles import count_row_tiles
from rsa_megatron.recipes import recipe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STAGES = ("1.5", "2")
_BUFFER = 1000
#: Rows that the demo's stages are trained with, and how many of their samples such a row holds; and one that is looked at for both.
_DEMO_ROWS = {"1.5": (2048, 8), "2": (1696, 5)}
_DEMO_ROW = 1792
#: Of a stage's samples, shares with pictures of width x height, or none; and half of the texts have up to so many tokens
#: (log-normal, sigma 0.6). No data set was read: these are usual sizes of pictures of the sources that examples/mixtures names.
ASSUMED = {
    "1.5": [
        (0.15, (300, 225), 150),
        (0.29, (500, 375), 180),
        (0.25, (640, 480), 180),
        (0.18, (1024, 683), 180),
        (0.105, (800, 1100), 300),
        (0.025, None, 400),
    ],
    "2": [
        (0.16, (336, 336), 150),
        (0.22, (500, 375), 150),
        (0.23, (640, 480), 150),
        (0.12, (1024, 768), 200),
        (0.07, (1280, 960), 200),
        (0.05, (1700, 2200), 300),
        (0.15, None, 400),
    ],
}
#: Flags of the two layouts of two processes.
LAYOUTS = {"data parallel": [], "pipeline": ["--pipeline-model-parallel-size", "2"]}


def main():
    args = parse()
    if args.side:
        return turns.train(args.flags, functools.partial(CountedTurns, args, DEVICE))
    about = machine.description(DEVICE, threads_of(args)) | {"processes": args.processes}
    print(about)
    prepare = [sys.executable, ROOT / "examples" / "demo" / "prepare_data.py", "--out", args.demo]
    sizes = ["--train", str(args.scenes), "--validation", "1"] if args.scenes else []
    subprocess.run([*prepare, *sizes], check=True, stdout=subprocess.DEVNULL)
    fills = measure_fills(args)
    print_fills(fills)
    speeds = []
    print_speed_head()
    for layout in args.layouts:
        for stage in args.stages:
            with tempfile.TemporaryDirectory() as folder:
                speeds.append(measure_speed(args, layout, stage, Path(folder)))
            print_speed(speeds[-1])
    machine.append(args.append, "packing", about, {"fill": fills, "tokens": speeds})


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="folder with the demo's data")
    parser.add_argument("--scenes", type=int, help="of each data set, where they are made; those of prepare_data.py")
    parser.add_argument("--samples", type=int, default=10_000, help="whose lengths are measured, or drawn")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--batch", type=int, default=32, help="samples of a step where they are padded")
    parser.add_argument("--turns", type=int, default=6, help="of each side, after one that is not counted")
    parser.add_argument("--iterations", type=int, default=2, help="of each turn")
    parser.add_argument("--append", type=Path, help="JSONL file to add the figures to")
    parser.add_argument("--side", choices=("packed", "padded"), help=argparse.SUPPRESS)  # in a process of a run
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help="flags of the training script, after --")
    args = parser.parse_args()
    args.demo = args.demo.resolve()
    return args


def threads_of(args) -> int:
    """Of each process: those of all share the cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // args.processes))


def measure_fills(args) -> list[dict]:
    """Measure the fill of each stage's rows, of the demo and of the recipes of llava-ov-7b."""
    rows = []
    for stage in args.stages:
        found = read_demo_lengths(args, stage)
        for row_length in (_DEMO_ROW, _DEMO_ROWS[stage][0]):
            rows.append(pack(f"demo, stage {stage}", *found, "demo", stage, row_length))
    for stage in args.stages:
        row_length = recipe("llava-ov-7b", stage)["seq_length"]
        found = draw_lengths(stage, args.samples)
        rows.append(pack(f"llava-ov-7b, stage {stage}, assumed", *found, "llava-ov-7b", stage, row_length))
    return rows


def read_demo_lengths(args, stage: str) -> tuple[list[int], list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "lengths.json")
        command = [sys.executable, "-m", "rsa_megatron", "data", "fill", str(mixture(args, stage)), "--model", "demo"]
        command += ["--stage", stage, "--tokenizer", str(args.demo / "tokenizer"), "--row-lengths", str(_DEMO_ROW)]
        command += ["--samples", str(args.samples), "--out", str(out)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if result.returncode:
            sys.exit(f"error: {' '.join(command)} failed:\n{result.stderr[-3000:]}")
        found = json.loads(out.read_text())
    return found["positions"], found["tiles"]


def draw_lengths(stage: str, num_samples: int) -> tuple[list[int], list[int]]:
    """Draw positions and tiles of assumed samples, as the stage's recipe cuts their pictures."""
    architecture, settings = get_architecture("llava-ov-7b"), recipe("llava-ov-7b", stage)
    vision, draw = architecture.vision, random.Random(0)
    grids = settings["image_grids"] or [
        (height // vision.image_size, width // vision.image_size) for height, width in architecture.grid_pinpoints
    ]
    pinpoints = [(rows * vision.image_size, columns * vision.image_size) for rows, columns in grids]
    shares, pictures, texts = zip(*ASSUMED[stage])
    positions, tiles = [], []
    for kind in draw.choices(range(len(shares)), shares, k=num_samples):
        length, num_tiles = round(draw.lognormvariate(0, 0.6) * texts[kind]) + 20, 0
        if pictures[kind]:
            # Pictures of a source have not all the same size.
            width, height = (max(28, round(side * draw.uniform(0.8, 1.25))) for side in pictures[kind])
            layout = ImageLayout(height, width, *choose_grid(height, width, pinpoints, vision.image_size))
            length, num_tiles = (
                length + layout.num_tokens(vision.tokens_per_side, architecture.max_tiles),
                layout.num_tiles,
            )
        positions.append(min(length, settings["seq_length"]))
        tiles.append(num_tiles)
    return positions, tiles


def pack(name: str, positions: list[int], tiles: list[int], model: str, stage: str, row_length: int) -> dict:
    """Pack samples: the fill, and the packer's CPU time a sample."""
    settings = recipe(model, stage) | {"seq_length": row_length}
    max_tiles = count_row_tiles(settings, get_architecture(model)).default
    keys = [str(number) for number in range(len(positions))]
    figures = measure_fill(positions, tiles, keys, row_length=row_length, max_tiles=max_tiles, buffer_size=_BUFFER)
    start = time.thread_time()
    for _ in pack_buffers(positions, tiles, keys, row_length, max_tiles, _BUFFER):
        pass
    seconds = (time.thread_time() - start) / len(positions)
    return dict(
        data=name,
        row_length=row_length,
        max_tiles=max_tiles,
        samples=len(positions),
        mean=sum(positions) / len(positions),
        samples_per_row=figures.samples_per_row,
        fill=figures.fill,
        fill_padded=figures.fill_unpacked,
        packer_us=1e6 * seconds,
    )


def mixture(args, stage: str) -> Path:
    return args.demo / "data" / f"stage{stage.replace('.', '_')}.yaml"


def make_sides(stage: str, num_samples: int) -> dict[str, list[str]]:
    """Return the flags of both sides, for about as many samples a step."""
    row_length, samples_per_row = _DEMO_ROWS[stage]
    packed = ["--packing-buffer-size", str(_BUFFER), "--seq-length", str(row_length), "--micro-batch-size", "1"]
    packed += ["--global-batch-size", str(num_samples // samples_per_row)]
    padded = ["--packing-buffer-size", "0", "--seq-length", "448", "--micro-batch-size", "8"]
    return {"packed": packed, "padded": [*padded, "--global-batch-size", str(num_samples)]}


def measure_speed(args, layout: str, stage: str, folder: Path) -> dict:
    """Train the demo's stage packed and padded, in turns."""
    num_iterations = (args.turns + 1) * args.iterations + 1  # the last ends the last turn
    flags = ["--model", "demo", "--stage", stage, "--data-path", str(mixture(args, stage))]
    flags += ["--tokenizer-model", str(args.demo / "tokenizer"), "--eval-iters", "0", "--mutual-knn-samples", "0"]
    flags += ["--log-interval", "10", "--train-iters", str(num_iterations), *LAYOUTS[layout], *args.flags]
    shared = dict(processes=args.processes, iterations=args.iterations, threads=threads_of(args))
    runs = {
        side: turns.start(__file__, side, folder, flags=flags + own, **shared)
        for side, own in make_sides(stage, args.batch).items()
    }
    ranks = args.processes if layout == "data parallel" else args.processes // 2
    rates, seconds = {side: [] for side in runs}, {side: [] for side in runs}
    try:
        for turn in range(args.turns + 1):
            for side in list(runs)[:: 1 if turn % 2 else -1]:
                taken = turns.take_turn(side, turn, folder, runs[side], ranks=ranks, name=side)
                seconds[side].append(max(rank["seconds"] for rank in taken))
                rates[side].append(sum(rank["tokens"] for rank in taken) / seconds[side][-1])
        for side, run in runs.items():
            turns.end(side, args.turns + 1, folder, run, name=side)
    finally:
        for run in runs.values():
            run.kill()
    ratios = [packed / padded for packed, padded in zip(rates["packed"][1:], rates["padded"][1:])]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return dict(
        layout=layout,
        stage=stage,
        turns=args.turns,
        tokens_per_s={side: statistics.median(rate[1:]) for side, rate in rates.items()},
        ratio=statistics.median(ratios),
        quartiles=[quartiles[0], quartiles[2]],
    )


class CountedTurns(turns.Turns):
    """Turns that count the samples' own positions that this rank reads."""

    def __init__(self, args, device, forward_step):
        super().__init__(args, device, forward_step)
        self._tokens = 0

    def __call__(self, data_iterator, *args, **kwargs):
        return super().__call__(data_iterator and self._read(data_iterator), *args, **kwargs)

    def count(self) -> dict:
        tokens, self._tokens = self._tokens, 0
        return {"tokens": tokens}

    def _read(self, data_iterator):
        while True:  # Megatron's iterator gives batches to next() alone
            batch = next(data_iterator)
            # A packed sequence has its last token as well, which elsewhere is a label alone.
            last_tokens = 0 if batch.sequence_lengths is None else len(batch.sequence_lengths)
            self._tokens += int(batch.row_lengths.sum()) - last_tokens
            yield batch


def print_fills(fills: list[dict]) -> None:
    print(
        "| data | row | most tiles | samples | mean positions | samples a row | fill, packed | padded to the row | packer, µs a sample |"
    )
    print("| --- " * 9 + "|")
    for row in fills:
        print(
            f"| {row['data']} | {row['row_length']} | {row['max_tiles']} | {row['samples']} | {row['mean']:.0f} | {row['samples_per_row']:.2f} | "
            f"{row['fill']:.3f} | {row['fill_padded']:.3f} | {row['packer_us']:.1f} |"
        )


def print_speed_head() -> None:
    print("\n| layout | stage | real tokens/s packed | padded | packed over padded | quartiles |")
    print("| --- " * 6 + "|", flush=True)


def print_speed(row: dict) -> None:
    rates = [f"{row['tokens_per_s'][side]:.0f}" for side in ("packed", "padded")]
    low, high = row["quartiles"]
    print(
        f"| {row['layout']} | {row['stage']} | {' | '.join(rates)} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
