"""Figures of measured alignment: heat maps over all pairs of layers (the paper's figures 3 and C.1), bars of the best (1b).

They take what alignment_records.py reads, and return a matplotlib Figure.
"""

import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from rsa_megatron.plots import style
from rsa_megatron.plots.alignment_records import Alignment, Pair

SIDES = {"vision": "vision backbone", "text": "language backbone"}
NEIGHBOUR_METRICS = ("mutual-knn", "cknna", "cycle-knn")
MARKS = {
    "best": {
        "marker": "*",
        "markersize": 11,
        "markerfacecolor": "white",
        "markeredgecolor": "black",
        "markeredgewidth": 0.8,
    },
    "last": {
        "marker": "o",
        "markersize": 9,
        "markerfacecolor": "none",
        "markeredgecolor": "white",
        "markeredgewidth": 1.4,
        "path_effects": [withStroke(linewidth=2.8, foreground="black")],
    },
}


def draw_heatmaps(records: list[Alignment], *, scale: str = "shared") -> Figure:
    """Draw a panel for each data set (left to right, three in a row) and model (top to bottom), layer 0 at the bottom left,
    brighter is higher.

    Args:
        scale: "shared", one colour scale for all panels, so that they compare; or "panel", each its own.

    Raises:
        ValueError: no record has more than one pair of layers.
    """
    records = [record for record in records if record.mean_RC.size > 1]
    if not records:
        raise ValueError("no line has more than one pair of layers (the random baseline has one), as a heat map needs")
    labels, data = style.unique(record.label for record in records), style.unique(record.data for record in records)
    num_rows, num_columns = style.arrange(len(data))
    figure = Figure(figsize=find_size(num_columns, num_rows * len(labels), scale), layout="constrained")
    axes = figure.subplots(num_rows * len(labels), num_columns, squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)  # until it has a record
    placed = {}
    for record in records:
        row, column = divmod(data.index(record.data), num_columns)
        placed[labels.index(record.label) * num_rows + row, column] = record
    limits = (min(record.mean_RC.min() for record in records), max(record.mean_RC.max() for record in records))
    bar = {"label": style.label_axis(records[0].metric), "pad": 0.02}
    for place, record in placed.items():
        axis = axes[place]
        image = draw_heatmap(axis, record, limits if scale == "shared" else (None, None))
        if scale == "panel":
            figure.colorbar(image, ax=axis, **bar)
    if scale == "shared":
        figure.colorbar(image, ax=axes, aspect=20 * len(axes), fraction=0.05 if len(data) == 1 else 0.03, **bar)
    name_heatmaps(axes, placed, named=len(labels) > 1)
    model = f"{labels[0]}: " if len(labels) == 1 else ""
    style.add_title(
        figure, f"{model}{style.name_figure(records[0].metric)} of all pairs of layers", format_details(records)
    )
    style.add_legend_below(figure)
    return figure


def find_size(num_columns: int, num_rows: int, scale: str) -> tuple[float, float]:
    """Return inches: panels about square, those of a figure with one data set larger."""
    width = (4 if num_columns == 1 else 2.7) + (0.5 if scale == "panel" else 0)
    return 1.4 + width * num_columns, 1.1 + num_rows * (3.7 if num_columns == 1 else 3)


def draw_heatmap(axis: Axes, record: Alignment, limits: tuple):
    """Draw one record: rows upwards, columns to the right. Return the image, for a colour bar."""
    axis.set_visible(True)
    # "none": an SVG holds a pixel a cell, and no renderer may smooth it.
    image = axis.imshow(
        record.mean_RC,
        origin="lower",
        aspect="auto",
        interpolation="none",
        cmap=style.COLOR_MAP,
        vmin=limits[0],
        vmax=limits[1],
    )
    axis.spines[:].set_visible(False)
    for name, mark in MARKS.items():
        pair = getattr(record, name)
        place = record.column_layers.index(pair.column), record.row_layers.index(pair.row)
        axis.plot(*([number] for number in place), linestyle="", label=f"{name} pair of layers", clip_on=False, **mark)
    axis.set_title(f"{record.data}\nbest {format_pair(record.best)}, last {record.last.mean:.3f}", fontsize=9.5, pad=8)
    for set_ticks, layers in ((axis.set_xticks, record.column_layers), (axis.set_yticks, record.row_layers)):
        ticks = choose_ticks(len(layers))
        set_ticks(ticks, [layers[tick] for tick in ticks])
    return image


def choose_ticks(num_layers: int) -> list[int]:
    """Choose at most eight layers, evenly apart from the first one, and the last."""
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50, num_layers) if num_layers <= 7 * step + 1)
    ticks = list(range(0, num_layers, step))
    if num_layers - 1 - ticks[-1] > step / 2:
        return [*ticks, num_layers - 1]
    return [*ticks[:-1], num_layers - 1]


