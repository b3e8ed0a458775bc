"""How long the commands take to answer, and a training run to end its first iteration; and what of that are imports.

    python benchmarks/start_up.py [--runs 5] [--append results/benchmarks.jsonl]

Each command is a process of its own; they go round in turns, and figures are medians. Files are in the page cache after the
first round, which does not count. "import torch" is what cannot be had for less: whatever trains or converts needs it.
The training run is examples/pretrain_llava_rsa.py on the demo's data, one process without torchrun, from its start to the
log line of the first iteration, split by what it prints on the way. CPU seconds are the process's own, without its data
workers: on a machine that others use, too, they are what compares. Imports are once more taken apart by Python's
-X importtime, which is slower: each package counts what its own modules took, without those that they import.
"""

import argparse
import collections
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import demo_run
import machine
import torch

# Run as a script is run, but for the line that it prints once all is imported.
_TRAIN = (
    "import sys; sys.path.insert(0, sys.argv[1]); del sys.argv[1]; import pretrain_llava_rsa; "
    "print('imported', flush=True); pretrain_llava_rsa.main()"
)
#: Each part of the start, and what is in the line that ends it.
PARTS = {
    "interpreter and imports": "imported",
    "arguments, tokenizer": "> initializing torch distributed",
    "Megatron's initialisation": "[after megatron is initialized]",
    "model and optimizer": "[after model, optimizer, and learning rate scheduler are built]",
    "data sets": "[after dataloaders are built]",
    "first iteration, its data included": " iteration        1/",
}
# A line of -X importtime: a module's own microseconds, those of all that it imports too, and its name, indented.
_IMPORT = re.compile(r"import time: +(?P<microseconds>\d+) \| +\d+ \| +(?P<package>\w+)")
_NUM_PACKAGES = 10


def main():
    args = parse()
    description = machine.description(torch.device("cpu"), args.threads)
    print(description)
    with tempfile.TemporaryDirectory(prefix="start-up-") as folder:
        demo_run.prepare(Path(folder), args.samples)
        figures = measure(Path(folder), args)
        packages = imported_packages(Path(folder), args.threads)
    print_table("command", figures["commands"])
    print_table("part of a training run's start", figures["parts"] | {"all": figures["start"]})
    print("| package | s of its own imports | modules |\n| --- | --- | --- |")
    for name, package in packages.items():
        print(f"| {name} | {package['s']:.2f} | {package['modules']} |")
    machine.append(args.append, "start_up", description, {**figures, "packages": packages})


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each command")
    parser.add_argument(
        "--samples", type=int, default=2000, help="in the training data; more than its shuffle buffer of 1000"
    )
    return machine.add_arguments(parser).parse_args()


def commands(folder: Path) -> dict[str, list]:
    """What is timed until it ends."""
    return {
        "python -c pass": ["-c", "pass"],
        'python -c "import torch"': ["-c", "import torch"],
        'python -c "import rsa_megatron"': ["-c", "import rsa_megatron"],
        "python -m checkpoint_conversion --help": ["-m", "checkpoint_conversion", "--help"],
        "rsa-megatron measure --help": ["-m", "rsa_megatron", "measure", "--help"],
        "rsa-megatron data --help": ["-m", "rsa_megatron", "data", "--help"],
        "examples/pretrain_llava_rsa.py --help": [demo_run.SCRIPT, "--tokenizer-model", folder / "tokenizer", "--help"],
    }


def measure(folder: Path, args) -> dict:
    taken, parts = collections.defaultdict(list), collections.defaultdict(list)
    for _ in range(args.runs + 1):  # the first of each warms up the page cache
        for name, arguments in commands(folder).items():
            taken[name].append(timed(arguments, args.threads))
        for name, figures in timed_start(folder, args.threads).items():
            parts[name].append(figures)
    start = [
        {unit: sum(part[run][unit] for part in parts.values()) for unit in ("s", "cpu_s")}
        for run in range(args.runs + 1)
    ]
    return dict(
        commands={name: medians(runs) for name, runs in taken.items()},
        parts={name: medians(runs) for name, runs in parts.items()},
        start=medians(start),
    )


def medians(runs: list[dict]) -> dict:
    counted = runs[1:]
    spread = [min(run["s"] for run in counted), max(run["s"] for run in counted)]
    return {unit: statistics.median(run[unit] for run in counted) for unit in ("s", "cpu_s")} | {"spread_s": spread}


def timed(arguments: list, threads: int) -> dict[str, float]:
    """Seconds until a Python process with these arguments has ended."""
    start = time.perf_counter()
    process = start_python(arguments, threads)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # it has been waited for
    if process.returncode:
        sys.exit(f"{' '.join(map(str, arguments))} failed:\n{output}")
    return {"s": time.perf_counter() - start, "cpu_s": usage.ru_utime + usage.ru_stime}


def timed_start(folder: Path, threads: int) -> dict[str, dict[str, float]]:
    """Seconds of each of PARTS."""
    arguments = ["-c", _TRAIN, demo_run.SCRIPT.parent, *demo_run.flags(folder, "--train-iters", "1")]
    then, cpu_then = time.perf_counter(), 0.0
    process = start_python(arguments, threads)
    marks, found, output = list(PARTS.items()), {}, []
    for line in process.stdout:
        output.append(line)
        if marks and marks[0][1] in line:
            now, cpu_now = time.perf_counter(), cpu_seconds(process.pid)
            found[marks.pop(0)[0]] = {"s": now - then, "cpu_s": cpu_now - cpu_then}
            then, cpu_then = now, cpu_now
    if process.wait() or marks:
        sys.exit(f"the training run failed, or did not print {marks and marks[0][1]!r}:\n{''.join(output[-20:])}")
    return found


def start_python(arguments: list, threads: int, **options) -> subprocess.Popen:
    environment = demo_run.environment(0, 1, demo_run.free_port(), threads)
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT) | options
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=environment, cwd=demo_run.ROOT, text=True, **streams
    )


def cpu_seconds(process_id: int) -> float:
    """Of a process that runs, and its threads: Linux counts hundredths."""
    # After the name, which may hold anything, in brackets; utime and stime are fields 14 and 15 of proc(5).
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def imported_packages(folder: Path, threads: int) -> dict[str, dict]:
    """The packages that take longest of the training script's imports."""
    code = f"import sys; sys.path.insert(0, {str(demo_run.SCRIPT.parent)!r}); import pretrain_llava_rsa"
    process = start_python(["-X", "importtime", "-c", code], threads, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    packages = collections.defaultdict(lambda: {"s": 0.0, "modules": 0})
    for line in process.stderr:
        if found := _IMPORT.match(line):
            package = packages[found["package"]]
            package["s"] += int(found["microseconds"]) / 1e6
            package["modules"] += 1
    if process.wait():
        sys.exit("the training script cannot be imported")
    return dict(sorted(packages.items(), key=lambda item: -item[1]["s"])[:_NUM_PACKAGES])


def print_table(what: str, rows: dict[str, dict]) -> None:
    print(f"| {what} | s | CPU s | of runs, s |\n| --- | --- | --- | --- |")
    for name, row in rows.items():
        low, high = row["spread_s"]
        print(f"| {name} | {row['s']:.2f} | {row['cpu_s']:.2f} | {low:.2f} to {high:.2f} |")
    print()


if __name__ == "__main__":
    main()
