"""Reads and checks what `rsa-megatron plot gap` draws: the page of a pair of encoders, a JSON object a line.

    {"kind": "gap", ...}    of `rsa-megatron realign report`; rsa_megatron/cli/gap_report.py says what its keys hold

Every number that is drawn is in the line. It is checked as a whole before anything is drawn, and a fault is one message
that names file, line and key.
"""

import math
from dataclasses import dataclass
from pathlib import Path

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

STEPS = ("none", "anchor", "trace", "centroid")
METHODS = ("none", "mean-shift", "c3", "blockwise", "realign")
TERMS = ("beta", "gamma", "delta", "zeta")
CLOUDS = ("image", "text", "realigned")
# A writer may round: an energy budget's terms may miss the total by this share.
ROUNDING = 1e-3


@dataclass(frozen=True)
class Distance:
    """Of the two clouds' means: of the rows that statistics were fitted on, of others, and what chance leaves of those."""

    in_sample: float
    held_out: float
    floor: float


@dataclass(frozen=True)
class Spectrum:
    """Of a cloud's covariance; None where a figure does not exist."""

    trace: float
    condition_number: float | None
    effective_dimension: float | None
    anisotropy: float | None
    exponent: float | None
    #: the largest eigenvalues, falling
    values: list[float]


@dataclass(frozen=True)
class Method:
    """A way to move texts; its name is one of METHODS, the keys of realign_baselines.METHODS."""

    name: str
    #: deviation of the noise that c3 adds to each coordinate; None for the others
    sigma: float | None
    distance: Distance
    spectrum: Spectrum
    #: how many pairs of moved texts have a cosine in each bin
    cosines: list[int]
    mixing: float
    js: float
    phi: float
    psi: float | None
    overlap: float


@dataclass(frozen=True)
class Frame:
    """The fixed frame's figures, of paired rows."""

    num_pairs: int
    rank: int
    energy: float
    #: lengths of the mean difference, and of its parts within and outside the frame
    mean_norm: float
    beta_norm: float
    gamma_norm: float
    #: of E|Delta|^2, by TERMS, before and after ReAlign
    budget: dict[str, float]
    budget_after: dict[str, float]
    delta: Spectrum
    zeta: Spectrum
    coupling_norm: float | None
    coupling_r_squared: float | None
    gamma_angle: float | None


@dataclass(frozen=True)
class Gap:
    """All of a page."""

    where: str
    label: str
    images: str
    texts: str
    #: by name: width, num_images, num_texts, fit_images, fit_texts, num_sampled, k_mixing, k_overlap
    counts: dict[str, int]
    scale: float
    steps: dict[str, Distance]
    image_spectrum: Spectrum
    image_cosines: list[int]
    methods: list[Method]
    chance: float
    #: None where rows are not paired; then `left_out` says why
    frame: Frame | None
    left_out: str | None
    #: by CLOUDS: points [along the mean difference, first and second principal direction]
    clouds: dict[str, list[list[float]]]


COUNTS = ("width", "num_images", "num_texts", "fit_images", "fit_texts", "num_sampled", "k_mixing", "k_overlap")


def read_gap(paths: list[Path]) -> Gap:
    """Read the one line of kind "gap" in these files.

    Raises:
        ValueError: it is broken or lacks a key, or there are none or several.
    """
    lines = read_kind(paths, "gap")
    if len(lines) > 1:
        raise ValueError(f"{lines[0].where} and {lines[1].where}: a page shows one pair of encoders; draw them apart")
    return parse_gap(lines[0])


