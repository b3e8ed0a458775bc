"""Draw the figures of results/ again from its JSON lines, without training: the same bytes each time.

    .venv/bin/python results/redraw.py
    .venv/bin/python results/redraw.py --out /somewhere/else

A figure whose lines are missing (of a form that was not run) is left out.
"""

import argparse
import json
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
for name in ("demo", "reproduce", "revision"):
    sys.path.insert(0, str(RESULTS.parent / "examples" / name))

import plot_packing
import plot_runs
import plot_stages
import revision_results
from reproduce import PICTURES

from rsa_megatron.cli import plot
from rsa_megatron.plots import style


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the figures; default: results/")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    for lines in sorted(RESULTS.glob("reproduce*.jsonl")):
        for name, (verb, *flags) in PICTURES.items():
            plot.main([verb, str(lines), *flags, "--out", str(out / f"{lines.stem}-{name}")])
    plot.main(["gap", str(RESULTS / "gap-demo.jsonl"), "--out", str(out / "gap-demo")])
    save(out / "demo", plot_runs.draw, plot_runs.read_drawn(RESULTS / "demo.jsonl"), kinds=("png",))
    save(out / "demo-stages", plot_stages.draw, *plot_stages.read_drawn(RESULTS / "demo-stages.jsonl"), kinds=("png",))
    save(
        out / "demo-packing", plot_packing.draw, plot_packing.read_drawn(RESULTS / "demo-packing.jsonl"), kinds=("png",)
    )
    lines = [json.loads(text) for text in (RESULTS / "revision.jsonl").read_text().splitlines()]
    save(out / "revision", revision_results.draw, lines)


def save(path: Path, draw, *records, **options) -> None:
    with style.styled():
        paths = style.save(draw(*records), path, **options)
    print(f"figure: {', '.join(map(str, paths))}")


if __name__ == "__main__":
    main()
