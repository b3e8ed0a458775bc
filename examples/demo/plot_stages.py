"""Draw mutual-kNN and validation loss after each training stage, and print them as a table.

    python examples/demo/plot_stages.py --run "with RSA" demo/stages/with-rsa --run without demo/stages/without --out stages.png
    python examples/demo/plot_stages.py --from-jsonl stages.jsonl --out stages.png

The figures are those of metrics.jsonl of each stage of examples/run_stages.sh. (The paper's figure E.1, scaled down: alignment
after each stage, and before any of them as a dashed line.)
"""

import argparse
import json
import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsa_megatron.json_lines import is_name, is_object, json_lines
from rsa_megatron.plots import style
from rsa_megatron.plots.training_figures import read_figures

STAGES = {"stage 1": "stage1", "stage 1.5": "stage1_5", "stage 2": "stage2"}
FIGURES = ("mutual-knn", "validation lm loss")


def main():
    args = parse()
    before, runs = read_drawn(args.from_jsonl) if args.from_jsonl else read_stages(args.before, args.run)
    print(format_table(before, runs))
    with style.styled():
        style.save(draw(before, runs), args.out, kinds=("png",))
    print(f"figure: {args.out}")
    if args.jsonl:
        lines = [json.dumps({"run": label, "before": before, **stages}) for label, stages in runs.items()]
        args.jsonl.write_text("\n".join(lines) + "\n")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--run",
        nargs=2,
        action="append",
        metavar=("LABEL", "FOLDER"),
        help="a label, and the OUT of a run of run_stages.sh",
    )
    source.add_argument("--from-jsonl", type=Path, metavar="FILE", help="draw again what --jsonl has written")
    parser.add_argument("--before", type=Path, help="--metrics-file of an evaluation of what stage 1 starts from")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--jsonl", type=Path, help="file for the numbers, a line a run")
    args = parser.parse_args()
    for label, folder in args.run or []:
        for name in STAGES.values():
            if not Path(folder, name, "metrics.jsonl").is_file():
                parser.error(
                    f"--run {label!r} {folder}: {name}/metrics.jsonl is missing; let examples/run_stages.sh end first"
                )
    return args


def read_stages(before: Path | None, runs: list[list[str]]) -> tuple[dict, dict[str, dict[str, dict]]]:
    """Read what stage 1 starts from, and {label: {stage: figures}} of the runs' folders."""
    stages = {
        label: {stage: find_last(read_figures(Path(folder, name, "metrics.jsonl"))) for stage, name in STAGES.items()}
        for label, folder in runs
    }
    return find_last(read_figures(before)) if before else {}, stages


def read_drawn(file: Path) -> tuple[dict, dict[str, dict[str, dict]]]:
    """Read the same from a file that --jsonl has written."""
    before, runs = {}, {}
    try:
        for line in json_lines(file):
            before = line.take("before", is_object, "an object of figures")
            label = line.take("run", is_name, "the label of a run")
            runs[label] = {stage: line.take(stage, is_object, "an object of figures") for stage in STAGES}
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    return before, runs


def find_last(figures: dict[str, dict[int, float]]) -> dict[str, float]:
    """Find the last value of each figure of an evaluation, and the chance line."""
    return {name: values[max(values)] for name, values in figures.items() if name in (*FIGURES, "chance") and values}


def format_table(before: dict, runs: dict[str, dict[str, dict]]) -> str:
    columns = (["before"] if before else []) + list(STAGES)
    lines = []
    for figure in FIGURES:
        title = f"{style.label_axis(figure)}, after"
        lines.append(f"{title:<42}" + "".join(f"{column:>12}" for column in columns))
        for label, stages in runs.items():
            values = [(before if column == "before" else stages[column]).get(figure) for column in columns]
            lines.append(f"  {label:<40}" + "".join(f"{'-' if v is None else f'{v:.4f}':>12}" for v in values))
    lines.append(
        "mutual-knn: held-out pairs, only the image against only the caption. Each stage has a template and labels of its "
        "own: losses compare within a column."
    )
    return "\n".join(lines)


def draw(before: dict, runs: dict[str, dict[str, dict]]) -> Figure:
    """Draw a panel a figure, and in it a bar a run and stage, from 0."""
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(FIGURES)), FIGURES):
        draw_panel(axis, before, runs, name)
    style.add_title(figure, "Alignment and loss after each stage", "losses compare within a stage")
    style.add_legend_below(figure)
    return figure


def draw_panel(axis: Axes, before: dict, runs: dict[str, dict[str, dict]], name: str) -> None:
    width = 0.8 / len(runs)
    for index, (label, stages) in enumerate(runs.items()):
        places = [stage + width * (index + 0.5) - 0.4 for stage in range(len(STAGES))]
        heights = [stages[stage].get(name, math.nan) for stage in STAGES]
        looks = {"color": style.choose_fill(index), "hatch": style.choose_hatch(index), "edgecolor": "black"}
        bars = axis.bar(places, heights, width=0.94 * width, label=label, **looks)
        texts = ["" if math.isnan(height) else f"{height:.3f}" for height in heights]
        axis.bar_label(bars, texts, padding=2, fontsize=8.5, rotation=90 if len(runs) > 2 else 0)
    if name in before:
        axis.axhline(before[name], linestyle="--", color="black", linewidth=1.2, label="before training")
    chance = before.get("chance")
    if name == "mutual-knn" and chance is not None:
        axis.axhline(chance, linestyle=":", color="black", linewidth=1.2, label=f"chance, {chance:.3f}")
    axis.margins(y=0.2 if len(runs) > 2 else 0.1)
    axis.set(ylabel=style.label_axis(name), xlabel="measured after", xticks=range(len(STAGES)))
    axis.set_xticklabels(list(STAGES))
    axis.set_ylim(bottom=0)


if __name__ == "__main__":
    main()
