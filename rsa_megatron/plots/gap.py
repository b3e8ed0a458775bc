"""The page of a pair of encoders: where images and texts lie, before texts are moved and after, and the numbers.

It takes what gap_records.py reads, and returns a matplotlib Figure. In the panels of clouds, spectra and cosines a cloud has
one colour, with a marker or line style beside it, so that they read together, in grey as well.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsa_megatron.plots import style
from rsa_megatron.plots.gap_records import STEPS, TERMS, Gap, Method, Spectrum
from rsa_megatron.plots.gap_table import (
    METHOD_NAMES,
    STEP_NAMES,
    TERM_NAMES,
    format_frame,
    format_methods_table,
    format_spectra_table,
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
SIZE = (9, 17.7)
# Characters in a line of the numbers, 7.6 points high.
NUMBERS_WIDTH = 125
# Of each row of panels: its top, from the page's, and its height, in inches; below a row are labels and a legend.
ROWS = {
    "(a)": (0.75, 2.1),
    "(a) across": (3.6, 2.1),
    "(b), (c)": (7.05, 2.3),
    "(d), (e)": (10.75, 2.3),
    "(f)": (14.15, 3.1),
}
COLUMNS = ((1.0, 3.2), (5.5, 3.2))
# A share of variance below this is not worth an axis that goes down to it, and often rounding.
SMALLEST_SHARE = 1e-6


def draw_gap(gap: Gap) -> Figure:
    """Draw one page, for one pair of encoders."""
    # Places by hand: those that constrained layout solves for differ in their last digit from run to run, and the names of
    # an SVG's clip paths with them.
    figure = Figure(figsize=SIZE)
    draw_clouds(figure, gap)
    draw_steps(add_panel(figure, "(b), (c)", 0), gap)
    draw_budget(add_panel(figure, "(b), (c)", 1), gap)
    draw_spectra(add_panel(figure, "(d), (e)", 0), gap)
    draw_cosines(add_panel(figure, "(d), (e)", 1), gap)
    write_numbers(add_panel(figure, "(f)", 0), gap)
    counts = gap.counts
    style.add_title(
        figure,
        f"{gap.label}: images and texts in one space",
        f"{counts['num_images']} images, {counts['num_texts']} texts, D = {counts['width']}",
        top=1 - 0.15 / SIZE[1],
    )
    return figure


def add_panel(figure: Figure, row: str, column: int, **shared) -> Axes:
    (top, height), (left, width) = ROWS[row], COLUMNS[column]
    return figure.add_axes((left / SIZE[0], 1 - (top + height) / SIZE[1], width / SIZE[0], height / SIZE[1]), **shared)


def add_legend(axis: Axes, below: float = 0.47, handles=None, **place) -> None:
    """Add a legend some inches below a panel, where it hides nothing."""
    height = axis.get_position().height * SIZE[1]
    place = {"bbox_to_anchor": (0.5, -below / height), "ncols": 2} | place
    handles = handles or axis.get_legend_handles_labels()[0]
    axis.legend(handles=handles, fontsize=SMALL, loc="upper center", borderaxespad=0, columnspacing=1.2, **place)


def draw_clouds(figure: Figure, gap: Gap) -> None:
    """Draw before and after, along the mean difference and the first direction, and along the two first."""
    views = (
        ("(a)", "along the mean difference", "1st direction across it", 0, 1),
        ("(a) across", "along the 1st direction", "along the 2nd direction", 1, 2),
    )
    marks = {}
    for row, across, up, x, y in views:
        before = None
        for column, (when, texts, look) in enumerate(
            (("before", "text", "none"), ("after ReAlign", "realigned", "realign"))
        ):
            # The same limits before and after, or a shift would not be seen.
            axis = add_panel(figure, row, column, sharex=before, sharey=before)
            before = before or axis
            for cloud, name in (("image", "image"), (texts, look)):
                points_N3 = np.array(gap.clouds[cloud])
                # Rasterized: an SVG of single points would be a megabyte.
                (marks[name],) = axis.plot(points_N3[:, x], points_N3[:, y], rasterized=True, **style_points(name))
            axis.set(title=f"(a) {when}" if row == "(a)" else when, xlabel=across, ylabel=up)
    (left, width), (_, height) = COLUMNS[0], ROWS["(a) across"]
    middle = (SIZE[0] / 2 - left) / width
    below = {"bbox_to_anchor": (middle, -0.5 / height), "ncols": 3, "markerscale": 1.8}
    add_legend(figure.axes[2], handles=list(marks.values()), **below)


def style_points(name: str) -> dict:
    color = style.choose_color(LOOKS[name])
    face = color if name == "image" else "none"
    return {
        "label": CLOUD_NAMES[name],
        "color": color,
        "marker": style.choose_marker(LOOKS[name]),
        "markerfacecolor": face,
        "markersize": 3,
        "linestyle": "",
        "alpha": 0.6,
    }


def draw_steps(axis: Axes, gap: Gap) -> None:
    """Draw the distance of the means after each step."""
    # 4 and 6: the looks of no cloud in the figure
    for label, key, look, dashes in (("in-sample", "in_sample", 4, "-"), ("held-out", "held_out", 6, "--")):
        axis.plot(
            [getattr(gap.steps[step], key) for step in STEPS],
            label=label,
            color=style.choose_color(look),
            marker=style.choose_marker(look),
            linestyle=dashes,
        )
    axis.plot([gap.steps[step].floor for step in STEPS], color="black", linestyle=":", label="sampling floor, held-out")
    style.set_log(axis.yaxis)
    axis.set_xticks(range(len(STEPS)), [STEP_NAMES[step] for step in STEPS])
    axis.set(title=f"(b) centroid gap after each step (s = {gap.scale:.4f})", xlabel="step of ReAlign")
    axis.set_ylabel("distance of the means (log scale)")
    add_legend(axis)


def draw_budget(axis: Axes, gap: Gap) -> None:
    """Draw the four terms of E|e_x - e_y|^2 as a stacked bar, before and after."""
    axis.set_title("(c) energy of a pair's difference")
    if gap.frame is None:
        axis.text(0.5, 0.5, style.wrap(gap.left_out, 44), ha="center", va="center", transform=axis.transAxes)
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
            color=style.choose_fill(index),
            hatch=style.choose_hatch(index),
            edgecolor="black",
        )
        left += energies
    axis.invert_yaxis()
    axis.set(xlabel="$E\\,|e_x - e_y|^2$ (rows of length 1)", ylim=(1.5, -0.5))
    add_legend(axis)


def draw_spectra(axis: Axes, gap: Gap) -> None:
    """Draw eigenvalues over the trace."""
    for name, spectrum in select_spectra(gap).items():
        shares = [value / spectrum.trace for value in spectrum.values if value > 0]
        slope = "" if spectrum.exponent is None else f", exponent {spectrum.exponent:.2f}"
        axis.plot(range(1, len(shares) + 1), shares, label=CLOUD_NAMES[name] + slope, **style_line(name))
    axis.set_title("(d) spectra, over the trace")
    axis.set(xlabel="number of the eigenvalue (log scale)", ylabel="share of variance (log scale)")
    axis.set_yscale("log")
    axis.set_ylim(bottom=max(axis.get_ylim()[0], SMALLEST_SHARE / 2))
    style.set_log(axis.xaxis)
    style.set_log(axis.yaxis)
    add_legend(axis)


def select_spectra(gap: Gap) -> dict[str, Spectrum]:
    found = {"image": gap.image_spectrum} | {one.name: one.spectrum for one in select_methods(gap)}
    return {name: spectrum for name, spectrum in found.items() if spectrum.trace > 0}


def select_methods(gap: Gap) -> list[Method]:
    return [one for one in gap.methods if one.name not in NOT_DRAWN]


def draw_cosines(axis: Axes, gap: Gap) -> None:
    """Draw how alike two rows of one cloud are."""
    counts = {"image": gap.image_cosines} | {one.name: one.cosines for one in select_methods(gap)}
    edges = np.linspace(-1, 1, len(gap.image_cosines) + 1)
    there = np.flatnonzero(np.sum(list(counts.values()), axis=0))
    for name, count in counts.items():
        density = np.array(count) / sum(count) / np.diff(edges)
        filled = {"fill": True, "alpha": 0.35} if name == "image" else {}
        axis.stairs(density, edges, label=CLOUD_NAMES[name], **filled, **style_line(name))
    axis.set(
        title="(e) cosines of pairs within a cloud",
        xlabel="cosine",
        ylabel="density",
        xlim=(edges[there[0]], edges[there[-1] + 1]),
    )
    add_legend(axis)


def style_line(name: str) -> dict:
    return {"color": style.choose_color(LOOKS[name]), "linestyle": style.choose_line(LOOKS[name])}


def write_numbers(axis: Axes, gap: Gap) -> None:
    """Write the tables, one below the other, and the figures of the fixed frame."""
    counts = gap.counts
    fitted = (
        f"(f) fitted on {counts['fit_images']} images and {counts['fit_texts']} texts, all but in-sample of the others"
    )
    of_pairs = f"mixing (k = {counts['k_mixing']}), JS, Φ, Ψ, overlap (k = {counts['k_overlap']})"
    frame = "\n".join(style.wrap(text, NUMBERS_WIDTH) for text in format_frame(gap).split("\n"))
    first = style.wrap(f"{fitted}; {of_pairs} of {counts['num_sampled']} a side", NUMBERS_WIDTH)
    text = "\n\n".join((first, format_methods_table(gap), format_spectra_table(gap), frame))
    axis.text(-0.6 / COLUMNS[0][1], 1, text, family="monospace", fontsize=7.6, va="top", transform=axis.transAxes)
    axis.set_axis_off()
