"""How the figures of rsa-megatron plot look, and how they are written.

Nothing is said by colour alone: a series has a colour of Okabe and Ito's palette (told apart with any colour vision), and a
marker, a line style or a hatch beside it, so that a greyscale print says the same. Heat maps have cividis, whose lightness
rises evenly. Sizes are for a width of 9 inches, shown at some 850 pixels in a README.
"""

import math
import textwrap
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

from rsa_megatron import atomic

STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "figure.titlesize": 11.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.7,
    "savefig.dpi": 150,
    "svg.hashsalt": "rsa-megatron",  # without it the names in an SVG are random
}
COLOR_MAP = "cividis"
# Okabe and Ito's, the two most different in lightness first; yellow is left out, as it does not show on white.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#D55E00")
# A black bar would hide its hatch.
FILLS = tuple("#FFFFFF" if color == "#000000" else color for color in COLORS)
BASELINE = "#C8C8C8"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">", "h", "p")
LINES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "+++", "---", "|||", "***", "OO", "//..")

NAMES = {
    "mutual-knn": "mutual-kNN",
    "cka": "linear CKA",
    "cka-rbf": "RBF CKA",
    "unbiased-cka": "unbiased CKA",
    "cknna": "CKNNA",
    "cycle-knn": "cycle-kNN",
    "svcca": "SVCCA",
    "rsa": "RSA discrepancy",
    "lm loss": "LM loss",
    "validation lm loss": "validation LM loss",
    "rsa loss": "RSA loss",
}
UNITS = {"lm loss": "nats a token", "validation lm loss": "nats a token"}


def styled():
    """The context to draw and save in: matplotlib's own defaults and STYLE, whatever the user's matplotlibrc says."""
    return matplotlib.style.context(["default", STYLE])


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def fill(index: int) -> str:
    return FILLS[index % len(FILLS)]


def marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def line_style(index: int):
    return LINES[index % len(LINES)]


def hatch(index: int) -> str:
    return HATCHES[index % len(HATCHES)]


def name(figure: str) -> str:
    """A metric, or a figure of a training run, as a title says it."""
    return NAMES.get(figure, figure)


def axis_label(figure: str) -> str:
    return name(figure) + (f", {UNITS[figure]}" if figure in UNITS else "")


def seeds_in_words(seeds_of_each: Iterable[list[int]]) -> str:
    """ "seeds 0, 1, 2", "5 seeds" or, where they differ, "1 to 3 seeds"."""
    different = {tuple(seeds) for seeds in seeds_of_each}
    counts = sorted({len(seeds) for seeds in different})
    if len(counts) > 1:
        return f"{counts[0]} to {counts[-1]} seeds"
    if len(different) > 1 or counts[0] > 5:
        return f"{counts[0]} seed{'s' * (counts[0] > 1)}"
    return f"seed{'s' * (counts[0] > 1)} {', '.join(map(str, different.pop()))}"


def unique(values: Iterable) -> list:
    """In the order of their first appearance."""
    return list(dict.fromkeys(values))


def wrapped(text: str, width: int) -> str:
    """In lines of at most so many characters; a name with hyphens stays whole."""
    return textwrap.fill(text, width, break_on_hyphens=False)


def title(figure: Figure, text: str, details: str) -> None:
    """Over all panels, the details on a line of their own where one line is too short: about 11 characters an inch."""
    width = int(11 * figure.get_figwidth())
    fits = len(f"{text} ({details})") <= width
    figure.suptitle(f"{text} ({details})" if fits else f"{wrapped(text, width)}\n({details})")


def legend_below(figure: Figure) -> None:
    """One legend under all panels, chance last, in as many columns as fit; the page grows by what its rows need."""
    marks = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            marks.setdefault(label, handle)
    marks = dict(sorted(marks.items(), key=lambda item: item[0].startswith("chance")))
    # About 12 characters an inch, and 6 for a mark; a row is 0.2 inches high.
    columns = max(1, min(len(marks), int(12 * figure.get_figwidth() / (max(map(len, marks)) + 6))))
    figure.set_figheight(figure.get_figheight() + 0.2 * (math.ceil(len(marks) / columns) - 1))
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=columns)


def save(figure: Figure, out: Path) -> list[Path]:
    """Write out.png and out.svg, the same bytes for the same figure; a reader sees the old file or the whole new one."""
    stem = str(out.with_suffix("")) if out.suffix in (".png", ".svg") else str(out)
    contents = {Path(f"{stem}.{kind}"): rendered(figure, kind) for kind in ("png", "svg")}
    for path, content in contents.items():
        with atomic.new_file(path) as unfinished:
            unfinished.write_bytes(content)
    return list(contents)


def rendered(figure: Figure, kind: str) -> bytes:
    # Neither the day nor matplotlib's version belongs in a file that is kept under version control.
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    content = BytesIO()
    figure.savefig(content, format=kind, metadata=metadata)
    return content.getvalue()
