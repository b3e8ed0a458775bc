"""The figures say what the lines say: drawn values, places and marks, the same bytes each time, and faults by name.

The measurements are real: mutual-kNN of features that share more and more from layer to layer. The training runs have the
form of those of `make reproduce`, with made-up curves.
"""

import statistics

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from rsa_megatron.cli import plot
from rsa_megatron.plots import alignment, style
from rsa_megatron.plots import runs as run_figures
from rsa_megatron.plots.alignment_records import read_alignments, read_runs
from tests.support.plot_lines import (
    CHANCE,
    DATA,
    LONG,
    MODELS,
    RISES,
    K,
    N,
    all_runs,
    lines_named,
    many_layers,
    measured,
    random_line,
    rendered,
    texts,
)

# Heat maps


def test_a_heat_map_shows_the_mean_with_layer_0_at_the_bottom_left(write_lines):
    record = measured()
    figure = alignment.draw_heatmaps(read_alignments([write_lines([record])]))
    axis = figure.axes[0]
    mean_RC = np.array(record["mean"])
    np.testing.assert_array_equal(axis.images[0].get_array(), mean_RC)
    pixels = rendered(figure)
    # A shade in 255: what colours are rounded to.
    for row, column in ((0, 0), (0, 6), (4, 0), (3, 2)):
        # A little beside the middle of its cell, where no mark lies.
        x, y = axis.transData.transform((column - 0.4, row - 0.4))
        expected = axis.images[0].to_rgba(mean_RC[row, column])[:3]
        np.testing.assert_allclose(pixels[-int(y), int(x), :3] / 255, expected, atol=1 / 255)
    assert axis.transData.transform((0, 0))[1] < axis.transData.transform((0, 4))[1]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("layer of language backbone", "layer of vision backbone")
    assert [label.get_text() for label in axis.get_yticklabels()] == list("01234")
    assert figure.axes[1].get_ylabel() == "mutual-kNN"  # the colour bar
    assert f"LLaVA: mutual-kNN of all pairs of layers\n(k = {K}, N = {N}, seeds 0, 1, 2)" in texts(figure)


def test_best_and_last_pair_are_marked_at_their_layers_with_different_marks(write_lines):
    record = measured()
    axis = alignment.draw_heatmaps(read_alignments([write_lines([record])])).axes[0]
    best, last = (lines_named(axis, f"{name} pair of layers")[0] for name in ("best", "last"))
    assert [best.get_xdata()[0], best.get_ydata()[0]] == [int(record["best"][side]) for side in ("column", "row")]
    assert [last.get_xdata()[0], last.get_ydata()[0]] == [6, 4]
    assert best.get_marker() != last.get_marker()
    assert f"best {record['best']['mean']:.3f} ± {record['best']['std']:.3f}" in axis.get_title()


def test_data_sets_stand_side_by_side_models_one_below_the_other_and_a_gap_stays_empty(write_lines):
    lines = [measured("A", "COCO"), measured("A", "WIT"), measured("B", "WIT", rows=3), random_line()]
    figure = alignment.draw_heatmaps(read_alignments([write_lines(lines)]))
    a_coco, a_wit, b_coco, b_wit, bar = figure.axes
    assert not b_coco.get_visible() and b_wit.get_title().startswith("WIT")
    np.testing.assert_array_equal(b_wit.images[0].get_array(), lines[2]["mean"])
    assert a_coco.get_ylabel() == "A\nlayer of vision backbone" and b_wit.get_ylabel().startswith("B\n")
    highest = max(np.max(line["mean"]) for line in lines[:3])
    assert {axis.images[0].norm.vmax for axis in (a_coco, a_wit, b_wit)} == {highest}  # one scale
    apart = alignment.draw_heatmaps(read_alignments([write_lines(lines)]), scale="panel")
    assert apart.axes[0].images[0].norm.vmax == np.max(lines[0]["mean"]) and len(apart.axes) == 4 + 3


def test_axes_between_two_backbones_of_a_kind_name_the_models(write_lines):
    record = measured("Vision-only", columns=3) | {"columns": "vision", "column_model": "b/other-tower"}
    axis = alignment.draw_heatmaps(read_alignments([write_lines([record])])).axes[0]
    assert axis.get_ylabel().replace("\n", " ") == "layer of vision backbone of tower"
    assert axis.get_xlabel().replace("\n", " ") == "layer of vision backbone of other-tower"


