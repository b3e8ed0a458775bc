"""Fitting ReAlign on embeddings in files: time against reading the files, memory, and the same without care for either.

    python benchmarks/realign.py [--rows 1000000] [--threads 2] [--file FOLDER] [--append results/benchmarks.jsonl]

Two .npy files of --rows x 1280 numbers, images and texts, are written first: 5.1 GB each in float32 at a million rows, half of
that in float16. They come in pieces of 2048 rows (10 MB in float32), read into one buffer. Contenders, in turns:

    read       the pieces alone, in as many passes as ours takes: images once, texts twice
    ours       ReAlign.fit
    means      unit rows and their mean in float64 and nothing else, in one pass over each file: less than any fit must do
    plain      ReAlign as it is written down, a piece at a time: unit rows, means; traces; mu'. Images twice, texts three times

"cached" runs find the files in memory as far as they fit, "disk" runs start after the system has dropped them. Times are medians;
ratios are of medians. Memory is the growth of a fresh process's resident size at its peak, one process each, cached; the buffer
of a piece is part of it. The difference is the largest between ours and plain over the three means and the scale.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import numpy
import torch

from rsa_megatron.realign.realign import ReAlign
from rsa_megatron.realign.unit_rows import RowFaults, iterate_unit_blocks

# Copies of a piece in float64 are 21 MB. Above 32 MB the C library maps new memory for each, which costs plain more than its sums.
PIECE_ROWS = 2048
COLUMNS = (
    "type",
    "files",
    "read, s",
    "ours, s",
    "times reading",
    "rows a second",
    "means, s",
    "plain, s",
    "times faster than plain",
    "memory, MB",
    "plain, MB",
    "difference",
)


class Rows:
    """The rows of a .npy file, a piece after another, each in the memory of the last."""

    def __init__(self, path: Path):
        self.path = path

    def __iter__(self):
        with self.path.open("rb") as file:
            numpy.lib.format.read_magic(file)
            (num_rows, width), _, dtype = numpy.lib.format.read_array_header_1_0(file)
            piece = numpy.empty((min(PIECE_ROWS, num_rows), width), dtype)
            for start in range(0, num_rows, PIECE_ROWS):
                rows = piece[: num_rows - start]
                assert file.readinto(memoryview(rows).cast("B")) == rows.nbytes
                yield torch.from_numpy(rows)

    def drop_from_memory(self) -> None:
        with self.path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not on disk yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(images: Rows, texts: Rows) -> None:
    for rows in (images, texts, texts):
        for _ in rows:
            pass


def means(images: Rows, texts: Rows) -> list[torch.Tensor]:
    return [sum(unit_bD.sum(0) for unit_bD in iterate_unit_blocks(rows, RowFaults())) for rows in (images, texts)]


def plain(images: Rows, texts: Rows) -> dict:
    def mean_over(rows, function):
        total, count = 0, 0
        for piece in rows:
            x_nD = piece.double()
            total, count = total + function(x_nD / x_nD.norm(dim=1, keepdim=True)), count + len(piece)
        return total / count

    mu_x, mu_y = (mean_over(rows, lambda e: e.sum(0)) for rows in (images, texts))
    t_x, t_y = (
        mean_over(rows, lambda e, mu=mu: (e - mu).square().sum()) for rows, mu in ((images, mu_x), (texts, mu_y))
    )
    scale = (t_x / (t_y + 1e-10)).sqrt().item()
    drifted = mean_over(texts, lambda e: torch.nn.functional.normalize(mu_x + scale * (e - mu_y)).sum(0))
    return dict(image_mean_D=mu_x, text_mean_D=mu_y, projected_mean_D=drifted, scale=scale)


def ours(images: Rows, texts: Rows) -> dict:
    operator = ReAlign.fit(images, texts)
    return {name: getattr(operator, name) for name in ("image_mean_D", "text_mean_D", "projected_mean_D", "scale")}


CONTENDERS = {"read": read, "ours": ours, "means": means, "plain": plain}


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        return print(extra_memory(*args.memory_of))
    about = machine.description(torch.device("cpu"), args.threads)
    print(about)
    print(f"| {' | '.join(COLUMNS)} |")
    print("| --- " * len(COLUMNS) + "|")
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory(prefix="realign-", dir=args.file) as folder:
            sets = make_files(Path(folder), args.rows, args.width, dtype)
            memory = {name: memory_in_own_process(name, sets, args) for name in ("ours", "plain")}
            for files in args.files:
                figures = dict(dtype=dtype, width=args.width, rows=args.rows, memory_bytes=memory) | measure(
                    sets, files, args
                )
                print_row(figures)
                machine.append(args.append, "realign", about, figures)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    machine.add_arguments(parser)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the images, and of the texts")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "float16"], choices=["float16", "float32", "float64"]
    )
    parser.add_argument("--files", nargs="+", default=["cached", "disk"], choices=["cached", "disk"])
    parser.add_argument("--runs", type=int, default=5, help="of each contender")
    parser.add_argument(
        "--file",
        type=Path,
        help="folder to write the files in, and remove them from; by default the system's for temporary files",
    )
    parser.add_argument(
        "--memory-of", nargs=3, help=argparse.SUPPRESS
    )  # contender and both files, in a process of its own
    return parser.parse_args()


def make_files(folder: Path, num_rows: int, width: int, dtype: str) -> tuple[Rows, Rows]:
    """Images and texts around different means, with different spreads, their variances falling by power laws."""
    needed, free = 2 * num_rows * width * numpy.dtype(dtype).itemsize, shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        sys.exit(
            f"{folder} has {free / 1e9:.1f} GB left, and the files need {needed / 1e9:.1f}: pass --file FOLDER or fewer --rows"
        )
    paths = [folder / "images.npy", folder / "texts.npy"]
    for seed, (path, exponent, spread) in enumerate(zip(paths, (0.9, 0.65), (0.8, 1.2))):
        generator = torch.Generator().manual_seed(seed)
        mean_D = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
        scales_D = torch.arange(1, width + 1) ** -exponent
        scales_D *= spread / scales_D.norm()
        array = numpy.lib.format.open_memmap(path, "w+", dtype, (num_rows, width))
        for start in range(0, num_rows, PIECE_ROWS):
            rows = array[start : start + PIECE_ROWS]
            rows[:] = torch.randn(rows.shape, generator=generator).mul_(scales_D).add_(mean_D).numpy()
        array.flush()
    return Rows(paths[0]), Rows(paths[1])


def measure(sets: tuple[Rows, Rows], files: str, args) -> dict:
    times, results = {name: [] for name in CONTENDERS}, {}
    for _ in range(args.runs + 1):  # the first of each warms up
        for name, function in CONTENDERS.items():
            if files == "disk":
                for rows in sets:
                    rows.drop_from_memory()
            start = time.perf_counter()
            results[name] = function(*sets)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(runs[1:]) for name, runs in times.items()}
    return dict(
        files=files,
        seconds=medians,
        spread_s={name: [min(runs[1:]), max(runs[1:])] for name, runs in times.items()},
        times_reading=medians["ours"] / medians["read"],
        faster_than_plain=medians["plain"] / medians["ours"],
        difference=largest_difference(results["ours"], results["plain"]),
        scale=results["ours"]["scale"],
    )


def largest_difference(a: dict, b: dict) -> float:
    return max((torch.as_tensor(a[name]) - torch.as_tensor(b[name])).abs().max().item() for name in a)


def memory_in_own_process(name: str, sets: tuple[Rows, Rows], args) -> int:
    command = [
        sys.executable,
        __file__,
        "--threads",
        str(args.threads),
        "--memory-of",
        name,
        *(str(rows.path) for rows in sets),
    ]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def extra_memory(name: str, *paths: str) -> int:
    """Bytes by which a fit raises the peak over what the process holds before it."""
    few = torch.randn(64, 8).split(32)
    CONTENDERS[name](few, few)  # what is loaded once is no part of it
    sets = [Rows(Path(path)) for path in paths]
    return machine.growth_at_peak(lambda: CONTENDERS[name](*sets), torch.device("cpu"))


def print_row(figures: dict) -> None:
    seconds, memory = figures["seconds"], figures["memory_bytes"]
    print(
        f"| {figures['dtype']} | {figures['files']} | {seconds['read']:.2f} | {seconds['ours']:.2f} | {figures['times_reading']:.2f} | "
        f"{2 * figures['rows'] / seconds['ours']:,.0f} | {seconds['means']:.2f} | {seconds['plain']:.2f} | "
        f"{figures['faster_than_plain']:.2f} | {memory['ours'] / 1e6:.0f} | {memory['plain'] / 1e6:.0f} | {figures['difference']:.0e} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
