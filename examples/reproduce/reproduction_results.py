"""From the figures of `make reproduce` to its results: lines of JSON, tables, and the tables within results/README.md.

A line is a stage of a run (alignment_records.py reads them):
    {"kind": "run", "data": "scenes", "arm": "with RSA", "seed": 1, "stage": "1", "figures": {name: [[iteration, value], ...]},
     "before": {name: value}, "chance": ..., "k": 10, "num_samples": ..., "accuracy": {name: value} or null,
     "form": ..., "part": "test", "iterations": ..., "flags": [...], "seconds": ...}
"""

import json
import math
import re
from pathlib import Path

from reproduction_plan import ABLATIONS, MAIN, TrainingRun

from rsa_megatron import atomic
from rsa_megatron.job_queue import Queue
from rsa_megatron.plots.tables import format_cell, format_spread, format_table
from rsa_megatron.plots.training_figures import read_figures

FIGURES = ("mutual-knn", "validation lm loss", "lm loss", "rsa loss", "rsa dist vision", "rsa dist text")
ACCURACIES = {
    "questions": ("questions", "exact"),
    "questions, base rate": ("questions", "base rate"),
    "caption tokens": ("captions", "tokens"),
    "caption content words": ("captions", "content words"),
}
STAGES = ("1", "1.5", "2")


def line_of(queue: Queue, run: TrainingRun, about: dict) -> dict:
    """The line of a run that is done. `about`: what all lines of a reproduction share."""
    before = curves(queue, run.before) if run.before in queue.done else {}
    done = json.loads((queue.folder / run.name / "done.json").read_text())
    figures = curves(queue, run.name)
    chance = figures.pop("chance", None)
    return {
        "kind": "run",
        "data": about["data"],
        "arm": run.arm,
        "seed": run.seed,
        "stage": run.stage,
        "figures": figures,
        "before": {name: before[name][-1][1] for name in FIGURES[:2] if before.get(name)},
        "chance": chance[-1][1] if chance else None,
        "k": 10,
        "num_samples": about["num_samples"],
        "accuracy": accuracy(queue, run),
        **{name: about[name] for name in ("form", "part")},
        "iterations": run.iterations,
        "flags": list(run.flags),
        "seconds": done["seconds"],
    }


def curves(queue: Queue, name: str) -> dict[str, list]:
    """Return the figures of a job, without those that are not a number."""
    found = read_figures(queue.metrics(name))
    found = {
        figure: [[i, round(v, 6)] for i, v in sorted(found[figure].items()) if math.isfinite(v)]
        for figure in (*FIGURES, "chance")
    }
    return {figure: points for figure, points in found.items() if points}


def accuracy(queue: Queue, run: TrainingRun) -> dict | None:
    if run.score not in queue.done:
        return None
    scores = json.loads((queue.folder / run.score / "scores.json").read_text())
    return {name: round(scores[data][figure], 6) for name, (data, figure) in ACCURACIES.items()}


def key(line: dict) -> tuple:
    return line["data"], line["arm"], line["seed"], line["stage"]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines() if text.strip()] if path.is_file() else []


def merged(old: list[dict], new: list[dict], about: dict) -> list[dict]:
    """The lines of before with those of today in their place; of another form or part they do not belong beside them."""
    same = [
        line for line in old if all(line.get(name) == about[name] for name in ("form", "part", "num_samples", "data"))
    ]
    lines = {key(line): line for line in same} | {key(line): line for line in new}
    arms = [arm + end for end in ("", ", no stage 1.5") for arm in MAIN] + list(ABLATIONS)
    place = {arm: number for number, arm in enumerate(arms)}  # an arm that is no longer run comes last
    return sorted(
        lines.values(), key=lambda line: (place.get(line["arm"], len(arms)), line["arm"], line["seed"], line["stage"])
    )