@pytest.mark.parametrize("num_layers", (1, 2, 8, 9, 25, 27, 29, 33, 65, 500))
def test_layer_ticks_are_few_and_have_the_first_and_the_last(num_layers):
    ticks = alignment.choose_ticks(num_layers)
    assert ticks[0] == 0 and ticks[-1] == num_layers - 1 and len(ticks) <= 9 and ticks == sorted(set(ticks))


# Bars


def bars_of(axis) -> dict[str, list]:
    return {bars.get_label(): bars for bars in axis.containers if hasattr(bars, "patches")}


def test_bars_are_as_high_as_the_best_pair_with_its_deviation_over_seeds(write_lines):
    lines = [
        measured("A", "COCO"),
        measured("B", "COCO"),
        measured("A", "WIT"),
        measured("Vision-only", "COCO", columns=5) | {"columns": "vision"},
        random_line(),
    ]
    figure = alignment.draw_bars(read_alignments([write_lines(lines[::-1])]))
    axis = figure.axes[0]
    bars = bars_of(axis)
    for line in lines:
        heights = [patch.get_height() for patch in bars[line["label"]]]
        assert line["best"]["mean"] in heights
        spans = [segment[:, 1] for segment in bars[line["label"]].errorbar[2][0].get_segments()]
        expected = line["best"]["mean"] - line["best"]["std"], line["best"]["mean"] + line["best"]["std"]
        assert any(np.allclose(span, expected, rtol=1e-12) for span in spans)  # the same sums in float64
    assert axis.get_lines()[-1].get_ydata()[0] == CHANCE
    places = {label: bars[label].patches[-1].get_x() for label in bars}
    assert set(list(places)[-2:]) == {"Random", "Vision-only"}
    assert {tick.get_text() for tick in axis.get_xticklabels()} == {"COCO", "WIT", "standard normal"}
    assert places["Random"] > places["A"]  # its group is the last, though its line came first
    for label in ("Random", "Vision-only"):
        assert to_hex(bars[label].patches[0].get_facecolor()) == "#c8c8c8"


def test_one_seed_has_no_error_bar(write_lines):
    figure = alignment.draw_bars(read_alignments([write_lines([measured(seeds=1)])]))
    segments = bars_of(figure.axes[0])["LLaVA"].errorbar[2][0].get_segments()
    assert not any(np.isfinite(segment).all() for segment in segments if len(segment)) and "±" not in texts(figure)
    assert "seed 0)" in texts(figure)


def test_bars_show_what_the_best_of_shuffled_pairs_is(write_lines):
    shuffled = [{"orders": 10, "mean": [[0.1]], "best": best, "last": 0.08} for best in (0.11, 0.13)]
    lines = [measured("A", shuffled=shuffled[0]), measured("B", shuffled=shuffled[1]), measured("older")]
    axis = alignment.draw_bars(read_alignments([write_lines(lines)])).axes[0]
    (marks,) = [one for one in axis.collections if one.get_label().startswith("shuffled pairs")]
    bars = bars_of(axis)
    for segment, best, label in zip(marks.get_segments(), (0.11, 0.13), "AB", strict=True):
        assert (segment[:, 1] == best).all() and segment[:, 0].mean() == pytest.approx(bars[label][0].get_center()[0])
    assert lines_named(axis, f"chance, {CHANCE:.3f}")
    older = alignment.draw_bars(read_alignments([write_lines(lines[2:], "older.jsonl")])).axes[0]
    assert not [one for one in older.collections if one.get_label().startswith("shuffled pairs")]


def test_no_chance_above_one_is_drawn(write_lines):
    """Of 8 pairs and 10 neighbours it was 10 / 7."""
    axis = alignment.draw_bars(read_alignments([write_lines([measured(chance=10 / 7)])])).axes[0]
    assert not [line for line in axis.get_lines() if line.get_label().startswith("chance")]
    runs = read_runs([write_lines([line | {"chance": 10 / 7} for line in all_runs()], "runs.jsonl")])
    axis = run_figures.draw_stages(runs).axes[0]
    assert not [line for line in axis.get_lines() if line.get_label().startswith("chance")]


def test_a_caption_that_has_seen_its_image_is_never_under_the_same_name(write_lines):
    lines = [measured(), measured(text_reading="multimodal")]
    labels = bars_of(alignment.draw_bars(read_alignments([write_lines(lines)])).axes[0])
    assert list(labels) == ["LLaVA", "LLaVA, captions read after their images"]


# Training runs


