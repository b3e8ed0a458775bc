"""Draw curves of training runs from their metrics.jsonl: losses, mean distances of the kernels, mutual-kNN; print a summary.

    python examples/demo/plot_runs.py --group "with RSA" demo/stage1/metrics.jsonl --out demo/stage1/run.png
    python examples/demo/plot_runs.py --group "with RSA" a/*.jsonl --group "without" b/*.jsonl --out c.png --jsonl c.jsonl
    python examples/demo/plot_runs.py --from-jsonl c.jsonl --out c.png

A group is the same run under several seeds; it has one colour, a thick line for the mean and a thin one for each run, and its
figures are given as mean and spread.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rsa_megatron.json_lines import is_name, json_lines
from rsa_megatron.plots import style
from rsa_megatron.plots.training_figures import FIGURES, read_figures

# Title and unit of each panel, and what it shows; the second of two figures has a dashed line.
PANELS = {
    "LM loss, training": ("nats per token", "lm loss"),
    "LM loss, validation": ("nats per token", "validation lm loss"),
    "RSA loss, before its weight": ("squared distance", "rsa loss"),
    "mean distance of samples": ("distance of features", "rsa dist vision", "rsa dist text"),
    "mutual-kNN, validation": ("share of neighbours", "mutual-knn"),
}


def main():
    args = parse()
    groups = read_drawn(args.from_jsonl) if args.from_jsonl else read_groups(args.group)
    print(format_summary(groups))
    with style.styled():
        style.save(draw(groups), args.out, kinds=("png",))
    print(f"curves: {args.out}")
    if args.jsonl:
        lines = [json.dumps({"group": label, **run}) for label, runs in groups.items() for run in runs]
        args.jsonl.write_text("\n".join(lines) + "\n")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--group",
        nargs="+",
        action="append",
        metavar=("LABEL", "FILE"),
        help="a label, and metrics.jsonl of one or more runs of examples/pretrain_llava_rsa.py",
    )
    source.add_argument("--from-jsonl", type=Path, metavar="FILE", help="draw again what --jsonl has written")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--jsonl", type=Path, help="file for the numbers that are drawn, a line a run")
    args = parser.parse_args()
    for label, *files in args.group or []:
        if not files:
            parser.error(f"--group {label}: no metrics.jsonl is named after the label")
    return args


def read_groups(groups: list[list[str]]) -> dict[str, list[dict]]:
    """Read the runs of each [label, file, ...]."""
    return {label: [read_run(Path(file)) for file in files] for label, *files in groups}


def read_run(file: Path) -> dict[str, list]:
    """Return {figure: [[iteration, value], ...]} of a training run."""
    try:
        run = read_figures(file)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    if not run["lm loss"]:
        raise SystemExit(f"error: {file} has no iteration of training in it")
    return {name: [list(item) for item in sorted(values.items())] for name, values in run.items()}


def read_drawn(file: Path) -> dict[str, list[dict]]:
    """Read the groups from a file that --jsonl has written."""
    groups = {}
    try:
        for line in json_lines(file):
            label = line.take("group", is_name, "the label of a group")
            run = {name: line.take(name, is_curve, "a list of [iteration, value]") for name in FIGURES}
            groups.setdefault(label, []).append(run)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    return groups


def is_curve(value) -> bool:
    return isinstance(value, list) and all(isinstance(point, list) and len(point) == 2 for point in value)


def format_summary(groups: dict[str, list[dict]]) -> str:
    """Format a line a group and figure: its first and its last value; over several runs mean ± standard deviation."""
    width = max(len(label) for label in groups)
    lines = [f"{'':<{width + 22}}{'first':>20}{'last':>20}"]
    for name in FIGURES:
        for label, runs in groups.items():
            if all(run[name] for run in runs):
                first, last = ([run[name][end] for run in runs] for end in (0, -1))
                lines.append(
                    f"{label:<{width}}  {name:<20}{format_spread(first):>20}{format_spread(last):>20}   "
                    f"iterations {first[0][0]} and {last[0][0]}"
                )
    lines.append(
        "mutual-knn: held-out pairs, only the image against only the caption; chance is what random features have"
    )
    return "\n".join(lines)


def format_spread(points: list) -> str:
    """Format the mean of some points' values, ± their standard deviation where there are several."""
    values = [value for _, value in points]
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def draw(groups: dict[str, list[dict]]) -> Figure:
    """Draw five panels in two rows, and the legend where a sixth would be."""
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    *panels, corner = figure.subplots(2, 3).flat
    for axis, (title, (unit, *names)) in zip(panels, PANELS.items()):
        for index, runs in enumerate(groups.values()):
            for name, line in zip(names, ("-", "--")):
                draw_group(axis, [run[name] for run in runs if run[name]], index, line)
        axis.set(title=title, xlabel="iteration", ylabel=unit)
        finish_axis(axis, starts_at_0=title.startswith("mutual"))
    chance = next((run["chance"][-1][1] for runs in groups.values() for run in runs if run["chance"]), None)
    if chance is not None:
        panels[-1].axhline(chance, color="black", linestyle=":", linewidth=1.2)
    corner.set_axis_off()
    handles = make_handles(groups, chance)
    corner.legend(handles=handles, loc="center", handlelength=3)
    style.add_title(figure, "Training curves", format_counts(groups))
    return figure


