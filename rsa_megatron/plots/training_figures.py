"""Reads figures of a training run from its metrics.jsonl (rsa_megatron/training/metrics_file.py)."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

#: What each figure is called in the file.
FIGURES = {
    "lm loss": "lm loss",
    "rsa loss": "rsa loss",
    "rsa dist vision": "rsa dist vision",
    "rsa dist text": "rsa dist text",
    "validation lm loss": "lm loss validation",
    "mutual-knn": "mutual-knn validation",
    "chance": "mutual-knn chance validation",
}


def read_figures(file: Path, figures: Mapping[str, str] = FIGURES) -> dict[str, dict[int, float]]:
    """Return {figure: {iteration: value}}; of a resumed run's repeated iterations the later count.

    Args:
        figures: what each is called in the file.

    Raises:
        ValueError: a line is not an object with an iteration.
        OSError: there is no such file.
    """
    found: dict[str, dict[int, float]] = {name: {} for name in figures}
    for number, text in enumerate(file.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            iteration = line["iteration"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}, line {number} is not a line of metrics.jsonl: remove it ({error})") from error
        for name, written in figures.items():
            if written in line:
                found[name][iteration] = math.nan if line[written] is None else line[written]
    return found