def test_stages_show_means_every_seed_and_what_training_began_from(write_lines):
    lines = all_runs()
    # What a later stage began from is not what training began from.
    for line in lines:
        if line["stage"] != "1":
            line["before"] = {"mutual-knn": 0.9}
    axis = run_figures.draw_stages(read_runs([write_lines(lines)])).axes[0]
    for arm, rise in RISES.items():
        last = [0.12 + 0.01 * seed + rise for seed in (1, 2, 3)]
        (mean,) = lines_named(axis, arm)
        np.testing.assert_allclose(mean.get_ydata(), [statistics.mean(last)] * 3, rtol=1e-6)  # rounded to 6 digits
        seeds = [line for line in axis.get_lines() if line.get_color() == mean.get_color() and line is not mean]
        assert len(seeds) == 3  # stages
        np.testing.assert_allclose([line.get_ydata() for line in seeds], [last] * 3, rtol=1e-5)
    (before,) = lines_named(axis, "before training, mean")
    assert before.get_ydata()[0] == pytest.approx(0.14) and before.get_linestyle() == "--"
    assert lines_named(axis, "chance, 0.010")[0].get_ydata()[0] == 0.01
    assert [label.get_text() for label in axis.get_xticklabels()] == ["before", "1", "1.5", "2"]


def test_an_arm_without_a_stage_goes_past_it(write_lines):
    lines = all_runs() + all_runs({"with RSA, no stage 1.5": 0.04}, stages=("1", "2"))
    axis = run_figures.draw_stages(read_runs([write_lines(lines)])).axes[0]
    (mean,) = lines_named(axis, "with RSA, no stage 1.5")
    assert len(mean.get_xdata()) == 2 and mean.get_xdata()[1] - mean.get_xdata()[0] == pytest.approx(2)


def test_steps_show_the_mean_the_band_and_a_line_a_seed_from_what_training_began_from(write_lines):
    figure = run_figures.draw_steps(read_runs([write_lines(all_runs())]))
    first, second, _ = figure.axes
    (mean,) = lines_named(first, "with RSA")
    assert list(mean.get_xdata()) == [0, 10, 20, 30, 40]
    assert list(lines_named(second, "with RSA")[0].get_xdata()) == [10, 20, 30, 40]
    seeds = np.array([[0.12 + 0.01 * seed + 0.05 * i / 40 for i in range(0, 41, 10)] for seed in (1, 2, 3)])
    np.testing.assert_allclose(mean.get_ydata(), seeds.mean(0), rtol=1e-5)  # the curves are rounded to 6 digits
    thin = [line.get_ydata() for line in first.get_lines() if line.get_color() == mean.get_color() and line is not mean]
    np.testing.assert_allclose(thin, seeds, rtol=1e-5)
    corners = first.collections[0].get_paths()[0].vertices
    for index, iteration in enumerate(range(0, 41, 10)):
        heights = corners[corners[:, 0] == iteration][:, 1]
        np.testing.assert_allclose(heights.max(), seeds[:, index].mean() + seeds[:, index].std(ddof=1), rtol=1e-5)
        np.testing.assert_allclose(heights.min(), seeds[:, index].mean() - seeds[:, index].std(ddof=1), rtol=1e-5)
    assert first.get_title() == "stage 1" and first.get_ylim()[0] == 0 == second.get_ylim()[0]


def test_one_seed_has_neither_band_nor_thin_lines(write_lines):
    figure = run_figures.draw_steps(read_runs([write_lines(all_runs(seeds=(1,)))]))
    axis = figure.axes[0]
    assert not axis.collections and len(axis.get_lines()) == len(RISES) + 1 and "±" not in texts(figure)


def test_losses_have_their_own_axes_and_a_logarithmic_one_where_they_span_decades(write_lines):
    runs = read_runs([write_lines(all_runs())])
    language, rsa = (run_figures.draw_steps(runs, figure=name).axes[0] for name in ("lm loss", "rsa loss"))
    assert language.get_yscale() == "linear" and language.get_ylabel() == "LM loss, nats per token"
    assert rsa.get_yscale() == "log" and not lines_named(rsa, "chance, 0.010")
    assert rsa.get_ylabel() == "RSA loss (log scale)" and language.get_ylim()[0] == 0
    ticks = [rsa.yaxis.get_major_formatter()(tick) for tick in rsa.yaxis.get_major_locator()()]
    assert {"1", "10", "100"} <= set(ticks)