def draw_group(axis: Axes, curves: list[list], index: int, line: str) -> None:
    """Draw a thin line a run, where there are several, and the mean over the iterations that all of them have."""
    if not curves:
        return
    color = style.choose_color(index)
    if len(curves) > 1:
        for curve in curves:
            axis.plot(*zip(*curve), color=color, linestyle=line, linewidth=0.6, alpha=0.7)
    values = [dict(curve) for curve in curves]
    iterations = sorted(set.intersection(*map(set, values)))
    means = [statistics.mean(of_run[iteration] for of_run in values) for iteration in iterations]
    every = max(1, len(iterations) // 6)
    axis.plot(iterations, means, linestyle=line, markevery=every, **style_group(index, hollow=line == "--"))


def style_group(index: int, hollow: bool = False) -> dict:
    color = style.choose_color(index)
    face = "white" if hollow else color
    return {
        "color": color,
        "marker": style.choose_marker(index),
        "markerfacecolor": face,
        "markersize": 4.5,
        "linewidth": 1.8,
    }


def finish_axis(axis: Axes, starts_at_0: bool) -> None:
    """Scale the values: from 0, or logarithmically, as losses and distances fall fast at first."""
    values = [value for line in axis.get_lines() for value in line.get_ydata() if math.isfinite(value)]
    if not values:
        axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes, color="0.4")
        axis.set(xticks=[], yticks=[])
    elif starts_at_0 or min(values) <= 0:
        axis.set_ylim(bottom=min(0, *values))
    else:
        style.set_log(axis.yaxis)
        axis.set_ylabel(f"{axis.get_ylabel()} (log scale)")


def make_handles(groups: dict[str, list[dict]], chance: float | None) -> list[Line2D]:
    handles = [Line2D([], [], label=style.wrap(label, 24), **style_group(index)) for index, label in enumerate(groups)]
    if any(len(runs) > 1 for runs in groups.values()):
        handles.append(Line2D([], [], color="0.3", linewidth=1.8, label="mean of the runs"))
        handles.append(Line2D([], [], color="0.3", linewidth=0.6, label="each run"))
    if any(run["rsa dist text"] for runs in groups.values() for run in runs):
        handles.append(Line2D([], [], color="0.3", linestyle="-", linewidth=1.8, label="distances: images"))
        handles.append(Line2D([], [], color="0.3", linestyle="--", linewidth=1.8, label="distances: texts"))
    if chance is not None:
        handles.append(Line2D([], [], color="black", linestyle=":", linewidth=1.2, label=f"chance, {chance:.3f}"))
    return handles


def format_counts(groups: dict[str, list[dict]]) -> str:
    """Format "with RSA: 4 runs, without: 1 run"."""
    return ", ".join(f"{label}: {len(runs)} run{'s' * (len(runs) > 1)}" for label, runs in groups.items())


if __name__ == "__main__":
    main()
