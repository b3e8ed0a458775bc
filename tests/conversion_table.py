"""Runs the comparisons of checkpoint_conversion/test_hf_parity.py and writes them into checkpoint_conversion/README.md.

    python tests/conversion_table.py
"""

import re
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "checkpoint_conversion")]

import conftest
import hf_parity
import test_hf_parity
from tqdm import tqdm

from checkpoint_conversion import torch_dist_save


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        demo = conftest.make_demo(folder / "demo")
        both = [hf_parity.Models(folder / name, demo, tied=name == "tied") for name in ("untied", "tied")]
        comparisons = [
            row(layout, [models.differences(*test_hf_parity.flat(layout)) for models in both])
            for layout in tqdm(test_hf_parity.LAYOUTS)
        ]
        mistakes = [
            row(mistake, [models.differences(sabotage=sabotage) for models in both])
            for mistake, sabotage in tqdm(test_hf_parity.MISTAKES.items())
        ]
        padding = test_hf_parity.flat(test_hf_parity.PADDED)
        mistakes.append(row("padding rows in the softmax", [
            models.differences(*padding, sabotage=test_hf_parity.padding_in_the_softmax) for models in both
        ]))  # fmt: skip
        mistakes.append(row("the token after an image not learnt", [
            models.differences(sabotage=test_hf_parity.token_after_an_image_not_learnt) for models in both
        ]))  # fmt: skip
        torch_dist_save.join = test_hf_parity.parts_one_after_the_other
        mistakes.append(row("q, k, v not interleaved by group", [
            models.differences(checkpoint=models.convert(folder / f"wrong-{i}")) for i, models in enumerate(both)
        ]))  # fmt: skip
    readme = TESTS.parent / "checkpoint_conversion" / "README.md"
    text = readme.read_text()
    for name, rows in (("comparisons", comparisons), ("mistakes", mistakes)):
        head = [f"| {'layout' if name == 'comparisons' else 'mistake'} | logits, untied | loss, untied | logits, tied | loss, tied |",
                "|" + " --- |" * 5]  # fmt: skip
        marked = rf"(<!-- {name} -->\n).*(<!-- /{name} -->)"
        text = re.sub(marked, lambda m: m[1] + "\n".join([*head, *rows]) + "\n" + m[2], text, flags=re.DOTALL)
    readme.write_text(text)


def row(name: str, differences: list[dict[str, float]]) -> str:
    return f"| {name} | " + " | ".join(f"{value:.1e}" for found in differences for value in found.values()) + " |"


if __name__ == "__main__":
    main()
