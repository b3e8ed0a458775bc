"""From the runs of examples/revision/revision.py to its results: lines of JSON, a table and a figure.

    {"kind": "revision", "arm": "ReAlign", "seed": 1,
     "images": loss on captions of held-out scenes, each after the embedding of its REAL image,
     "own": the same after held-out embeddings of the kind that was trained on (null: of images that is the same, of an untrained
     projector there are none), "training": the last iterations' loss,
     "centroid gap": distance of the mean of held-out embeddings of its kind from that of held-out images,
     "curve": [[iteration, loss on real images], ...], "encoder": {"R@1": ..., "centroid gap": ..., "s": ..., ...},
     "iterations": ..., "held out": ..., "seconds": ...}

Losses are nats a token. "images" less "own" is what a projector loses on the way from its kind of embedding to real images.

Shapes: N rows of embeddings, D width.
"""

import io
import json
import statistics
import tarfile
from pathlib import Path

import numpy
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from revision_plan import Arm
from torch import Tensor

from rsa_megatron.job_queue import Queue
from rsa_megatron.plots import style
from rsa_megatron.plots.runs import DOT, MEAN, draw_arm_by_step, dress_rows
from rsa_megatron.plots.tables import format_cell, format_spread, format_table
from rsa_megatron.plots.training_figures import read_figures
from rsa_megatron.realign.decomposition import centroid_gap

IMAGES = {
    "color": style.choose_color(0),
    "marker": "s",
    "markerfacecolor": style.choose_color(0),
    "label": "on held-out real images, each seed",
}
OWN = {"color": style.choose_color(1), "marker": "o", "label": "on held-out embeddings of its own kind, each seed"}


def line_of(queue: Queue, job: Arm, args, images: Path) -> dict:
    """The line of an arm that is done; `images`: the shards of the seed's real images."""
    figures = read_figures(queue.metrics(job.name))
    curve, training = sorted(figures["validation lm loss"].items()), sorted(figures["lm loss"].items())
    own = read_figures(queue.metrics(job.own))["validation lm loss"] if job.own else {}
    encoder = queue.folder / f"seed-{job.seed}" / "encoder" / "model" / "figures.json"
    return {
        "kind": "revision",
        "arm": job.arm,
        "seed": job.seed,
        "images": curve[-1][1],
        "own": own[max(own)] if own else None,
        "training": training[-1][1] if training else None,
        "centroid gap": gap_of(job.shards, images) if job.shards else None,
        "curve": [list(point) for point in curve] if job.shards else [],
        "encoder": strip_folders(json.loads(encoder.read_text())),
        "iterations": args.iterations,
        "held out": args.held_out,
        "seconds": json.loads((queue.folder / job.name / "done.json").read_text())["seconds"],
    }


def strip_folders(figures: dict) -> dict:
    """Replace the paths among an encoder's settings by their base names: results hold no path of a machine."""
    settings = {
        name: Path(value).name if isinstance(value, str) and "/" in value else value
        for name, value in figures.get("settings", {}).items()
    }
    return figures | {"settings": settings}


def gap_of(shards: Path, images: Path) -> float:
    """Of the held-out rows of two data sets."""
    return round(centroid_gap(held_out_rows(images), held_out_rows(shards)), 6)


def held_out_rows(shards: Path) -> Tensor:
    """The embeddings of a data set's part val, [N, D]."""
    rows = []
    for path in sorted(shards.glob("val-*.tar")):
        with tarfile.open(path) as tar:
            rows += [
                numpy.load(io.BytesIO(tar.extractfile(part).read()), allow_pickle=False)
                for part in tar
                if part.name.endswith(".npy")
            ]
    return torch.from_numpy(numpy.stack(rows)).double()


def of_arm(lines: list[dict], arm: str, name: str) -> dict[int, float]:
    """{seed: value}, of the seeds that have it."""
    return {line["seed"]: line[name] for line in lines if line["arm"] == arm and line[name] is not None}


