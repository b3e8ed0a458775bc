"""Reads and checks what rsa-megatron plot draws: measurements of alignment, and training runs, a JSON object a line.

    {"kind": "alignment", ...}   of rsa-megatron measure: one metric, all pairs of layers, every seed
    {"kind": "run", ...}         of `make reproduce`: one stage of one training run, its figures by iteration

A file may hold lines of other kinds, which are left out and counted. Of its own kind every line is checked before any is
drawn, and a fault is one message that names file, line and key.

Shapes: S seeds, R row layers, C column layers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rsa_megatron.json_lines import (
    Line,
    is_count,
    is_list,
    is_name,
    is_number,
    is_number_or_null,
    is_object,
    is_whole,
)
from rsa_megatron.plots.line_kinds import read_kind

STAGES = ("1", "1.5", "2")
SIDES = ("vision", "text")
# A writer may round: numbers that should be one may differ by this, as a share and absolutely.
ROUNDING = 1e-3


@dataclass(frozen=True)
class Pair:
    """A pair of layers, and its score over the seeds; `std` is None with one seed."""

    row: str
    column: str
    mean: float
    std: float | None


@dataclass(frozen=True)
class Alignment:
    """One metric between the layers of two backbones."""

    where: str
    label: str
    data: str
    rows: str
    """The side of the rows, "vision" or "text"; `columns` likewise."""
    columns: str
    row_model: str
    column_model: str
    metric: str
    k: int
    num_samples: int
    seeds: list[int]
    row_layers: list[str]
    column_layers: list[str]
    mean_RC: np.ndarray
    best: Pair
    last: Pair
    chance: float | None
    shuffled: float | None
    """The best pair's score of shuffled pairs, the best of as many; None in lines from before there was one."""


@dataclass(frozen=True)
class Run:
    """One stage of one training run."""

    where: str
    data: str
    arm: str
    seed: int
    stage: str
    figures: dict[str, list[list]]
    """{name: [[iteration within the stage, value], ...]}"""
    before: dict[str, float]
    """The figures that training started from, those that were measured; empty after an arm's first stage."""
    chance: float | None
    k: int | None
    num_samples: int | None


def read_alignments(paths: list[Path], metric: str | None = None) -> list[Alignment]:
    """Read the measurements with one metric, k and number of samples, so that they fit in one figure.

    Args:
        metric: leave out the others; needed where there are several.

    Raises:
        ValueError: a line is broken or lacks a key, or what is left does not go together.
    """
    records = [parse_alignment(line) for line in read_kind(paths, "alignment")]
    if metric is not None:
        metrics = sorted({record.metric for record in records})
        records = [record for record in records if record.metric == metric]
        if not records:
            raise ValueError(f"--metric {metric}: no line has it; there are {', '.join(metrics)}")
    check_same(records, "metric", "choose one with --metric")
    check_same(records, "k", "draw them apart")
    check_same(records, "num_samples", "draw them apart")
    check_once(records, lambda record: (record.label, record.data))
    return records


def read_runs(paths: list[Path]) -> list[Run]:
    """Read training runs, each stage, arm and seed of a data set once; ValueError as in `read_alignments`."""
    runs = [parse_run(line) for line in read_kind(paths, "run")]
    first = {}
    for record in sorted(runs, key=lambda run: STAGES.index(run.stage)):
        first.setdefault((record.data, record.arm, record.seed), record.stage)
    runs = [run if run.stage == first[run.data, run.arm, run.seed] else replace(run, before={}) for run in runs]
    check_same(runs, "k", "draw them apart")
    check_same(runs, "num_samples", "draw them apart")
    check_once(runs, lambda run: (run.data, run.arm, f"stage {run.stage}", f"seed {run.seed}"))
    return runs


def parse_alignment(line: Line) -> Alignment:
    names = {key: line.take(key, is_name, "a name") for key in ("label", "data", "row_model", "column_model", "metric")}
    sides = {key: line.take(key, lambda side: side in SIDES, "vision or text") for key in ("rows", "columns")}
    counts = {key: line.take(key, is_count, "a whole number above 0") for key in ("k", "num_samples")}
    reading = line.take("text_reading", lambda value: value is None or is_name(value), "a name or null")
    if reading == "multimodal":  # its scores are not those of only a caption: never under the same name
        names["label"] += ", captions read after their images"
    seeds = line.take("seeds", lambda seeds: is_list(seeds, is_whole), "a list of at least one seed")
    layers = {key: line.take(key, is_layers, "a list of different names") for key in ("row_layers", "column_layers")}
    shape_RC = (len(layers["row_layers"]), len(layers["column_layers"]))
    scores_SRC = parse_array(line, "scores", (len(seeds), *shape_RC), "[seed][row][column]")
    mean_RC = parse_array(line, "mean", shape_RC, "[row][column]")
    if not np.allclose(scores_SRC.mean(0), mean_RC, rtol=ROUNDING, atol=ROUNDING):
        raise line.fault("mean", "is not the mean of 'scores' over the seeds")
    pairs = {key: parse_pair(line, key, layers, mean_RC, len(seeds)) for key in ("best", "last")}
    known = {"chance": take_chance(line), "shuffled": None}
    if "shuffled" in line.values:
        known["shuffled"] = take_object(line, "shuffled").take("best", is_number, "a number")
    return Alignment(line.where, **names, **sides, **counts, seeds=seeds, **layers, mean_RC=mean_RC, **pairs, **known)


