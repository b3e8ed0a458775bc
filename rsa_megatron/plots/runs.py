"""Figures of training runs: after each stage (the paper's figure E.1), against the step (the form of its figure 4), and arm
by arm (its tables F.1 and G.1 as dots).

They take what alignment_records.py reads, and return a matplotlib Figure. An arm is a way of training, run with several
seeds, and every seed is shown. `figure` names what was measured: "mutual-knn", "lm loss", ...
"""

import statistics

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rsa_megatron.plots import style
from rsa_megatron.plots.alignment_records import STAGES, Run

DOT = {"linestyle": "", "markersize": 5, "markerfacecolor": "white", "markeredgewidth": 1.1}
BEFORE = {"color": style.choose_color(1), "marker": "o", "label": "before, each seed"}
AFTER = {
    "color": style.choose_color(0),
    "marker": "s",
    "markerfacecolor": style.choose_color(0),
    "label": "after, each seed",
}
# A line from the mean before, with a mark only at the mean after: with marks at both ends it would look like an error bar.
MEAN = {
    "color": "black",
    "linewidth": 1.6,
    "zorder": 1.5,
    "marker": "D",
    "markersize": 6,
    "markevery": [-1],
    "label": "mean of squares, line from mean of circles",
}


def draw_stages(runs: list[Run], *, figure: str = "mutual-knn") -> Figure:
    """Draw the last value of each stage, a panel a data set: an arm's mean, and a hollow mark a seed beside it.

    A dashed line is the mean before training, a dotted one chance or the base rate of an accuracy.
    """
    runs = select_measured(runs, figure)
    data, arms = style.unique(run.data for run in runs), style.unique(run.arm for run in runs)
    rows, columns = style.arrange(len(data))
    page = Figure(figsize=(max(6, 3 * columns + 0.6), 3.6 * rows + 0.6), layout="constrained")
    panels = page.subplots(rows, columns, sharey=True, squeeze=False)
    for axis, name in zip_panels(panels, data):
        draw_stages_of(axis, [run for run in runs if run.data == name], figure, arms, find_stages(runs))
        axis.set_title(name if len(data) > 1 else None)
    label_values(panels, figure)
    spread = ": mean, seeds (hollow)" if have_seeds(runs) else ""
    return finish(page, runs, figure, f"after each stage{spread}")


def draw_stages_of(axis: Axes, runs: list[Run], figure: str, arms: list[str], stages: list[str]) -> None:
    """Draw one data set. The arms are side by side, within 0.6 of the stage's place."""
    width = 0.6 / len(arms)
    for index, arm in enumerate(arms):
        seeds_at = {}
        for place, stage in enumerate(stages):
            if seeds := [find_last(run, figure) for run in runs if (run.arm, run.stage) == (arm, stage)]:
                seeds_at[place + (index + 0.5) * width - 0.3] = seeds
        if seeds_at:
            draw_arm_by_stage(axis, arm, seeds_at, index, beside=0.35 * width)
    before = [run.before[figure] for run in runs if figure in run.before]
    if before:
        axis.plot([-1] * len(before), before, color="black", marker="o", **DOT)
        axis.axhline(
            statistics.mean(before), color="black", linestyle="--", linewidth=1.2, label="before training, mean"
        )
    draw_chance(axis, runs, figure)
    axis.set_xticks(range(-1 if before else 0, len(stages)), (["before"] if before else []) + stages)
    axis.set(xlabel="training stage", xlim=(-1.5 if before else -0.5, len(stages) - 0.5))


def draw_arm_by_stage(axis: Axes, arm: str, seeds_at: dict[float, list[float]], index: int, beside: float) -> None:
    """Draw seeds_at, {place on the x axis: the seeds' values}: the seeds beside the mean, which would hide them."""
    marks = {"color": style.choose_color(index), "marker": style.choose_marker(index)}
    for x, seeds in seeds_at.items():
        if len(seeds) > 1:
            axis.plot([x + beside] * len(seeds), seeds, **DOT | marks)
    means = [statistics.mean(seeds) for seeds in seeds_at.values()]
    marks |= {"linestyle": style.choose_line(index), "markersize": 8, "markeredgecolor": "black"}
    axis.plot(list(seeds_at), means, label=arm, **marks)


def draw_steps(runs: list[Run], *, figure: str = "mutual-knn") -> Figure:
    """Draw figures against the iteration, a panel a stage and a row a data set: an arm's mean, ± one standard deviation over
    the seeds as a band, and a thin line a seed.

    A loss has an axis of its own in each panel, as the stages' data and templates differ.

    Raises:
        ValueError: no run has the figure, or the seeds of an arm have no iteration in common.
    """
    runs = select_measured(runs, figure)
    data, arms, stages = (
        style.unique(run.data for run in runs),
        style.unique(run.arm for run in runs),
        find_stages(runs),
    )
    page = Figure(figsize=(max(6, 2.9 * len(stages) + 0.6), 2.7 * len(data) + 1.3), layout="constrained")
    axes = page.subplots(len(data), len(stages), sharey=False if "loss" in figure else "row", squeeze=False)
    for panels, name in zip(axes, data):
        for axis, stage in zip(panels, stages):
            draw_steps_of(axis, [run for run in runs if (run.data, run.stage) == (name, stage)], figure, arms)
            axis.set_title(f"{name}, stage {stage}" if len(data) > 1 else f"stage {stage}")
    for axis in axes[-1]:
        axis.set_xlabel("iteration")
    label_values(axes, figure)
    spread = ": mean ± standard deviation, and each seed" if have_seeds(runs) else ""
    return finish(page, runs, figure, f"over training{spread}")