def less(these: dict[int, float], those: dict[int, float]) -> dict[int, float]:
    """Differences seed by seed, of the seeds that both have."""
    return {seed: these[seed] - those[seed] for seed in these.keys() & those.keys()}


def table_of(lines: list[dict], reference: str = "raw text") -> str:
    """Markdown: mean ± standard deviation over the seeds, and each seed's number in brackets."""
    rows = []
    for arm in style.unique(line["arm"] for line in lines):
        images, own = (of_arm(lines, arm, name) for name in ("images", "own"))
        gained = less(images, of_arm(lines, reference, "images")) if arm != reference else {}
        training, gap = (list(of_arm(lines, arm, name).values()) for name in ("training", "centroid gap"))
        rows.append(
            [
                arm,
                format_cell(images),
                format_cell(gained),
                format_cell(own),
                format_cell(less(images, own)),
                format_spread(training),
                format_spread(gap),
            ]
        )
    head = [
        "trained on",
        "loss on held-out real images",
        f"difference to {reference}",
        "on held-out embeddings of its own kind",
        "lost on the way to real images",
        "training loss",
        "centroid gap to images, held-out",
    ]
    return f"{setting(lines)}\n\n{format_table(head, rows)}"


def setting(lines: list[dict]) -> str:
    first, encoders = lines[0], {line["seed"]: line["encoder"] for line in lines}
    spread = {
        name: format_spread([encoder[name] for encoder in encoders.values()]) for name in ("R@1", "centroid gap", "s")
    }
    return (
        f"Losses in nats a token on {first['held out']} held-out captions; {first['iterations']} iterations of 32. Dual encoders, "
        f"seeds {', '.join(map(str, encoders))}: R@1 of {first['encoder']['pairs']} held-out images {spread['R@1']}, "
        f"centroid gap {spread['centroid gap']}, s {spread['s']}."
    )


def draw(lines: list[dict]) -> Figure:
    """Left an arm a row, a mark a seed; right the loss on real images over the iterations. Of the arms that were trained: an
    untrained projector is so far off that all others would be one place."""
    lines = [line for line in lines if line["curve"]]
    arms = style.unique(line["arm"] for line in lines)
    page = Figure(figsize=(9.6, 0.42 * len(arms) + 2.2), layout="constrained")
    rows, curves = page.subplots(1, 2, width_ratios=(1.3, 1))
    for row, arm in enumerate(arms):
        draw_arm(rows, row, *(of_arm(lines, arm, name) for name in ("own", "images")))
    dress_rows(rows, "LM loss, nats a token")
    rows.set_yticks(range(len(arms)), [style.wrap(arm, 20) for arm in arms])
    rows.set_ylim(len(arms) - 0.5, -0.5)  # the first arm at the top
    for index, arm in enumerate(arms):
        draw_arm_by_step(curves, arm, [dict(line["curve"]) for line in lines if line["arm"] == arm], index)
    curves.set(xlabel="iteration", ylabel="LM loss on held-out real images")
    seeds = [sorted(of_arm(lines, arm, "images")) for arm in arms]
    style.add_title(page, "Projectors trained on text in the place of images", style.format_seeds(seeds))
    style.add_legend_below(page)
    return page


def draw_arm(axis: Axes, row: int, own: dict[int, float], images: dict[int, float]) -> None:
    """The seeds lie one below the other within the row, in the same order in both colours."""
    for of_seed, marks in ((own, OWN), (images, IMAGES)):
        values = [of_seed[seed] for seed in sorted(of_seed)]
        heights = [row + 0.5 * ((number + 0.5) / len(values) - 0.5) for number in range(len(values))]
        axis.plot(values, heights, **DOT | marks)
    means = [statistics.mean(values.values()) for values in (own, images) if values]
    axis.plot(means, [row] * len(means), **MEAN)
