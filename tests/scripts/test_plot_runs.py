"""The curves are drawn from what Megatron prints."""

import json

import plot_runs
import pytest
from PIL import Image

from tests.support import command, script


def plot(*arguments):
    return command.run(plot_runs.main, *arguments)


@pytest.fixture(scope="module")
def log(demo, tmp_path_factory):
    flags = ("--eval-interval", 3, "--eval-iters", 2, "--mutual-knn-samples", 64)
    path = tmp_path_factory.mktemp("log") / "run.log"
    path.write_text("\n".join(script.run(2, demo, *flags)))
    return path


def test_numbers_and_curves_of_a_run(log, tmp_path):
    result = plot("--group", "a run", log, "--out", tmp_path / "run.png", "--jsonl", tmp_path / "run.jsonl")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "run.jsonl").read_text())
    logged = script.iterations([log.read_text()])
    for name in ("lm loss", "rsa loss", "rsa dist vision", "rsa dist text"):
        assert figures[name] == [[i, float(line[name])] for i, line in logged.items()]
    assert [i for i, _ in figures["mutual-knn"]] == [3, 6] == [i for i, _ in figures["validation lm loss"]]
    assert {value for _, value in figures["chance"]} == {0.1587}  # 10 of 63 others
    assert f"{figures['rsa loss'][-1][1]:.4f}   iterations 1 and 6" in result.stdout
    assert Image.open(tmp_path / "run.png").size[0] > 1000


def test_runs_of_a_group_are_given_as_mean_and_spread(log, tmp_path):
    other = tmp_path / "other.log"
    other.write_text("iteration        6/       6 | lm loss: 1.0E+00 | rsa loss: 2.0E+00 |\n")
    one = tmp_path / "one.log"
    one.write_text("iteration        6/       6 | lm loss: 3.0E+00 | rsa loss: 2.0E+00 |\n")
    result = plot("--group", "both", one, other, "--group", "a run", log, "--out", tmp_path / "runs.png")
    assert result.returncode == 0, result.stderr
    assert "2.0000 ± 1.4142" in result.stdout and "2.0000 ± 0.0000" in result.stdout


def test_a_log_without_figures_and_a_group_without_logs_are_named(tmp_path):
    (tmp_path / "empty.log").write_text("nothing\n")
    assert "empty.log: no line of Megatron's" in plot("--group", "a", tmp_path / "empty.log", "--out", "x.png").stderr
    assert "--group a: no log is named" in plot("--group", "a", "--out", "x.png").stderr
