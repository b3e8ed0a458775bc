"""How the figures of rsa-megatron plot look, and how they are written.

Nothing is shown only by colour: a series has a colour of Okabe and Ito's palette (distinct with any colour vision), and a
marker, a line style or a hatch beside it, so that a greyscale print says the same. Heat maps have cividis, whose lightness
rises evenly. Sizes are for a width of 9 inches, shown at 800 pixels on a page: a point is then 1.2 pixels. A linear axis begins
at 0, or is marked where it does not.
"""

import math
import textwrap
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path as MarkerPath
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

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
    "rsa dist vision": "mean distance of images",
    "rsa dist text": "mean distance of texts",
}
UNITS = {"lm loss": "nats per token", "validation lm loss": "nats per token"}
MAX_COLUMNS = 3


def styled():
    """Open the context to draw and save in: matplotlib's own defaults and STYLE, whatever the user's matplotlibrc says."""
    return matplotlib.style.context(["default", STYLE])


def choose_color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def choose_fill(index: int) -> str:
    return FILLS[index % len(FILLS)]


def choose_marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def choose_line(index: int):
    return LINES[index % len(LINES)]


def choose_hatch(index: int) -> str:
    return HATCHES[index % len(HATCHES)]


def name_figure(figure: str) -> str:
    """Name a metric, or a figure of a training run, for a title."""
    return NAMES.get(figure, figure)


def label_axis(figure: str) -> str:
    return name_figure(figure) + (f", {UNITS[figure]}" if figure in UNITS else "")


def arrange(count: int) -> tuple[int, int]:
    """Return rows and columns for a number of panels, at most three in a row: more would not be legible on a page."""
    return math.ceil(count / MAX_COLUMNS), min(count, MAX_COLUMNS)


def format_tick(value: float, _=None) -> str:
    """Format as a plain decimal; only below a millionth and from ten million as a power of ten."""
    if value and not 0.999e-6 <= abs(value) < 1e7:
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        factor = value / 10**exponent
        times = "" if math.isclose(factor, 1) else f"{factor:.3g}\\times "
        return f"${times}10^{{{exponent}}}$"
    return f"{value:.10f}".rstrip("0").rstrip(".")


def set_log(side) -> None:
    """Make an x or y axis logarithmic, with a few plain ticks: 0.5, 0.7, 1, 1.5, or 1, 10, 100 where it spans decades."""
    axis, name = side.axes, side.axis_name
    axis.set(**{f"{name}scale": "log"})
    low, high = sorted(side.get_view_interval())
    decades = math.log10(high / low)
    steps = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2 else (1,)
    side.set_major_locator(LogLocator(10, subs=steps, numticks=8))
    side.set_minor_locator(NullLocator())
    side.set_major_formatter(FuncFormatter(format_tick))


class AxisBreak(Artist):
    """Two strokes across an x or y axis near its origin, shown where the axis is linear and 0 is not in its range."""

    def __init__(self, side: str):
        super().__init__()
        self.side = side
        self.set(zorder=4, in_layout=False)

    def draw(self, renderer) -> None:
        """Draw by the limits that the axis has now: they may have changed since the break was added."""
        side = getattr(self.axes, f"{self.side}axis")
        low, high = sorted(side.get_view_interval())
        if low <= 0 <= high or side.get_scale() != "linear":
            return
        places = ((0, 0), (0.015, 0.04)) if self.side == "y" else ((0.012, 0.03), (0, 0))
        stroke = MarkerPath([(-1, -0.6), (1, 0.6)] if self.side == "y" else [(-0.6, -1), (0.6, 1)])
        look = {"linestyle": "", "marker": stroke, "markersize": 9, "markeredgewidth": 1.2, "color": "black"}
        strokes = Line2D(*places, transform=self.axes.transAxes, clip_on=False, **look)
        strokes.set_figure(self.axes.figure)
        strokes.draw(renderer)


def mark_truncated(axis: Axes, side: str) -> None:
    """Break an axis, "x" or "y", where it does not begin at 0; once, however often it is called."""
    if not any(isinstance(artist, AxisBreak) and artist.side == side for artist in axis.get_children()):
        axis.add_artist(AxisBreak(side))


def format_seeds(seeds_of_each: Iterable[list[int]]) -> str:
    """Format "seeds 0, 1, 2", "5 seeds" or, where they differ, "1 to 3 seeds"."""
    different = {tuple(seeds) for seeds in seeds_of_each}
    counts = sorted({len(seeds) for seeds in different})
    if len(counts) > 1:
        return f"{counts[0]} to {counts[-1]} seeds"
    if len(different) > 1 or counts[0] > 5:
        return f"{counts[0]} seed{'s' * (counts[0] > 1)}"
    return f"seed{'s' * (counts[0] > 1)} {', '.join(map(str, different.pop()))}"


def unique(values: Iterable) -> list:
    """List different values in the order of their first appearance."""
    return list(dict.fromkeys(values))


def wrap(text: str, width: int) -> str:
    """Wrap into lines of at most `width` characters; a name with hyphens stays whole."""
    return textwrap.fill(text, width, break_on_hyphens=False)


def add_title(figure: Figure, text: str, details: str, top: float | None = None) -> None:
    """Write over all panels, the details on a line of their own where one line is too short: about 11 characters an inch."""
    width = int(11 * figure.get_figwidth())
    fits = len(f"{text} ({details})") <= width
    line = f"{text} ({details})" if fits else f"{wrap(text, width)}\n({details})"
    figure.suptitle(line, y=top)


def add_legend_below(figure: Figure) -> None:
    """Add one legend under all panels, chance last, in as many columns as fit; the page grows by what its rows need."""
    marks = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            marks.setdefault(label, handle)
    marks = dict(sorted(marks.items(), key=lambda item: item[0].startswith(("shuffled", "chance"))))
    # About 12 characters an inch, and 6 for a mark; a row is 0.2 inches high.
    columns = max(1, min(len(marks), int(12 * figure.get_figwidth() / (max(map(len, marks)) + 6))))
    figure.set_figheight(figure.get_figheight() + 0.2 * (math.ceil(len(marks) / columns) - 1))
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=columns)


def save(figure: Figure, out: Path, kinds: tuple[str, ...] = ("png", "svg")) -> list[Path]:
    """Write out.png and out.svg, the same bytes for the same figure; a reader sees the old file or the whole new one."""
    stem = str(out.with_suffix("")) if out.suffix in (".png", ".svg") else str(out)
    contents = {Path(f"{stem}.{kind}"): render(figure, kind) for kind in kinds}
    for path, content in contents.items():
        with atomic.new_file(path) as unfinished:
            unfinished.write_bytes(content)
    return list(contents)


def render(figure: Figure, kind: str) -> bytes:
    # Neither the day nor matplotlib's version belongs in a file that is kept under version control.
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    content = BytesIO()
    figure.savefig(content, format=kind, metadata=metadata)
    return content.getvalue()