def name_heatmaps(axes, placed: dict[tuple[int, int], Alignment], *, named: bool) -> None:
    """Name the rows' layers at the left of each row of panels, the columns' below it where the next row has other ones."""
    for row, panels in enumerate(axes):
        of_row = {column: record for (at, column), record in placed.items() if at == row}
        if not of_row:
            continue
        first = min(of_row)
        record = of_row[first]
        model = style.wrap(record.label, 26) + "\n" if named else ""
        panels[first].set_ylabel(model + name_side(record, "row"))
        below = {name_side(other, "column") for (at, _), other in placed.items() if at == row + 1}
        if below != {name_side(record, "column")}:
            for axis in panels:
                axis.set_xlabel(name_side(record, "column"))


def name_side(record: Alignment, side: str) -> str:
    """Name an axis; between two backbones of a kind with the model's name, as both would be called the same."""
    kind, model = (record.rows, record.row_model) if side == "row" else (record.columns, record.column_model)
    if record.rows != record.columns:
        return f"layer of {SIDES[kind]}"
    return style.wrap(f"layer of {SIDES[kind]} of {model.rstrip('/').split('/')[-1]}", 34)


def draw_bars(records: list[Alignment]) -> Figure:
    """Draw the best pair's score, a group a data set and a bar a model, ± one standard deviation over the seeds.

    Baselines (one modality against itself, random) come last, in grey; a group has only the bars that were measured.
    """
    records = sorted(records, key=is_baseline)
    labels, data = style.unique(record.label for record in records), style.unique(record.data for record in records)
    records.sort(key=lambda record: (data.index(record.data), labels.index(record.label)))
    placed = [(number + data.index(record.data), record) for number, record in enumerate(records)]  # groups a bar apart
    figure = Figure(figsize=(max(6.5, min(0.42 * placed[-1][0] + 1.5, 11)), 4.2), layout="constrained")
    axis = figure.subplots()
    for index, label in enumerate(labels):
        draw_bars_of(axis, [(x, record) for x, record in placed if record.label == label], index)
    write_values(axis, placed, upright=len(records) > 16)
    mark_shuffled_pairs(axis, placed)
    if records[0].chance is not None:
        axis.axhline(records[0].chance, color="black", linestyle=":", label=f"chance, {records[0].chance:.3f}")
    centres = [statistics.mean(x for x, record in placed if record.data == name) for name in data]
    axis.set_xticks(centres, [style.wrap(name, 16) for name in data])
    axis.tick_params(axis="x", length=0)
    margin = max(1, 3 - len(records) / 2)  # a single bar does not fill the panel
    axis.set(ylabel=style.label_axis(records[0].metric), xlim=(-margin, placed[-1][0] + margin))
    deviation = ", ± standard deviation" if any(record.best.std is not None for record in records) else ""
    style.add_title(
        figure, f"{style.name_figure(records[0].metric)} of the best pair of layers{deviation}", format_details(records)
    )
    style.add_legend_below(figure)
    return figure


def draw_bars_of(axis: Axes, placed: list[tuple[int, Alignment]], index: int) -> None:
    """Draw the bars of one model; error bars only where there is more than one seed."""
    first = placed[0][1]
    places, best = [x for x, _ in placed], [record.best for _, record in placed]
    spread = [float("nan") if pair.std is None else pair.std for pair in best]
    fill = style.BASELINE if is_baseline(first) else style.choose_fill(index)
    axis.bar(
        places,
        [pair.mean for pair in best],
        yerr=spread,
        width=0.86,
        capsize=3,
        label=first.label,
        color=fill,
        hatch=style.choose_hatch(index),
        edgecolor="black",
    )


def mark_shuffled_pairs(axis: Axes, placed: list[tuple[int, Alignment]]) -> None:
    """Draw across each bar what the best of as many pairs of layers is of shuffled pairs."""
    known = [(x, record.shuffled) for x, record in placed if record.shuffled is not None]
    if known:
        x, shuffled = zip(*known)
        starts, ends = [at - 0.43 for at in x], [at + 0.43 for at in x]
        axis.hlines(shuffled, starts, ends, color="white", linewidth=3.2)  # seen on dark bars too
        axis.hlines(
            shuffled, starts, ends, color="black", linewidth=1.4, label="shuffled pairs, best of as many layers"
        )


def write_values(axis: Axes, placed: list[tuple[int, Alignment]], upright: bool) -> None:
    for x, record in placed:
        top = record.best.mean + (record.best.std or 0)
        axis.annotate(
            f"{record.best.mean:.3f}",
            (x, top),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8.5,
            ha="center",
            va="bottom",
            rotation=90 if upright else 0,
        )
    axis.margins(y=0.2 if upright else 0.1)


def is_baseline(record: Alignment) -> bool:
    return record.rows == record.columns or record.label == "Random"


def format_details(records: list[Alignment]) -> str:
    """Format k, number of samples and seeds for a title."""
    record = records[0]
    k = f"k = {record.k}, " if record.metric in NEIGHBOUR_METRICS else ""
    return f"{k}N = {record.num_samples}, {style.format_seeds(record.seeds for record in records)}"


def format_pair(pair: Pair) -> str:
    return f"{pair.mean:.3f}" + (f" ± {pair.std:.3f}" if pair.std is not None else "")
