"""Curves of a training run, from its log: losses, kernels' mean distances and mutual-kNN; first and last in words.

    python examples/plot_run.py demo/stage1/run.log --before demo/before.log --out demo/run.png
"""

import argparse
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIGURES = ("lm loss", "rsa loss", "rsa dist vision", "rsa dist text")
NUMBER = r"([-+.\dEe]+|nan|inf)"


def main():
    args = parse()
    run = read_log(args.log.read_text())
    if not run["lm loss"]:
        raise SystemExit(f"{args.log}: no line of Megatron's training log in it")
    if args.before:
        run["mutual-knn"] |= read_log(args.before.read_text())["mutual-knn"]
    print(in_words(run))
    draw(run, args.out)
    print(f"curves: {args.out}")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="what examples/pretrain_llava_rsa.py has printed")
    parser.add_argument("--before", type=Path, help="log of an evaluation before training (--skip-train)")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    return parser.parse_args()


def read_log(text: str) -> dict[str, dict]:
    """{figure: {iteration: value}}, with "mutual-knn" and its "chance"; a resumed run's later lines win."""
    run = {name: {} for name in (*FIGURES, "mutual-knn", "chance")}
    for line in text.splitlines():
        if match := re.search(r"iteration +(\d+)/ *\d+ \|", line):
            for name in FIGURES:
                if value := re.search(rf"\| {name}: {NUMBER}", line):
                    run[name][int(match[1])] = float(value[1])
        elif match := re.search(rf"mutual-knn@\d+ at iteration (\d+) \| mutual-knn value: {NUMBER}.*chance {NUMBER}", line):
            run["mutual-knn"][int(match[1])] = float(match[2])
            run["chance"][int(match[1])] = float(match[3])
    return {name: dict(sorted(values.items())) for name, values in run.items()}


def in_words(run: dict[str, dict]) -> str:
    """A line a figure: its first and its last value."""
    lines = [f"{'':<18}{'first':>12}{'last':>12}"]
    for name in (*FIGURES, "mutual-knn"):
        if values := run[name]:
            (first, first_value), (last, last_value) = list(values.items())[0], list(values.items())[-1]
            lines.append(f"{name:<18}{first_value:>12.4f}{last_value:>12.4f}   iterations {first} and {last}")
    if run["chance"]:
        lines.append(f"mutual-knn: held-out pairs, image alone against caption alone; chance is {min(run['chance'].values()):.4f}")
    return "\n".join(lines)


def draw(run: dict[str, dict], out: Path) -> None:
    panels = [(["lm loss"], "log"), (["rsa loss"], "log"), (["rsa dist vision", "rsa dist text"], "log"),
              (["mutual-knn", "chance"], "linear")]  # fmt: skip
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 3.2), layout="constrained")
    for axis, (names, scale) in zip(axes, panels):
        for name in names:
            style = dict(linestyle=":", color="grey") if name == "chance" else dict(marker="." if "mutual" in name else None)
            axis.plot(run[name].keys(), run[name].values(), label=name, **style)
        axis.set(title=" and ".join(names), xlabel="iteration", yscale=scale)
        if len(names) > 1:
            axis.legend()
    axes[-1].set_ylim(bottom=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
