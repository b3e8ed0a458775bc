"""Curves of training runs, from their metrics.jsonl: losses, mean distances of the kernels, mutual-kNN; and the figures in words.

    python examples/demo/plot_runs.py --group "with RSA" demo/stage1/metrics.jsonl --out demo/stage1/run.png
    python examples/demo/plot_runs.py --group "with RSA" a/*.jsonl --group "without" b/*.jsonl --out c.png --jsonl c.jsonl

A group is the same run under several seeds; it has one colour, and its figures are given as mean and spread.
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogFormatter

from rsa_megatron.plots.training_figures import FIGURES, read_figures

PANELS = (
    ("lm loss",),
    ("validation lm loss",),
    ("rsa loss",),
    ("rsa dist vision", "rsa dist text"),
    ("mutual-knn", "chance"),
)


def main():
    args = parse()
    groups = {label: [read_run(Path(file)) for file in files] for label, *files in args.group}
    print(in_words(groups))
    draw(groups, args.out)
    print(f"curves: {args.out}")
    if args.jsonl:
        lines = [json.dumps({"group": label, **run}) for label, runs in groups.items() for run in runs]
        args.jsonl.write_text("\n".join(lines) + "\n")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--group",
        nargs="+",
        action="append",
        required=True,
        metavar=("LABEL", "FILE"),
        help="a label, and metrics.jsonl of one or more runs of examples/pretrain_llava_rsa.py",
    )
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--jsonl", type=Path, help="file for the numbers that are drawn, a line a run")
    args = parser.parse_args()
    for label, *files in args.group:
        if not files:
            parser.error(f"--group {label}: no metrics.jsonl is named after the label")
    return args


def read_run(file: Path) -> dict[str, list]:
    """Return {figure: [[iteration, value], ...]} of a training run."""
    try:
        run = read_figures(file)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    if not run["lm loss"]:
        raise SystemExit(f"error: {file} has no iteration of training in it")
    return {name: [list(item) for item in sorted(values.items())] for name, values in run.items()}


def in_words(groups: dict[str, list[dict]]) -> str:
    """A line a group and figure: its first and its last value; over several runs mean ± standard deviation."""
    width = max(len(label) for label in groups)
    lines = [f"{'':<{width + 22}}{'first':>20}{'last':>20}"]
    for name in FIGURES:
        for label, runs in groups.items():
            if all(run[name] for run in runs):
                first, last = ([run[name][end] for run in runs] for end in (0, -1))
                lines.append(
                    f"{label:<{width}}  {name:<20}{spread(first):>20}{spread(last):>20}   "
                    f"iterations {first[0][0]} and {last[0][0]}"
                )
    lines.append(
        "mutual-knn: held-out pairs, the image alone against the caption alone; chance is what random features have"
    )
    return "\n".join(lines)


def spread(points: list) -> str:
    values = [value for _, value in points]
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def draw(groups: dict[str, list[dict]], out: Path) -> None:
    figure, axes = plt.subplots(1, len(PANELS), figsize=(17, 3.2), layout="constrained")
    for axis, names in zip(axes, PANELS):
        for color, (label, runs) in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], groups.items()):
            for run, name, style in ((run, name, style) for run in runs for name, style in zip(names, ("-", "--"))):
                axis.plot(
                    *zip(*run[name]),
                    linestyle=":" if name == "chance" else style,
                    color="grey" if name == "chance" else color,
                    marker="." if name in ("mutual-knn", "validation lm loss") else None,
                    label=name if name == "chance" else f"{label}: {name}" if len(names) > 1 else label,
                )
        axis.set(title=" and ".join(names), xlabel="iteration", yscale="linear" if "mutual-knn" in names else "log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)) if axis.get_yscale() == "log" else "")
        handles, labels = axis.get_legend_handles_labels()
        one_of_each = dict(zip(labels, handles))
        if len(one_of_each) > 1:
            axis.legend(one_of_each.values(), one_of_each.keys(), fontsize="x-small")
    axes[-1].set_ylim(bottom=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
