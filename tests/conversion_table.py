"""Runs the comparisons of support/hf_parity.py and writes them into checkpoint_conversion/README.md.

python -m tests.conversion_table
"""

from tests.support.environment import ROOT  # isort: skip  # before torch

import re
import tempfile
from pathlib import Path

from tqdm import tqdm

from checkpoint_conversion import torch_dist_save
from tests.support import hf_parity
from tests.support.demo_data import cached_demo


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        demo = cached_demo()
        both = [hf_parity.Models(folder / name, demo, tied=name == "tied") for name in ("untied", "tied")]
        comparisons = [
            row(layout, [models.differences(*hf_parity.flat(layout)) for models in both])
            for layout in tqdm(hf_parity.LAYOUTS)
        ]
        mistakes = [
            row(mistake, [models.differences(sabotage=sabotage) for models in both])
            for mistake, sabotage in tqdm(hf_parity.MISTAKES.items())
        ]
        padding = hf_parity.flat(hf_parity.PADDED)
        mistakes.append(
            row(
                "padding rows in the softmax",
                [models.differences(*padding, sabotage=hf_parity.padding_in_the_softmax) for models in both],
            )
        )
        mistakes.append(
            row(
                "the token after an image not learnt",
                [models.differences(sabotage=hf_parity.token_after_an_image_not_learnt) for models in both],
            )
        )
        torch_dist_save.join = hf_parity.parts_one_after_the_other
        mistakes.append(
            row(
                "q, k, v not interleaved by group",
                [models.differences(checkpoint=models.convert(folder / f"wrong-{i}")) for i, models in enumerate(both)],
            )
        )
    readme = ROOT / "checkpoint_conversion" / "README.md"
    text = readme.read_text()
    for name, rows in (("comparisons", comparisons), ("mistakes", mistakes)):
        head = [
            f"| {'layout' if name == 'comparisons' else 'mistake'} | logits, untied | loss, untied | logits, tied | loss, tied |",
            "|" + " --- |" * 5,
        ]
        marked = rf"(<!-- {name} -->\n).*(<!-- /{name} -->)"
        text = re.sub(marked, lambda m: m[1] + "\n".join([*head, *rows]) + "\n" + m[2], text, flags=re.DOTALL)
    readme.write_text(text)


def row(name: str, differences: list[dict[str, float]]) -> str:
    return f"| {name} | " + " | ".join(f"{value:.1e}" for found in differences for value in found.values()) + " |"


if __name__ == "__main__":
    main()
