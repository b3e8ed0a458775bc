"""Draw stages 1.5 and 2 trained packed and unpacked: loss curves against samples, and scores after each stage; print a table.

    python examples/demo/plot_packing.py --runs demo/packing/seed-* --before demo/before/metrics.jsonl --out demo-packing.png
    python examples/demo/plot_packing.py --from-jsonl demo-packing.jsonl --out demo-packing.png

The runs are those of `demo.py --packing`: of each seed a stage 1, from which both arms begin.
"""

import argparse
import json
import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsa_megatron.json_lines import is_name, is_object, json_lines
from rsa_megatron.plots import style
from rsa_megatron.plots.training_figures import read_figures

ARMS = ("unpacked", "packed")
STAGES = {"stage 1.5": "stage1_5", "stage 2": "stage2"}
SCORES = {"mutual-knn": "mutual-knn validation", "validation lm loss": "lm loss validation"}
FIGURES = {"lm loss": "lm loss", "samples": "samples", "chance": "mutual-knn chance validation", **SCORES}
# A point of a loss curve is the mean of a twelfth of the run's steps.
_POINTS = 12


def main():
    args = parse()
    runs = read_drawn(args.from_jsonl) if args.from_jsonl else [read_seed(folder, args.before) for folder in args.runs]
    print(format_table(runs))
    with style.styled():
        style.save(draw(runs), args.out, kinds=("png",))
    print(f"figure: {args.out}")
    if args.jsonl:
        args.jsonl.write_text("".join(json.dumps(run) + "\n" for run in runs))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--runs", type=Path, nargs="+", metavar="FOLDER", help="of each seed, stage1, packed and unpacked"
    )
    source.add_argument("--from-jsonl", type=Path, metavar="FILE", help="draw again what --jsonl has written")
    parser.add_argument("--before", type=Path, help="--metrics-file of an evaluation of what stage 1 starts from")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--jsonl", type=Path, help="file for the numbers that are drawn, a line a seed")
    return parser.parse_args()


def read_seed(folder: Path, before: Path | None) -> dict:
    """Return a seed's loss curves and scores: {"seed", "curves": {arm: {stage: points}}, "scores": {arm: {after: scores}}}."""
    found = {name: read(folder / name / "metrics.jsonl") for name in ("stage1", *list_runs())}
    shared = ({"before": find_scores(read(before))} if before else {}) | {"stage 1": find_scores(found["stage1"])}
    curves, scores = {}, {}
    for arm in ARMS:
        of_stages = {stage: found[f"{arm}/{name}"] for stage, name in STAGES.items()}
        curves[arm] = {stage: make_curve(figures, folder / arm) for stage, figures in of_stages.items()}
        scores[arm] = shared | {stage: find_scores(figures) for stage, figures in of_stages.items()}
    return {"seed": folder.name, "curves": curves, "scores": scores}


def list_runs() -> list[str]:
    return [f"{arm}/{name}" for arm in ARMS for name in STAGES.values()]


def read(file: Path) -> dict[str, dict[int, float]]:
    try:
        return read_figures(file, FIGURES)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def make_curve(figures: dict[str, dict[int, float]], folder: Path) -> list[list[float]]:
    """Return [samples, loss] of a run: the samples that were seen before the middle of some steps, and their mean loss."""
    losses, samples = figures["lm loss"], figures["samples"]
    if not losses or losses.keys() - samples.keys():
        raise SystemExit(
            f"error: {folder}: metrics.jsonl has iterations without `samples`: train with --log-interval 1"
        )
    seen, points = 0, []
    for step in sorted(losses):
        points.append([seen + samples[step] / 2, losses[step]])
        seen += samples[step]
    size = max(1, round(len(points) / _POINTS))
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    return [[statistics.mean(column) for column in zip(*group)] for group in groups]


def find_scores(figures: dict[str, dict[int, float]]) -> dict[str, float]:
    """Find the last value of each score of an evaluation, and the chance line."""
    return {name: values[max(values)] for name in (*SCORES, "chance") if (values := figures[name])}


