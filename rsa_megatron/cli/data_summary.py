"""Figures of a dataset while it is made: counts, what was skipped and why, and three histograms."""

import bisect
import json
import sys
from collections import Counter
from itertools import accumulate
from pathlib import Path

from rsa_megatron.anyres import choose_grid
from rsa_megatron.data.prepare.sample_checks import ImportedSample
from rsa_megatron.models.architectures import get_architecture

# All of LLaVA-OneVision's models cut images alike.
_MODEL = get_architecture("llava-ov-7b")
TILE_SIZE, PINPOINTS = _MODEL.vision.image_size, _MODEL.grid_pinpoints
# The first samples of a kind that are named.
_NAMED = 3


class Figures:
    """Counts of what has been written and skipped; they can be stored in JSON and resumed.

    Args:
        tokenizer: lengths of texts are counted in its tokens; None counts words.
    """

    def __init__(self, tokenizer, state: dict | None):
        self._tokenizer = tokenizer
        self.length_name = "words of text" if tokenizer is None else "tokens of text"
        state = state or {}
        self.splits = Counter(state.get("parts"))
        self.skipped = Counter(state.get("skipped"))
        #: of each kind of skipped samples, the ids of the first
        self.first_skipped: dict[str, list] = dict(state.get("first_skipped", {}))
        stored = state.get("histograms", {})
        # JSON's keys are strings.
        self.histograms = {
            name: Counter({int(value): count for value, count in stored.get(name, {}).items()})
            for name in (self.length_name, "tiles of an image", "images of a sample")
        }

    def add(self, split: str, sample: ImportedSample) -> None:
        self.splits[split] += 1
        self.histograms[self.length_name][self._length("\n".join(sample.texts))] += 1
        self.histograms["images of a sample"][len(sample.images)] += 1
        for image in sample.images:
            # Under anyres only a single image is cut into a grid.
            alone = len(sample.images) == 1
            rows, columns = choose_grid(image.height, image.width, PINPOINTS, TILE_SIZE) if alone else (0, 0)
            self.histograms["tiles of an image"][1 + rows * columns] += 1

    def skip(self, kind: str, name: str | int) -> None:
        """Count a sample that is skipped for this kind of fault, by its id or place."""
        self.skipped[kind] += 1
        if self.skipped[kind] <= _NAMED:
            self.first_skipped.setdefault(kind, []).append(name)

    def list_skipped(self) -> list[str]:
        """List how many samples were skipped for each kind of fault, and the first of them."""
        lines = []
        for kind, count in self.skipped.most_common():
            named = ", ".join(str(name)[:60] for name in self.first_skipped.get(kind, []))
            lines.append(f"{count} {kind}: {named}" + ", ..." * (count > _NAMED))
        return lines

    def get_state(self) -> dict:
        histograms = {name: dict(sorted(counts.items())) for name, counts in self.histograms.items()}
        return {
            "parts": dict(self.splits),
            "skipped": dict(self.skipped),
            "first_skipped": self.first_skipped,
            "histograms": histograms,
        }

    def _length(self, text: str) -> int:
        if self._tokenizer is None:
            return len(text.split())
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def format_summary(figures: Figures, num_shards: int) -> str:
    """Format the counts and each histogram's quantiles, a line each."""
    counts = ", ".join(f"{figures.splits[split]} {split}" for split in ("train", "val"))
    counts += f", in {num_shards} shards" if num_shards else ""
    lines = [f"{sum(figures.splits.values())} samples: {counts}; {sum(figures.skipped.values())} skipped"]
    lines += [f"    skipped  {line}" for line in figures.list_skipped()]
    for name, counts in figures.histograms.items():
        if counts:
            middle, most, largest = (quantile(counts, share) for share in (0.5, 0.99, 1))
            lines.append(f"    {name:<20} half up to {middle}, 99% up to {most}, all up to {largest}")
    return "\n".join(lines)


def quantile(counts: Counter, share: float) -> int:
    """Return the least value that at least this share of all do not exceed."""
    values = sorted(counts)
    up_to = list(accumulate(counts[value] for value in values))
    return values[bisect.bisect_left(up_to, share * up_to[-1])]


def write_summary(folder: Path, settings: dict, figures: Figures, num_shards: int) -> None:
    """Write summary.json, and summary.png where matplotlib is installed."""
    summary = {"settings": settings, "shards": num_shards, **figures.get_state()}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    try:
        import matplotlib
    except ImportError:
        print(f"{folder}: no summary.png without matplotlib (pip install matplotlib)", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(1, len(figures.histograms), figsize=(12, 3.2), layout="constrained")
    for axis, (name, counts) in zip(axes, figures.histograms.items()):
        if counts:
            # The longest of millions of texts would leave the others one bar.
            last = quantile(counts, 0.99)
            values = [min(value, last) for value in counts]
            step = 1 + (last - min(values)) // 60  # a whole number, or bars would differ in how many values they hold
            edges = [value - 0.5 for value in range(min(values), last + step + 1, step)]
            axis.hist(values, bins=edges, weights=list(counts.values()))
        axis.set_xlabel(name)
        axis.set_ylabel("images" if name == "tiles of an image" else "samples")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.suptitle("the last bar holds the longest 1% as well", fontsize=8)
    figure.savefig(folder / "summary.png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)
