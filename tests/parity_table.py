"""Runs every case of support/parity.py and writes the largest differences into tests/README.md.

python -m tests.parity_table
"""

from tests.support.environment import ROOT  # isort: skip  # before torch

import re
import tempfile
from pathlib import Path

from tqdm import tqdm

from tests.support import parity
from tests.support.demo_data import cached_demo


def main():
    parity.NUM_ITERATIONS = 10
    with tempfile.TemporaryDirectory() as folder:
        runs = parity.Parity(cached_demo(), Path(folder))
        rows = [row(case, runs.differences(case)) for case in tqdm(parity.ALL_CASES)]
    columns = [
        "layout",
        "micro-batches",
        "per-token loss",
        "distributed optimizer",
        "lm loss",
        "rsa loss",
        "rsa pairs",
        "rsa dist vision",
        "rsa dist text",
        "gradients",
        "parameters",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns), *rows]
    readme = ROOT / "tests" / "README.md"
    marked = r"(<!-- parity -->\n).*(<!-- /parity -->)"
    text = re.sub(marked, lambda m: m[1] + "\n".join(lines) + "\n" + m[2], readme.read_text(), flags=re.DOTALL)
    readme.write_text(text)


def row(case, differences: dict[str, float]) -> str:
    layout, num_micro_batches, per_token, distributed_optimizer = case
    settings = [
        layout.name,
        str(num_micro_batches),
        "on" if per_token else "off",
        "on" if distributed_optimizer else "off",
    ]
    return "| " + " | ".join(settings + [f"{value:.1e}" if value else "0" for value in differences.values()]) + " |"


if __name__ == "__main__":
    main()
