"""Lines of results as rsa-megatron plot reads them, and what its figures show."""

import itertools

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from rsa_megatron.alignment.metrics import mutual_knn

N, K = 60, 5


CHANCE = K / (N - 1)


def measured(label="LLaVA", data="COCO", rows=5, columns=7, seeds=3, **others) -> dict:
    """A line of a measurement: N pairs that have 8 numbers in common, less and less noise around them at the upper layers."""
    scores_SRC = np.zeros((seeds, rows, columns))
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed + 100 * len(label + data))
        common_ND = torch.randn(N, 8, generator=generator)
        sides = [
            [common_ND + (3 - 2.5 * layer / count) * torch.randn(N, 8, generator=generator) for layer in range(count)]
            for count in (rows, columns)
        ]
        scores_SRC[seed] = [[mutual_knn(a_ND, b_ND, K) for b_ND in sides[1]] for a_ND in sides[0]]
    return line_of(scores_SRC, label=label, data=data) | others


def line_of(scores_SRC: np.ndarray, **names) -> dict:
    seeds, rows, columns = scores_SRC.shape
    mean_RC, std_RC = scores_SRC.mean(0), scores_SRC.std(0, ddof=1) if seeds > 1 else None

    def pair(row, column):
        return {
            "row": str(row),
            "column": str(column),
            "mean": mean_RC[row, column],
            "std": None if std_RC is None else std_RC[row, column],
        }

    best = np.unravel_index(mean_RC.argmax(), mean_RC.shape)
    return {
        "kind": "alignment",
        "rows": "vision",
        "columns": "text",
        "row_model": "a/tower",
        "column_model": "a/decoder",
        "metric": "mutual-knn",
        "k": K,
        "num_samples": N,
        "seeds": list(range(seeds)),
        "text_reading": "caption-alone",
        "row_layers": [str(i) for i in range(rows)],
        "column_layers": [str(i) for i in range(columns)],
        "scores": scores_SRC.tolist(),
        "mean": mean_RC.tolist(),
        "std": None if std_RC is None else std_RC.tolist(),
        "best": pair(*best),
        "last": pair(rows - 1, columns - 1),
        "chance": CHANCE,
    } | names


def random_line() -> dict:
    layer = {"row_layers": ["standard normal"], "column_layers": ["standard normal"]}
    pair = {"row": "standard normal", "column": "standard normal", "mean": 0.08, "std": 0.01}
    return line_of(
        np.array([[[0.07]], [[0.09]], [[0.08]]]), label="Random", data="standard normal", best=pair, last=pair, **layer
    )


def trained(arm="with RSA", seed=1, stage="1", data="scenes", rise=0.05, **others) -> dict:
    """A line of a run: mutual-kNN rises by `rise` within 40 iterations, seed by seed a little higher."""
    start = 0.12 + 0.01 * seed
    curve = [[i, round(start + rise * i / 40, 6)] for i in (10, 20, 30, 40)]
    loss = [[i, 1000.0 / i**2 + seed] for i in range(1, 41)]
    figures = {"mutual-knn": curve, "lm loss": [[i, 2 - 0.01 * i] for i in range(1, 41)], "rsa loss": loss}
    return {
        "kind": "run",
        "data": data,
        "arm": arm,
        "seed": seed,
        "stage": stage,
        "figures": figures,
        "chance": 0.01,
        "before": {"mutual-knn": start},
        "accuracy": {"questions": 0.5 + 0.1 * seed},
    } | others


RISES = {"with RSA": 0.05, "without": 0.01}


def all_runs(arms=RISES, stages=("1", "1.5", "2"), seeds=(1, 2, 3), data=("scenes",)) -> list[dict]:
    each = itertools.product(data, arms, seeds, stages)
    return [trained(arm, seed, stage, name, rise=arms[arm]) for name, arm, seed, stage in each]


def rendered(figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def lines_named(axis, label) -> list:
    return [line for line in axis.get_lines() if line.get_label() == label]


def texts(figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


LONG = {f"arm {i}: a rather long name, distance and weight 0.{i}": 0.01 * i for i in range(12)}


DATA = ("COCO", "Flickr30k", "WIT")


MODELS = ("LLaVA-OneVision-7B", "A model with a long name, fine-tuned")


def many_layers(labels, data) -> list[dict]:
    scores_SRC = np.linspace(0.01, 0.2, 27 * 29).reshape(1, 27, 29).repeat(3, 0)
    return [line_of(scores_SRC, label=label, data=name) for label in labels for name in data]


VERBS = ("heatmap", "bars", "stages", "steps", "ablation")


def records_for(verb: str) -> list[dict]:
    if verb in ("heatmap", "bars"):
        return [measured("A", "COCO"), measured("A", "WIT"), random_line()]
    return all_runs()


GOOD = measured()
