"""The figures after each stage come out of its metrics.jsonl."""

import json

import plot_stages
from PIL import Image

from tests.support import command

METRICS = """\
{{"iteration": 10, "lm loss": 0.7898411, "rsa loss": 600.0}}
{{"iteration": 10, "mutual-knn validation": 0.1111, "mutual-knn chance validation": 0.01}}
{{"iteration": 20, "lm loss validation": {loss}, "mutual-knn validation": {score}, "mutual-knn chance validation": 0.01}}
"""


def run(*arguments):
    return command.run(plot_stages.main, *arguments)


def test_the_last_figures_of_each_stage_are_told_and_drawn(tmp_path):
    for run_name, shift in (("a", 0), ("b", 1)):
        for number, stage in enumerate(("stage1", "stage1_5", "stage2")):
            folder = tmp_path / run_name / stage
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text(METRICS.format(loss=f"0.{number + 1}5", score=f"0.2{number}{shift}0"))
    (tmp_path / "before.jsonl").write_text(METRICS.format(loss="0.9", score="0.1300"))
    runs = ("--run", "with RSA", tmp_path / "a", "--run", "without", tmp_path / "b")
    result = run(
        "--before", tmp_path / "before.jsonl", *runs, "--out", tmp_path / "s.png", "--jsonl", tmp_path / "s.jsonl"
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("  ")]
    assert rows[0] == ["with", "RSA", "0.1300", "0.2000", "0.2100", "0.2200"]
    assert rows[1] == ["without", "0.1300", "0.2010", "0.2110", "0.2210"]
    assert rows[2] == ["with", "RSA", "0.9000", "0.1500", "0.2500", "0.3500"]
    first, second = map(json.loads, (tmp_path / "s.jsonl").read_text().splitlines())
    assert (
        first["stage 2"] == {"mutual-knn": 0.22, "validation lm loss": 0.35, "chance": 0.01}
        and second["run"] == "without"
    )
    assert Image.open(tmp_path / "s.png").width > 500
    again = run("--from-jsonl", tmp_path / "s.jsonl", "--out", tmp_path / "again.png")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "s.png").read_bytes()
    assert again.stdout.splitlines()[:-1] == result.stdout.splitlines()[:-1]


def test_a_file_of_other_lines_is_named(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"before": {}, "run": "with RSA"}\n')
    result = run("--from-jsonl", tmp_path / "other.jsonl", "--out", tmp_path / "s.png")
    assert "other.jsonl, line 1: 'stage 1' is missing" in result.stderr and not (tmp_path / "s.png").exists()


def test_a_run_that_has_not_ended_is_named(tmp_path):
    result = run("--run", "a", tmp_path, "--out", tmp_path / "s.png")
    assert (
        result.returncode == 2
        and "stage1/metrics.jsonl is missing; let examples/run_stages.sh end first" in result.stderr
    )
