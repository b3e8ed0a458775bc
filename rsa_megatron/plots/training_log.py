"""Reads figures of training out of what a run has printed."""

import re
from pathlib import Path

TRAINING = ("lm loss", "rsa loss", "rsa dist vision", "rsa dist text")
FIGURES = (*TRAINING, "validation lm loss", "mutual-knn", "chance")
NUMBER = r"([-+.\dEe]+|nan|inf)"


def read_figures(log: Path) -> dict[str, dict[int, float]]:
    """{figure: {iteration: value}}; of a resumed run's repeated iterations the later count."""
    run = {name: {} for name in FIGURES}
    for line in log.read_text().splitlines():
        if match := re.search(r"iteration +(\d+)/ *\d+ \|", line):
            for name in TRAINING:
                if value := re.search(rf"\| {name}: {NUMBER}", line):
                    run[name][int(match[1])] = float(value[1])
        elif match := re.search(rf"validation loss at iteration (\d+) .*\| lm loss value: {NUMBER}", line):
            run["validation lm loss"][int(match[1])] = float(match[2])
        elif match := re.search(
            rf"mutual-knn@\d+ at iteration (\d+) \| mutual-knn value: {NUMBER}.*chance {NUMBER}", line
        ):
            run["mutual-knn"][int(match[1])] = float(match[2])
            run["chance"][int(match[1])] = float(match[3])
    return run
