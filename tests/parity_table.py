"""Runs every case of llava/test_parity.py and writes the largest differences into tests/README.md.

    python tests/parity_table.py
"""

import re
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS / "llava")]

import conftest
import test_parity
from tqdm import tqdm


def main():
    test_parity.NUM_ITERATIONS = dict.fromkeys(test_parity.NUM_ITERATIONS, 10)
    with tempfile.TemporaryDirectory() as folder:
        parity = test_parity.Parity(conftest.make_demo(Path(folder) / "demo"), Path(folder))
        rows = [row(case, parity.differences(case)) for case in tqdm(test_parity.CASES)]
    columns = ["layout", "micro-batches", "per-token loss", "distributed optimizer",
               "lm loss", "rsa loss", "rsa pairs", "rsa dist vision", "rsa dist text", "gradients", "parameters"]  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns), *rows]
    readme = TESTS / "README.md"
    marked = r"(<!-- parity -->\n).*(<!-- /parity -->)"
    text = re.sub(marked, lambda m: m[1] + "\n".join(lines) + "\n" + m[2], readme.read_text(), flags=re.DOTALL)
    readme.write_text(text)


def row(case, differences: dict[str, float]) -> str:
    layout, num_micro_batches, per_token, distributed_optimizer = case
    settings = [layout.name, str(num_micro_batches), "on" if per_token else "off", "on" if distributed_optimizer else "off"]
    return "| " + " | ".join(settings + [f"{value:.1e}" if value else "0" for value in differences.values()]) + " |"


if __name__ == "__main__":
    main()