def draw_steps_of(axis: Axes, runs: list[Run], figure: str, arms: list[str]) -> None:
    """Draw one data set and stage, from iteration 0 on."""
    for index, arm in enumerate(arms):
        if of_arm := [run for run in runs if run.arm == arm]:
            draw_arm_by_step(axis, arm, make_curves(of_arm, figure), index)
    draw_chance(axis, runs, figure)
    end = max((iteration for run in runs for iteration, _ in run.figures[figure]), default=1)
    axis.set_xlim(-0.05 * end, 1.05 * end)


def make_curves(runs: list[Run], figure: str) -> list[dict[int, float]]:
    """Make {iteration: value} of each run; what training started from is at 0."""
    starts = ({0: run.before[figure]} if figure in run.before else {} for run in runs)
    found = [start | dict(run.figures[figure]) for start, run in zip(starts, runs)]
    if not set.intersection(*map(set, found)):
        raise ValueError(f"{runs[0].where} and {runs[-1].where}: the seeds' {figure!r} have no iteration in common")
    return found


def draw_arm_by_step(axis: Axes, arm: str, curves: list[dict[int, float]], index: int) -> None:
    """Draw an arm's mean over the iterations that all seeds have, their deviation and each seed."""
    marks = {"color": style.choose_color(index), "linestyle": style.choose_line(index)}
    iterations = sorted(set.intersection(*map(set, curves)))
    seeds_at = [[curve[iteration] for curve in curves] for iteration in iterations]
    means = [statistics.mean(seeds) for seeds in seeds_at]
    if len(curves) > 1:
        for curve in curves:  # one point has no line to be seen
            dot = (
                {"marker": style.choose_marker(index), "markersize": 4, "markerfacecolor": "none"}
                if len(curve) == 1
                else {}
            )
            axis.plot(list(curve), list(curve.values()), linewidth=0.6, alpha=0.7, **dot, **marks)
        deviations = [statistics.stdev(seeds) for seeds in seeds_at]
        low, high = ([mean + sign * deviation for mean, deviation in zip(means, deviations)] for sign in (-1, 1))
        axis.fill_between(iterations, low, high, color=style.choose_color(index), alpha=0.18, linewidth=0)
    # Smaller from arm to arm: of two at one place both are seen.
    size = max(4.5, 7.5 - 1.5 * index)
    marks |= {"marker": style.choose_marker(index), "markersize": size, "markevery": max(1, len(iterations) // 8)}
    axis.plot(iterations, means, linewidth=2, label=arm, **marks)
    for side in "xy":
        style.mark_truncated(axis, side)


def draw_ablation(runs: list[Run], *, figure: str = "mutual-knn", stage: str = "1") -> Figure:
    """Draw figures before training and after a stage, a row an arm and a panel a data set: a dot a seed, below them a line
    from the mean before to that after, and at the right what the mean has gained.

    Raises:
        ValueError: no run of that stage has the figure.
    """
    starts = {(run.data, run.arm, run.seed): run.before[figure] for run in runs if figure in run.before}
    runs = select_measured([run for run in runs if run.stage == stage], figure, f"of stage {stage} ")
    data, arms = style.unique(run.data for run in runs), style.unique(run.arm for run in runs)
    rows, columns = style.arrange(len(data))
    size = (max(7, 2.9 * columns + 2.6), rows * (0.45 * len(arms) + 1.2) + 0.7)
    page = Figure(figsize=size, layout="constrained")
    panels = page.subplots(rows, columns, sharey=True, squeeze=False)
    for axis, name in zip_panels(panels, data):
        of_data = sorted((run for run in runs if run.data == name), key=lambda run: run.seed)
        for row, arm in enumerate(arms):
            of_arm = [run for run in of_data if run.arm == arm]
            before = [starts[name, arm, run.seed] for run in of_arm if (name, arm, run.seed) in starts]
            draw_arm_in_row(axis, row, before, [find_last(run, figure) for run in of_arm])
        write_beside(axis, -0.5, "difference")
        chance = find_chance(of_data, figure)
        dress_rows(axis, style.label_axis(figure) + (f" (chance {chance:.3f})" if chance else ""))
        axis.set_title(name if len(data) > 1 else None)
    panels[0, 0].set_yticks(range(len(arms)), [style.wrap(arm, 30) for arm in arms])
    panels[0, 0].set_ylim(len(arms) - 0.5, -0.5)  # the first arm at the top
    return finish(page, runs, figure, f"before training and after stage {stage}")


def draw_arm_in_row(axis: Axes, row: int, before: list[float], after: list[float]) -> None:
    """Draw the seeds one below the other within the row, so that equal values do not hide each other, then their mean."""
    for values, marks in ((before, BEFORE), (after, AFTER)):
        heights = [row + 0.5 * ((number + 0.5) / len(values) - 0.6) for number in range(len(values))]
        axis.plot(values, heights, **DOT | marks)
    means = [statistics.mean(values) for values in (before, after) if values]
    axis.plot(means, [row + 0.34] * len(means), **MEAN)
    if before and len(before) == len(after):
        write_beside(axis, row, format_change(means[1] - means[0]))


def format_change(value: float) -> str:
    """Format with three decimals and a sign; what rounds to nothing has none."""
    text = f"{value:+.3f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else "0.000"


def write_beside(axis: Axes, row: float, text: str) -> None:
    axis.annotate(
        text,
        (1, row),
        xycoords=axis.get_yaxis_transform(),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        annotation_clip=False,
    )


def dress_rows(axis: Axes, label: str) -> None:
    """Give a panel of rows its x axis: a label, few ticks with lines across, and a break where it does not begin at 0."""
    style.mark_truncated(axis, "x")
    axis.set_xlabel(label)
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)


def draw_chance(axis: Axes, runs: list[Run], figure: str) -> None:
    if chance := find_chance(runs, figure):
        axis.axhline(chance, color="black", linestyle=":", linewidth=1.2, label=f"chance, {chance:.3f}")
    rates = [find_last(run, f"{figure}, base rate") for run in runs if run.figures.get(f"{figure}, base rate")]
    if rates:
        rate = statistics.mean(rates)
        axis.axhline(rate, color="black", linestyle="-.", linewidth=1.2, label=f"base rate, {rate:.3f}")


def find_chance(runs: list[Run], figure: str) -> float | None:
    return next((run.chance for run in runs if figure == "mutual-knn" and run.chance), None)


def find_last(run: Run, figure: str) -> float:
    return run.figures[figure][-1][1]


def select_measured(runs: list[Run], figure: str, which: str = "") -> list[Run]:
    """Select the runs in which a figure was measured."""
    found = [run for run in runs if run.figures.get(figure)]
    if not found:
        names = style.unique(name for run in runs for name, points in run.figures.items() if points)
        raise ValueError(f"no run {which}has the figure {figure!r}; there are: {', '.join(names) or 'none'}")
    return found


def find_stages(runs: list[Run]) -> list[str]:
    return [stage for stage in STAGES if any(run.stage == stage for run in runs)]


def zip_panels(panels: np.ndarray, names: list[str]) -> list[tuple[Axes, str]]:
    """Pair panels with what they show, row by row, and hide those that are left over."""
    for axis in panels.flat[len(names) :]:
        axis.set_visible(False)
    return list(zip(panels.flat, names))


def label_values(panels: np.ndarray, figure: str) -> None:
    """Label the left panels, and scale all of them when everything is drawn: panels of a row may share an axis.

    What spans decades in a panel, as the RSA loss does, has logarithmic axes; all else begins at 0.
    """
    values_of = {axis: list_values(axis) for axis in panels.flat}
    spans = [max(values) / min(values) for values in values_of.values() if values and min(values) > 0]
    is_log = len(spans) == sum(map(bool, values_of.values())) and max(spans) > 30 and figure != "mutual-knn"
    for axis, values in values_of.items():
        if values and is_log:
            style.set_log(axis.yaxis)
        elif values and min(values) >= 0:
            axis.set_ylim(0, max(axis.get_ylim()[1], 1.08 * max(values)))
    for axis in panels[:, 0]:
        axis.set_ylabel(style.label_axis(figure) + (" (log scale)" if is_log else ""))


def list_values(axis: Axes) -> list[float]:
    """List what is drawn at places of its own, without lines across the panel."""
    return [y for line in axis.get_lines() if line.get_transform() == axis.transData for y in line.get_ydata()]


def finish(page: Figure, runs: list[Run], figure: str, when: str) -> Figure:
    """Add a title that says what was measured over what, and a legend for all panels."""
    sizes = {"k": runs[0].k, "N": runs[0].num_samples} if figure == "mutual-knn" else {}
    details = [f"{name} = {size}" for name, size in sizes.items() if size] + [style.format_seeds(list_seeds(runs))]
    style.add_title(page, f"{style.name_figure(figure)} {when}", ", ".join(details))
    style.add_legend_below(page)
    return page


def have_seeds(runs: list[Run]) -> bool:
    return max(map(len, list_seeds(runs))) > 1


def list_seeds(runs: list[Run]) -> list[list[int]]:
    arms = style.unique((run.data, run.arm) for run in runs)
    return [sorted({run.seed for run in runs if (run.data, run.arm) == arm}) for arm in arms]
