"""mutual-kNN and validation loss after each training stage, from metrics.jsonl of each stage of examples/run_stages.sh: a table and a figure.

    python examples/demo/plot_stages.py --run "with RSA" demo/stages/with-rsa --run without demo/stages/without --out stages.png

(The paper's figure E.1 in small: alignment after each stage, and before any of them as a dashed line.)
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from rsa_megatron.plots.training_figures import read_figures

STAGES = {"stage 1": "stage1", "stage 1.5": "stage1_5", "stage 2": "stage2"}
FIGURES = {"mutual-knn": "mutual-kNN", "validation lm loss": "validation LM loss, nats a token"}


def main():
    args = parse()
    before = last(read_figures(args.before)) if args.before else {}
    runs = {
        label: {stage: last(read_figures(Path(folder, name, "metrics.jsonl"))) for stage, name in STAGES.items()}
        for label, folder in args.run
    }
    print(table(before, runs))
    draw(before, runs, args.out)
    print(f"figure: {args.out}")
    if args.jsonl:
        lines = [json.dumps({"run": label, "before": before, **stages}) for label, stages in runs.items()]
        args.jsonl.write_text("\n".join(lines) + "\n")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run",
        nargs=2,
        action="append",
        required=True,
        metavar=("LABEL", "FOLDER"),
        help="a label, and the OUT of a run of run_stages.sh",
    )
    parser.add_argument("--before", type=Path, help="--metrics-file of an evaluation of what stage 1 begins from")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--jsonl", type=Path, help="file for the numbers, a line a run")
    args = parser.parse_args()
    for label, folder in args.run:
        for name in STAGES.values():
            if not Path(folder, name, "metrics.jsonl").is_file():
                parser.error(
                    f"--run {label!r} {folder}: {name}/metrics.jsonl is missing; let examples/run_stages.sh end first"
                )
    return args


def last(figures: dict[str, dict[int, float]]) -> dict[str, float]:
    """The last value of each figure of an evaluation, and the chance line."""
    return {name: values[max(values)] for name, values in figures.items() if name in (*FIGURES, "chance") and values}


def table(before: dict, runs: dict[str, dict[str, dict]]) -> str:
    columns = (["before"] if before else []) + list(STAGES)
    lines = []
    for figure, title in FIGURES.items():
        lines.append(f"{title + ' after':<34}" + "".join(f"{column:>12}" for column in columns))
        for label, stages in runs.items():
            values = [(before if column == "before" else stages[column]).get(figure) for column in columns]
            lines.append(f"  {label:<32}" + "".join(f"{'-' if v is None else f'{v:.4f}':>12}" for v in values))
    lines.append(
        "mutual-knn: held-out pairs, the image alone against the caption alone. Each stage has a template and labels of its "
        "own: losses compare within a column."
    )
    return "\n".join(lines)


def draw(before: dict, runs: dict[str, dict[str, dict]], out: Path) -> None:
    figure, axes = plt.subplots(1, len(FIGURES), figsize=(9, 3.2), layout="constrained")
    for axis, (name, title) in zip(axes, FIGURES.items()):
        for (label, stages), hatch in zip(runs.items(), ("", "//", "..", "xx")):
            place = list(runs).index(label)
            positions = [stage + 0.8 * (place + 0.5) / len(runs) - 0.4 for stage in range(len(STAGES))]
            heights = [stages[stage].get(name, 0) for stage in STAGES]
            axis.bar(positions, heights, width=0.75 / len(runs), hatch=hatch, edgecolor="black", label=label)
        if name in before:
            axis.axhline(before[name], linestyle="--", color="black", label="before training")
        chance = before.get("chance")
        if name == "mutual-knn" and chance is not None:
            axis.axhline(chance, linestyle=":", color="grey", label="chance")
        axis.set(title=title, xticks=range(len(STAGES)), xticklabels=list(STAGES))
    axes[0].legend(fontsize="small")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