def write_lines(path: Path, lines: list[dict]) -> None:
    atomic.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def tables(lines: list[dict]) -> str:
    """Markdown: mean ± standard deviation over the seeds, and each seed's number. All lines are of one form and data."""
    return "\n\n".join([setting(lines), *stage_tables(lines), *ablation_table(lines)])


def setting(lines: list[dict]) -> str:
    iterations = {line["stage"]: line["iterations"] for line in lines}
    steps = ", ".join(f"stage {stage}: {iterations[stage]}" for stage in STAGES if stage in iterations)
    seeds = sorted({line["seed"] for line in lines})
    first = lines[0]
    chance = f"chance {first['chance']:.4f}" if first["chance"] else "too few pairs for mutual-kNN"
    return (
        f"Data: {first['data']}, measured on {first['num_samples']} pairs of the part `{first['part']}`, k = {first['k']}, "
        f"{chance}. Iterations of 32 samples: {steps}. Seeds: {', '.join(map(str, seeds))}."
    )


def stage_tables(lines: list[dict]) -> list[str]:
    """Of the arms that go through the stages."""
    arms = [
        arm for arm in (*MAIN, *(f"{arm}, no stage 1.5" for arm in MAIN)) if any(line["arm"] == arm for line in lines)
    ]
    titles = {"mutual-knn": "mutual-kNN", "validation lm loss": "LM loss on held-out captions, nats a token"}
    found = []
    for figure, title in titles.items():
        rows = [
            [arm, format_cell(befores(lines, arm, figure))]
            + [format_cell(lasts(lines, arm, stage, figure)) for stage in STAGES]
            for arm in arms
        ]
        found.append(format_table([title, "before", *(f"after stage {stage}" for stage in STAGES)], rows))
    asked = [line for line in lines if line["accuracy"]]
    if asked:
        rows = [
            [
                arm,
                *(
                    format_cell({line["seed"]: line["accuracy"][name] for line in asked if line["arm"] == arm})
                    for name in ACCURACIES
                ),
            ]
            for arm in arms
        ]
        found.append(format_table(["accuracy after stage 2", *ACCURACIES], rows))
    return found


def ablation_table(lines: list[dict]) -> list[str]:
    """Stage 1, all arms."""
    arms = [arm for arm in (*MAIN, *ABLATIONS) if any(line["arm"] == arm and line["stage"] == "1" for line in lines)]
    if not arms:
        return []
    rows = [
        [
            arm,
            format_cell(gains(lines, arm)),
            *(format_cell(lasts(lines, arm, "1", figure)) for figure in FIGURES[:2]),
            format_spread(list(lasts(lines, arm, "1", "rsa dist vision").values())),
        ]
        for arm in arms
    ]
    return [
        format_table(
            ["stage 1", "gain of mutual-kNN", "mutual-kNN", "LM loss", "mean distance of images at the end"], rows
        )
    ]


def lasts(lines: list[dict], arm: str, stage: str, figure: str) -> dict[int, float]:
    """{seed: the last value}."""
    return {
        line["seed"]: line["figures"][figure][-1][1]
        for line in lines
        if (line["arm"], line["stage"]) == (arm, stage) and line["figures"].get(figure)
    }


def befores(lines: list[dict], arm: str, figure: str) -> dict[int, float]:
    return {line["seed"]: line["before"][figure] for line in lines if line["arm"] == arm and figure in line["before"]}


def gains(lines: list[dict], arm: str) -> dict[int, float]:
    before = befores(lines, arm, "mutual-knn")
    return {
        seed: value - before[seed] for seed, value in lasts(lines, arm, "1", "mutual-knn").items() if seed in before
    }


def fill_page(page: Path, name: str, text: str) -> bool:
    """Put the text between the page's lines `<!-- NAME -->` and `<!-- /NAME -->`, if it has them."""
    old = page.read_text() if page.is_file() else ""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(old):
        return False
    atomic.write_text(page, pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", old))
    return True