def test_ablation_has_a_row_an_arm_every_seed_and_the_gain_since_training_began(write_lines):
    arms = {"without": 0.01, "Euclidean, weight 0.01": 0.05, "cosine, weight 1": -0.02}
    runs = read_runs([write_lines(all_runs(arms))])
    for stage in ("1", "2"):  # in both, "before" is what stage 1 began from
        figure = run_figures.draw_ablation(runs, stage=stage)
        axis = figure.axes[0]
        assert [label.get_text() for label in axis.get_yticklabels()] == list(arms)
        assert axis.get_ylim() == (2.5, -0.5)  # the first arm at the top
        for row, rise in enumerate(arms.values()):
            before, after = (lines_named(axis, f"{when}, each seed")[row] for when in ("before", "after"))
            np.testing.assert_allclose(before.get_xdata(), [0.13, 0.14, 0.15], rtol=1e-6)
            np.testing.assert_allclose(after.get_xdata(), [0.13 + rise, 0.14 + rise, 0.15 + rise], rtol=1e-5)
            mean = lines_named(axis, run_figures.MEAN["label"])[row]
            np.testing.assert_allclose(mean.get_xdata(), [0.14, 0.14 + rise], rtol=1e-5)
            assert mean.get_markevery() == [-1]  # marks at both ends would look like an error bar
            assert {round(height) for height in (*before.get_ydata(), *after.get_ydata())} == {row}
        assert all(text in texts(figure) for text in ("+0.010", "+0.050", "\N{MINUS SIGN}0.020", "chance 0.010"))


def test_accuracy_is_a_figure_of_the_end(write_lines):
    axis = run_figures.draw_stages(read_runs([write_lines(all_runs())]), figure="accuracy on questions").axes[0]
    np.testing.assert_allclose(lines_named(axis, "without")[0].get_ydata(), [0.7] * 3)
    assert not lines_named(axis, "before training, mean")


def test_stages_and_steps_draw_the_two_main_arms_unless_others_are_named(write_lines):
    runs = read_runs([write_lines(all_runs({"cosine": 0.02, "without": 0.01, "with RSA": 0.05}))])
    main = plot.select_arms(runs, None, plot.MAIN_ARMS)
    asked = plot.select_arms(runs, ["cosine", "with RSA"])
    assert style.unique(run.arm for run in main) == ["with RSA", "without"]
    assert style.unique(run.arm for run in asked) == ["cosine", "with RSA"]
    assert len(plot.select_arms(runs, None)) == len(runs)


# How it looks


def luminance(color) -> float:
    return float(np.dot(to_rgb(color), (0.2126, 0.7152, 0.0722)))


def rises(color_map: str) -> bool:
    return bool((np.diff([luminance(matplotlib.colormaps[color_map](i)[:3]) for i in range(256)]) > 0).all())


def test_the_colour_map_rises_in_lightness_all_the_way():
    assert rises(style.COLOR_MAP)
    assert not rises("jet")  # negative control


def test_twelve_series_differ_without_their_colours():
    looks = {(style.choose_marker(i), style.choose_line(i)) for i in range(12)}
    assert len(looks) == 12 and len({style.choose_marker(i) for i in range(12)}) == 12
    assert len({style.choose_hatch(i) for i in range(12)}) == 12
    # The two arms of most figures differ in lightness, too, by a fifth of the way from black to white or more.
    assert abs(luminance(style.choose_color(0)) - luminance(style.choose_color(1))) > 0.2


def overlaps(figure) -> list[tuple[str, str]]:
    """Pairs of texts that are drawn, and whose boxes meet."""
    rendered(figure)
    outside = {label for axis in figure.axes for side in (axis.xaxis, axis.yaxis) for label in labels_outside(side)}
    found = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    found = [text for text in found if text not in outside and (text.axes is None or text.axes.get_visible())]
    boxes = [(text.get_text(), text.get_window_extent()) for text in found]
    return [(a, b) for i, (a, one) in enumerate(boxes) for b, two in boxes[i + 1 :] if one.overlaps(two)]


def labels_outside(side) -> list[Text]:
    """Labels of ticks beyond the ends of an axis, which matplotlib keeps and does not draw."""
    low, high = sorted(side.get_view_interval())
    beyond = [tick for tick in side.get_major_ticks() if not low <= tick.get_loc() <= high]
    return [label for tick in beyond for label in (tick.label1, tick.label2)]