def take_chance(line: Line) -> float | None:
    """Take a share, or None: of fewer pairs than neighbours there is none, whatever was written."""
    chance = line.take("chance", is_number_or_null, "a number or null")
    return chance if chance is not None and 0 < chance <= 1 else None


def parse_pair(line: Line, key: str, layers: dict[str, list[str]], mean_RC: np.ndarray, num_seeds: int) -> Pair:
    values = take_object(line, key)
    row = values.take("row", lambda name: name in layers["row_layers"], "one of 'row_layers'")
    column = values.take("column", lambda name: name in layers["column_layers"], "one of 'column_layers'")
    mean = values.take("mean", is_number, "a number")
    there = mean_RC[layers["row_layers"].index(row), layers["column_layers"].index(column)]
    if not math.isclose(mean, there, rel_tol=ROUNDING, abs_tol=ROUNDING):
        raise values.fault("mean", f"is {mean:g}, but the line's 'mean' has {there:g} at row {row}, column {column}")
    std = values.take("std", is_number, "a number") if num_seeds > 1 else None
    return Pair(row, column, mean, std)


def parse_array(line: Line, key: str, shape: tuple[int, ...], order: str) -> np.ndarray:
    needs = f"numbers {order}, {' x '.join(map(str, shape))}"
    values = line.take(key, lambda value: isinstance(value, list), needs)
    try:
        numbers = np.array(values)
    except ValueError as error:
        raise line.fault(key, f"is {needs}, not lists of different lengths") from error
    if numbers.shape != shape or numbers.dtype.kind not in "if":
        raise line.fault(key, f"is {needs}, not {' x '.join(map(str, numbers.shape))} of {numbers.dtype}")
    if not np.isfinite(numbers).all():
        raise line.fault(key, f"has no finite number at {order} {np.argwhere(~np.isfinite(numbers))[0].tolist()}")
    return numbers.astype(float)


def parse_run(line: Line) -> Run:
    names = {key: line.take(key, is_name, "a name") for key in ("data", "arm")}
    stage = line.take("stage", lambda stage: stage in STAGES, f"one of the texts {', '.join(STAGES)}")
    seed = line.take("seed", is_whole, "a whole number")
    curves = take_object(line, "figures")
    figures = {name: parse_points(curves, name) for name in curves.values}
    figures |= parse_accuracies(line, max((curve[-1][0] for curve in figures.values() if curve), default=0))
    values = take_object(line, "before")
    before = {
        name: values.take(name, is_number, "a number") for name in values.values if values.values[name] is not None
    }
    chance = take_chance(line)
    # A line may give only chance, k / (num_samples - 1); the title has what the line has.
    counts = {
        key: line.take(key, is_count, "a whole number above 0") if key in line.values else None
        for key in ("k", "num_samples")
    }
    return Run(line.where, **names, seed=seed, stage=stage, figures=figures, before=before, chance=chance, **counts)


def parse_accuracies(line: Line, iteration: int) -> dict[str, list]:
    """Parse what is known only at the end, as figures of one point: "accuracy on questions", for example."""
    accuracy = take_object(line, "accuracy")
    return {
        f"accuracy on {name}": [[iteration, accuracy.take(name, is_number, "a number")]] for name in accuracy.values
    }


def take_object(line: Line, key: str) -> Line:
    """Take an object within a line, to be checked like one; null is an empty one."""
    values = line.take(key, lambda value: value is None or is_object(value), "an object or null")
    return Line(f"{line.where}, {key!r}", values or {})


def parse_points(curves: Line, name: str) -> list[list]:
    curve = curves.take(name, lambda value: isinstance(value, list), "a list of [iteration, value]")
    last = -1
    for point in curve:
        fits = is_list(point, is_number) and len(point) == 2 and is_whole(point[0]) and point[0] > last
        if not fits:
            raise curves.fault(
                name, f"has the point {point}; a point is [iteration, finite value], and iterations rise"
            )
        last = point[0]
    return curve


def check_same(records: list, key: str, remedy: str) -> None:
    """Raise ValueError where two records differ in what one figure has one of."""
    first = records[0]
    for record in records:
        if getattr(record, key) != getattr(first, key):
            both = f"{getattr(first, key)!r} and {getattr(record, key)!r}"
            raise ValueError(f"{first.where} and {record.where}: {key!r} is {both}; {remedy}")


def check_once(records: list, identity: Callable) -> None:
    """Raise ValueError where two records would be drawn in one place."""
    seen = {}
    for record in records:
        first = seen.setdefault(identity(record), record)
        if first is not record:
            raise ValueError(
                f"{first.where} and {record.where}: both are {', '.join(identity(record))}; draw them apart"
            )


def is_layers(value) -> bool:
    return is_list(value, is_name) and len(set(value)) == len(value)
