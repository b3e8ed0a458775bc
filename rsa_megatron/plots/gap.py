"""The page of a pair of encoders: where images and texts lie, before texts are moved and after, and the numbers.

It takes what gap_records.py reads, and returns a matplotlib Figure. In the panels of clouds, spectra and cosines a cloud has
one colour, with a marker or line style beside it, so that they read together, in grey as well.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from rsa_megatron.plots import style
from rsa_megatron.plots.gap_records import STEPS, TERMS, Gap, Method, Spectrum
from rsa_megatron.plots.gap_table import (
    METHOD_NAMES,
    STEP_NAMES,
    TERM_NAMES,
    frame_in_words,
    methods_table,
    spectra_table,
)

# Each cloud's place in figure_style's colours, markers, line styles and hatches.
LOOKS = {name: index for index, name in enumerate(("image", "none", "realign", "c3", "mean-shift", "blockwise"))}
CLOUD_NAMES = METHOD_NAMES | {
    "image": "images",
    "none": "texts",
    "c3": "texts, C3",
    "blockwise": "texts, block-wise",
    "realign": "texts, ReAlign",
}
# A shift leaves cosines of pairs and eigenvalues nearly where ReAlign does: one line would hide the other.
NOT_DRAWN = ("mean-shift",)
SMALL = 8.5


def draw_gap(gap: Gap) -> Figure:
    """One page, for one pair of encoders."""
    # Places by hand: those that constrained layout solves for differ in their last digit from run to run, and the names of
    # an SVG's clip paths with them.
    figure = Figure(figsize=(10, 11.6))
    grid = figure.add_gridspec(
        4, 4, height_ratios=(2.3, 3, 3, 2), left=0.075, right=0.985, top=0.935, bottom=0.015, hspace=0.37, wspace=0.33
    )
    draw_clouds(figure, grid, gap)
    draw_steps(figure.add_subplot(grid[1, :2]), gap)
    draw_budget(figure.add_subplot(grid[1, 2:]), gap)
    draw_spectra(figure.add_subplot(grid[2, :2]), gap)
    draw_cosines(figure.add_subplot(grid[2, 2:]), gap)
    write_numbers(figure.add_subplot(grid[3, :]), gap)
    counts = gap.counts
    style.title(
        figure,
        f"{gap.label}: images and texts in one space",
        f"{counts['num_images']} images, {counts['num_texts']} texts, D = {counts['width']}",
    )
    return figure


def draw_clouds(figure: Figure, grid: GridSpec, gap: Gap) -> None:
    """Before and after, along the mean difference and the first direction, and along the two first."""
    views = (("mean difference", "1st direction across it", 0, 1), ("1st direction", "2nd direction", 1, 2))
    for number, (across, up, x, y) in enumerate(views):
        before = None
        pictures = (("before", "text", "none"), ("after ReAlign", "realigned", "realign"))
        for offset, (when, texts, look) in enumerate(pictures):
            # The same limits before and after, or a shift would not be seen.
            axis = before = figure.add_subplot(grid[0, 2 * number + offset], sharex=before, sharey=before)
            for cloud, name in (("image", "image"), (texts, look)):
                points_N3 = np.array(gap.clouds[cloud])
                # Rasterized: an SVG of single points would be a megabyte.
                axis.plot(points_N3[:, x], points_N3[:, y], rasterized=True, **mark(name))
            axis.set(title=f"(a) {when}" if number == 0 else when, xlabel=across, ylabel=up if offset == 0 else None)
            axis.yaxis.labelpad = 1
            axis.tick_params(labelsize=7.5, labelleft=offset == 0)
            if number == 0:
                axis.legend(fontsize=7.5, markerscale=1.5, loc="best")


def mark(name: str) -> dict:
    color = style.color(LOOKS[name])
    face = color if name == "image" else "none"
    return {
        "label": CLOUD_NAMES[name],
        "color": color,
        "marker": style.marker(LOOKS[name]),
        "markerfacecolor": face,
        "markersize": 3,
        "linestyle": "",
        "alpha": 0.6,
    }


def draw_steps(axis: Axes, gap: Gap) -> None:
    """The distance of the means after each step."""
    # 4 and 6: the looks of no cloud that is drawn
    for label, key, look, dashes in (("in-sample", "in_sample", 4, "-"), ("held-out", "held_out", 6, "--")):
        axis.plot(
            [getattr(gap.steps[step], key) for step in STEPS],
            label=label,
            color=style.color(look),
            marker=style.marker(look),
            linestyle=dashes,
        )
    axis.plot([gap.steps[step].floor for step in STEPS], color="black", linestyle=":", label="sampling floor, held-out")
    axis.set_yscale("log")
    axis.set_xticks(range(len(STEPS)), [STEP_NAMES[step] for step in STEPS])
    axis.set(title=f"(b) centroid gap after each step (s = {gap.scale:.4f})", ylabel="distance of the means")
    axis.legend(fontsize=SMALL)


def draw_budget(axis: Axes, gap: Gap) -> None:
    """The four terms of E|e_x - e_y|^2 as a stacked bar, before and after."""
    axis.set_title("(c) energy of a pair's difference")
    if gap.frame is None:
        axis.text(0.5, 0.5, style.wrapped(gap.left_out, 44), ha="center", va="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    budgets = {"before": gap.frame.budget, "after\nReAlign": gap.frame.budget_after}
    left = np.zeros(len(budgets))
    parts = ("mean, in the frame", "mean, outside", "residual, in the frame", "residual, outside")
    for index, (term, part) in enumerate(zip(TERMS, parts)):
        energies = [budget[term] for budget in budgets.values()]
        axis.barh(
            list(budgets),
            energies,
            left=left,
            height=0.55,
            label=f"{TERM_NAMES[term]}  {part}",
            color=style.fill(index),
            hatch=style.hatch(index),
            edgecolor="black",
        )
        left += energies
    axis.invert_yaxis()
    axis.set(xlabel="$E\\,|e_x - e_y|^2$", ylim=(1.5, -0.5))
    axis.legend(fontsize=SMALL, loc="lower right")  # beside the lower bar, which is the shorter one


def draw_spectra(axis: Axes, gap: Gap) -> None:
    """Eigenvalues over the trace."""
    for name, spectrum in spectra(gap).items():
        shares = [value / spectrum.trace for value in spectrum.values if value > 0]
        slope = "" if spectrum.exponent is None else f", exponent {spectrum.exponent:.2f}"
        axis.plot(range(1, len(shares) + 1), shares, label=CLOUD_NAMES[name] + slope, **line(name))
    axis.set(
        xscale="log",
        yscale="log",
        title="(d) spectra, over the trace",
        xlabel="number of the eigenvalue",
        ylabel="share of variance",
    )
    axis.legend(fontsize=SMALL)


def spectra(gap: Gap) -> dict[str, Spectrum]:
    found = {"image": gap.image_spectrum} | {one.name: one.spectrum for one in drawn(gap)}
    return {name: spectrum for name, spectrum in found.items() if spectrum.trace > 0}


def drawn(gap: Gap) -> list[Method]:
    return [one for one in gap.methods if one.name not in NOT_DRAWN]


def draw_cosines(axis: Axes, gap: Gap) -> None:
    """How alike two rows of one cloud are."""
    counts = {"image": gap.image_cosines} | {one.name: one.cosines for one in drawn(gap)}
    edges = np.linspace(-1, 1, len(gap.image_cosines) + 1)
    there = np.flatnonzero(np.sum(list(counts.values()), axis=0))
    for name, count in counts.items():
        density = np.array(count) / sum(count) / np.diff(edges)
        filled = {"fill": True, "alpha": 0.35} if name == "image" else {}
        axis.stairs(density, edges, label=CLOUD_NAMES[name], **filled, **line(name))
    axis.set(
        title="(e) cosines of pairs within a cloud",
        xlabel="cosine",
        ylabel="density",
        xlim=(edges[there[0]], edges[there[-1] + 1]),
    )
    axis.legend(fontsize=SMALL)


def line(name: str) -> dict:
    return {"color": style.color(LOOKS[name]), "linestyle": style.line_style(LOOKS[name])}


def write_numbers(axis: Axes, gap: Gap) -> None:
    counts = gap.counts
    fitted = (
        f"(f) fitted on {counts['fit_images']} images and {counts['fit_texts']} texts, all but in-sample of the others"
    )
    of_pairs = f"mixing (k = {counts['k_mixing']}), JS, Φ, Ψ, overlap (k = {counts['k_overlap']})"
    sampled = f"{of_pairs} of {counts['num_sampled']} a side"
    frame = "\n".join(style.wrapped(text, 140) for text in frame_in_words(gap).split("\n"))
    tables = (0, 0.88, "top", methods_table(gap)), (0.6, 0.88, "top", spectra_table(gap))
    for x, y, side, text in ((0, 1, "top", f"{fitted}; {sampled}"), *tables, (0, 0, "bottom", frame)):
        axis.text(x, y, text, family="monospace", fontsize=7.3, va=side, transform=axis.transAxes)
    axis.set_axis_off()