FORMS = {
    "heat map": lambda write_lines: alignment.draw_heatmaps(read_alignments([write_lines(many_layers(MODELS, DATA))])),
    "one heat map": lambda write_lines: alignment.draw_heatmaps(
        read_alignments([write_lines(many_layers(["LLaVA"], ["COCO"]))])
    ),
    "bars": lambda write_lines: alignment.draw_bars(
        read_alignments([write_lines([*many_layers(MODELS, DATA), random_line()])])
    ),
    "12 models": lambda write_lines: alignment.draw_bars(read_alignments([write_lines(many_layers(LONG, DATA))])),
    "stages": lambda write_lines: run_figures.draw_stages(read_runs([write_lines(all_runs(data=DATA))])),
    "steps": lambda write_lines: run_figures.draw_steps(read_runs([write_lines(all_runs(data=DATA))])),
    "ablation": lambda write_lines: run_figures.draw_ablation(
        read_runs([write_lines(all_runs(LONG, stages=("1",), data=DATA))])
    ),
}


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # in the negative control
@pytest.mark.parametrize("form", FORMS)
def test_no_text_lies_on_another_with_long_names_and_many_arms(write_lines, form):
    with style.styled():
        figure = FORMS[form](write_lines)
        assert overlaps(figure) == []
        figure.set_size_inches(2, 1)
        assert overlaps(figure) != []  # negative control


@pytest.mark.parametrize("form", FORMS)
def test_text_is_legible_on_a_page_800_pixels_wide(write_lines, form):
    with style.styled():
        figure = FORMS[form](write_lines)
    scale = 800 / (72 * figure.get_figwidth())  # pixels a point
    found = [text for text in figure.findobj(Text) if text.get_text().strip()]
    assert min(text.get_fontsize() for text in found) * scale > 8


def test_a_long_legend_takes_no_room_from_the_panels(write_lines):
    heights = []
    for arms in (RISES, LONG):
        figure = run_figures.draw_stages(read_runs([write_lines(all_runs(arms))]))
        rendered(figure)
        heights.append(figure.axes[0].get_window_extent().height)
    assert heights[1] > 0.9 * heights[0]  # a row of the legend is counted as 0.2 inches, near its height


@pytest.mark.parametrize("draw", (run_figures.draw_stages, run_figures.draw_ablation))
def test_a_fourth_data_set_begins_a_row_of_its_own(write_lines, draw):
    figure = draw(read_runs([write_lines(all_runs(data=(*DATA, "scenes")))]))
    visible = [axis for axis in figure.axes if axis.get_visible()]
    assert len(visible) == 4 and {axis.get_subplotspec().get_gridspec().ncols for axis in visible} == {3}
    assert [axis.get_title() for axis in visible] == [*DATA, "scenes"]


def test_a_heat_map_of_a_fourth_data_set_begins_a_row_of_its_own(write_lines):
    lines = [measured(model, data) for model in "AB" for data in (*DATA, "scenes")]
    figure = alignment.draw_heatmaps(read_alignments([write_lines(lines)]))
    visible = [axis for axis in figure.axes[:12] if axis.get_visible()]
    assert [axis.get_title().split("\n")[0] for axis in visible] == [*DATA, "scenes"] * 2
    assert [figure.axes.index(axis) for axis in visible] == [0, 1, 2, 3, 6, 7, 8, 9]
    for axis, line in zip(visible, lines):
        np.testing.assert_array_equal(axis.images[0].get_array(), line["mean"])
    assert [axis.get_ylabel().split("\n")[0] for axis in visible] == ["A", "", "", "A", "B", "", "", "B"]


def test_an_axis_without_0_has_a_break_and_one_with_0_has_none():
    def dark(limits) -> int:
        figure = Figure(figsize=(3, 3))
        axis = figure.add_axes((0.3, 0.3, 0.6, 0.6))
        axis.set(ylim=limits, yticks=[], xticks=[])
        for _ in range(2):
            style.mark_truncated(axis, "y")
        axis.spines[:].set_visible(False)
        return int((rendered(figure)[..., 0] < 128).sum())

    assert dark((0, 1)) == dark((-1, 1)) == 0 < dark((0.5, 1))


@pytest.mark.parametrize(
    "value, text",
    [
        (0.6, "0.6"),
        (1, "1"),
        (1500, "1500"),
        (0.00001, "0.00001"),
        (0, "0"),
        (1e-9, "$10^{-9}$"),
        (2e7, r"$2\times 10^{7}$"),
    ],
)
def test_ticks_are_plain_decimals(value, text):
    assert style.format_tick(value) == text


# The command