def parse_gap(line: Line) -> Gap:
    """Parse all of a page, checking every key of its line."""
    names = {key: line.take(key, is_name, "a name") for key in ("label", "images", "texts")}
    counts = {key: line.take(key, is_count, "a whole number above 0") for key in COUNTS}
    image = take_object(line, "image")
    methods = [parse_method(one) for one in take_objects(line, "methods")]
    steps = {one.take("step", is_name, "a name"): parse_distance(one) for one in take_objects(line, "steps")}
    if tuple(steps) != STEPS:
        raise line.fault("steps", f"are {', '.join(STEPS)} in this order, not {', '.join(steps)}")
    frame = parse_frame(line) if line.take("frame", is_object_or_null, "an object or null") else None
    left_out = None if frame else line.take("left_out", is_name, "a text, where 'frame' is null")
    bins = image.take("cosines", is_counts, "a list of whole numbers")
    for one in methods:
        if len(one.cosines) != len(bins):
            raise line.fault(
                "methods", f"has {len(one.cosines)} bins of cosines for {one.name!r}, images have {len(bins)}"
            )
    points = take_object(line, "clouds")
    clouds = {key: points.take(key, is_points, "a list of points of three numbers") for key in CLOUDS}
    scale, chance = (line.take(key, is_number, "a number") for key in ("scale", "chance_of_mixing"))
    return Gap(
        line.where,
        **names,
        counts=counts,
        scale=scale,
        steps=steps,
        image_spectrum=parse_spectrum(image, "spectrum"),
        image_cosines=bins,
        methods=methods,
        chance=chance,
        frame=frame,
        left_out=left_out,
        clouds=clouds,
    )


def parse_method(line: Line) -> Method:
    numbers = {key: line.take(key, is_number, "a number") for key in ("mixing", "js", "phi", "overlap")}
    numbers |= {key: line.take(key, is_number_or_null, "a number or null") for key in ("psi", "sigma")}
    cosines = line.take("cosines", is_counts, "a list of whole numbers")
    name = line.take("method", lambda name: name in METHODS, f"one of {', '.join(METHODS)}")
    return Method(
        name=name, distance=parse_distance(line), spectrum=parse_spectrum(line, "spectrum"), cosines=cosines, **numbers
    )


def parse_distance(line: Line) -> Distance:
    return Distance(
        *(line.take(key, is_length, "a number of at least 0") for key in ("in_sample", "held_out", "floor"))
    )


def parse_spectrum(line: Line, key: str) -> Spectrum:
    values = take_object(line, key)
    optional = ("condition_number", "effective_dimension", "anisotropy", "exponent")
    figures = {name: values.take(name, is_number_or_null, "a number or null") for name in optional}
    largest = values.take("values", lambda value: value == [] or is_list(value, is_number), "a list of numbers")
    return Spectrum(values.take("trace", is_number, "a number"), **figures, values=largest)


def parse_frame(line: Line) -> Frame:
    values = take_object(line, "frame")
    counts = {key: values.take(key, is_count, "a whole number above 0") for key in ("num_pairs", "rank")}
    names = ("energy", "mean_norm", "beta_norm", "gamma_norm")
    numbers = {key: values.take(key, is_number, "a number") for key in names}
    optional = ("coupling_norm", "coupling_r_squared", "gamma_angle")
    numbers |= {key: values.take(key, is_number_or_null, "a number or null") for key in optional}
    budgets = {key: parse_budget(place, key) for place, key in ((values, "budget"), (line, "budget_after"))}
    residuals = {key: parse_spectrum(values, key) for key in ("delta", "zeta")}
    return Frame(**counts, **numbers, **budgets, **residuals)


def parse_budget(line: Line, key: str) -> dict[str, float]:
    values = take_object(line, key)
    energies = {term: values.take(term, is_length, "a number of at least 0") for term in TERMS}
    total = values.take("total", is_length, "a number of at least 0")
    if not math.isclose(sum(energies.values()), total, rel_tol=ROUNDING):
        raise values.fault("total", f"is {total:g}, but its terms add up to {sum(energies.values()):g}")
    return energies


def take_object(line: Line, key: str) -> Line:
    return Line(f"{line.where}, {key!r}", line.take(key, is_object, "an object"))


def take_objects(line: Line, key: str) -> list[Line]:
    objects = line.take(key, lambda value: is_list(value, is_object), "a list of objects")
    return [Line(f"{line.where}, {key!r} {number}", values) for number, values in enumerate(objects)]


def is_length(value) -> bool:
    return is_number(value) and value >= 0


def is_object_or_null(value) -> bool:
    return value is None or is_object(value)


def is_counts(value) -> bool:
    return is_list(value, lambda count: is_whole(count) and count >= 0) and sum(value) > 0


def is_points(value) -> bool:
    return is_list(value, lambda point: is_list(point, is_number) and len(point) == 3)