def read_drawn(file: Path) -> list[dict]:
    """Read the same from a file that --jsonl has written."""
    try:
        return [
            {"seed": line.take("seed", is_name, "the name of a seed")}
            | {name: line.take(name, is_object, f"an object of {name}") for name in ("curves", "scores")}
            for line in json_lines(file)
        ]
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def get_values(runs: list[dict], arm: str, after: str, score: str) -> list[float]:
    """Return a score of all seeds, of an arm after a stage."""
    return [run["scores"][arm][after][score] for run in runs if score in run["scores"][arm].get(after, {})]


def format_table(runs: list[dict]) -> str:
    columns = list(runs[0]["scores"][ARMS[0]])
    lines = []
    for score in SCORES:
        lines.append(f"{style.label_axis(score)}, after".ljust(44) + "".join(f"{column:>18}" for column in columns))
        for arm in ARMS:
            cells = [format_spread(get_values(runs, arm, column, score)) for column in columns]
            lines.append(f"  {arm}, {len(runs)} seeds".ljust(44) + "".join(f"{cell:>18}" for cell in cells))
    for stage in STAGES:
        told = []
        for arm in ARMS:
            samples = [run["curves"][arm][stage][-1][0] for run in runs]
            told.append(
                f"{arm} {format_spread([run['curves'][arm][stage][-1][1] for run in runs])} at {statistics.mean(samples):.0f}"
            )
        lines.append(
            f"{stage}, training LM loss of the last twelfth of steps, and samples till there: {'; '.join(told)}"
        )
    return "\n".join(lines)


def format_spread(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def draw(runs: list[dict]) -> Figure:
    """Draw the loss curves of both stages over the scores after each."""
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    panels = figure.subplots(2, 2)
    for axis, stage in zip(panels[0], STAGES):
        draw_curves(axis, runs, stage)
    for axis, score in zip(panels[1], SCORES):
        draw_scores(axis, runs, score)
    style.add_title(figure, "Packed and unpacked training", f"{len(runs)} seeds; thin: each seed, thick: their mean")
    style.add_legend_below(figure)
    return figure


def draw_curves(axis: Axes, runs: list[dict], stage: str) -> None:
    for index, arm in enumerate(ARMS):
        curves = [run["curves"][arm][stage] for run in runs]
        for curve in curves:
            axis.plot(*zip(*curve), color=style.choose_color(index), linewidth=0.6, alpha=0.7)
        means = [[statistics.mean(values) for values in zip(*points)] for points in zip(*curves)]
        axis.plot(*zip(*means), label=arm, markersize=4.5, linewidth=1.8, **look(index))
    axis.set(title=f"{stage}, training", xlabel="samples seen", ylabel=style.label_axis("lm loss"))
    style.mark_truncated(axis, "y")


def draw_scores(axis: Axes, runs: list[dict], score: str) -> None:
    columns = list(runs[0]["scores"][ARMS[0]])
    for index, arm in enumerate(ARMS):
        # Side by side, so that equal points do not hide each other.
        places = [column + 0.16 * (index - 0.5) for column in range(len(columns))]
        of_columns = [get_values(runs, arm, column, score) for column in columns]
        for place, values in zip(places, of_columns):
            axis.plot(
                [place] * len(values), values, color=style.choose_color(index), linestyle="", marker="_", markersize=9
            )
        means = [(place, statistics.mean(values)) for place, values in zip(places, of_columns) if values]
        axis.plot(*zip(*means), markersize=5.5, linewidth=1.2, **look(index))
    chance = get_values(runs, ARMS[0], columns[-1], "chance")
    if score == "mutual-knn" and chance:
        axis.axhline(chance[0], linestyle=":", color="black", linewidth=1.2, label=f"chance, {chance[0]:.3f}")
    axis.set(ylabel=style.label_axis(score), xlabel="measured after", xticks=range(len(columns)), xticklabels=columns)
    axis.set_ylim(bottom=0)


def look(index: int) -> dict:
    return {
        "color": style.choose_color(index),
        "marker": style.choose_marker(index),
        "linestyle": style.choose_line(index),
    }


if __name__ == "__main__":
    main()
