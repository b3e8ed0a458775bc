"""metrics.jsonl holds what Megatron logs, and the curves are drawn from it."""

import json
import re

import plot_runs
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import command, script


def plot(*arguments):
    return command.run(plot_runs.main, *arguments)


@pytest.fixture(scope="module")
def run(demo, tmp_path_factory):
    """What a run of two ranks printed, and its metrics.jsonl. TensorBoard is on, as in most runs."""
    folder = tmp_path_factory.mktemp("run")
    flags = (
        "--eval-interval",
        3,
        "--eval-iters",
        2,
        "--mutual-knn-samples",
        64,
        "--eval-metrics",
        "mutual-knn",
        "cka",
        "--tensorboard-dir",
        folder / "tensorboard",
    )
    metrics = folder / "metrics.jsonl"
    metrics.write_text(
        '{"iteration": 1, "lm loss": 9.0}\n{"iteration": 2, "lm lo'
    )  # as a run leaves it that was killed
    return script.run(2, demo, *flags, "--metrics-file", metrics), metrics


@pytest.fixture(scope="module")
def metrics(run):
    return run[1]


def test_numbers_and_curves_of_a_run(run, tmp_path):
    outputs, metrics = run
    result = plot("--group", "a run", metrics, "--out", tmp_path / "run.png", "--jsonl", tmp_path / "run.jsonl")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "run.jsonl").read_text())
    logged = script.iterations(outputs)
    for name in ("lm loss", "rsa loss", "rsa dist vision", "rsa dist text"):
        # The log has seven digits. The file's half line is gone, and of iteration 1 the later line counts.
        values = dict(figures[name])
        assert list(values) == list(logged)
        assert values == {i: pytest.approx(float(line[name]), rel=1e-6) for i, line in logged.items()}
    assert [i for i, _ in figures["mutual-knn"]] == [3, 6] == [i for i, _ in figures["validation lm loss"]]
    assert {value for _, value in figures["chance"]} == {10 / 63}
    evaluations = [json.loads(line) for line in metrics.read_text().splitlines() if "cka validation" in line]
    # That of other 64 pairs of the same rows; a model of random weights has little more.
    assert all(0 < line["cka chance validation"] < 2 * line["cka validation"] < 2 for line in evaluations)
    for line in evaluations:
        assert f"chance {line['cka chance validation']:.4f} |" in "".join(outputs)
    said = re.findall(r"mutual-knn value: ([\d.]+)", "".join(outputs))
    assert [f"{value:.4f}" for _, value in figures["mutual-knn"]] == said[:2]  # it evaluates once more at the end
    assert f"{figures['rsa loss'][-1][1]:.4f}   iterations 1 and 6" in result.stdout
    assert Image.open(tmp_path / "run.png").size[0] > 1000
    again = plot("--from-jsonl", tmp_path / "run.jsonl", "--out", tmp_path / "again.png")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "run.png").read_bytes()
    assert again.stdout.splitlines()[:-1] == result.stdout.splitlines()[:-1]


def test_every_figure_of_tensorboard_is_in_the_file(metrics):
    events = EventAccumulator(str(metrics.parent / "tensorboard"))
    events.Reload()
    names = {tag for tag in events.Tags()["scalars"] if not tag.endswith(" vs samples")}
    lines = [json.loads(text) for text in metrics.read_text().splitlines()][1:]
    written = {
        (name, line["iteration"]): value for line in lines for name, value in line.items() if name != "iteration"
    }
    assert names == {name for name, _ in written} and {"mutual-knn validation", "cka validation"} <= names
    for name in names:  # TensorBoard keeps float32
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == {
            step: pytest.approx(value, rel=1e-6) for (other, step), value in written.items() if other == name
        }


def test_runs_of_a_group_are_given_as_mean_and_spread(metrics, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"iteration": 6, "lm loss": 1.0, "rsa loss": 2.0}\n')
    one = tmp_path / "one.jsonl"
    one.write_text('{"iteration": 6, "lm loss": 3.0, "rsa loss": 2.0}\n')
    result = plot("--group", "both", one, other, "--group", "a run", metrics, "--out", tmp_path / "runs.png")
    assert result.returncode == 0, result.stderr
    assert "2.0000 ± 1.4142" in result.stdout and "2.0000 ± 0.0000" in result.stdout


def test_a_file_without_figures_and_a_group_without_files_are_named(tmp_path):
    for content, message in (
        ("", "empty.jsonl has no iteration of training"),
        ("nothing\n", "empty.jsonl, line 1 is not a line"),
    ):
        (tmp_path / "empty.jsonl").write_text(content)
        assert message in plot("--group", "a", tmp_path / "empty.jsonl", "--out", "x.png").stderr
    (tmp_path / "other.jsonl").write_text('{"group": "a", "lm loss": 1}\n')
    other = plot("--from-jsonl", tmp_path / "other.jsonl", "--out", tmp_path / "x.png")
    assert "other.jsonl, line 1: 'lm loss' is a list of [iteration, value]" in other.stderr
    assert "no-such.jsonl" in plot("--group", "a", tmp_path / "no-such.jsonl", "--out", "x.png").stderr
    assert "--group a: no metrics.jsonl is named" in plot("--group", "a", "--out", "x.png").stderr


def test_curves_have_plain_ticks_and_no_legend_over_them(tmp_path):
    curve = [[1, 1.5], [10, 0.8], [20, 0.5]]
    run = dict.fromkeys(plot_runs.FIGURES, []) | {"lm loss": curve, "mutual-knn": [[0, 0.1], [20, 0.2]]}
    figure = plot_runs.draw({"with RSA": [run, run], "without": [run]})
    loss, *_, alignment, corner = figure.axes
    assert max(axis.get_subplotspec().get_gridspec().ncols for axis in figure.axes) == 3
    ticks = [loss.yaxis.get_major_formatter()(tick) for tick in loss.yaxis.get_major_locator()()]
    assert {"0.5", "0.7", "1", "1.5"} <= set(ticks) and loss.get_ylabel() == "nats per token (log scale)"
    assert alignment.get_ylim()[0] == 0
    assert corner.get_legend() and not any(axis.get_legend() for axis in figure.axes if axis is not corner)
