"""The benchmark runs: two trainings take turns, and their figures are of each."""

import json
import subprocess
import sys

import pytest

from tests.support.environment import BENCHMARKS

pytestmark = pytest.mark.usefixtures("preloaded_benchmarks")

SCRIPT = BENCHMARKS / "whole_step.py"


def test_it_measures_prints_and_appends(demo, tmp_path):
    command = [
        sys.executable,
        SCRIPT,
        "--demo",
        demo,
        "--processes",
        "1",
        "--turns",
        "2",
        "--iterations",
        "1",
        "--append",
        tmp_path / "f.jsonl",
        "--",
        "--micro-batch-size",
        "4",
        "--global-batch-size",
        "8",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (figures,) = map(json.loads, (tmp_path / "f.jsonl").read_text().splitlines())
    assert figures["ratio"] > 0 and figures["seconds"]["with"] > 0 and 0.5 < figures["memory_ratio"] < 2
    assert "| 1 |" in result.stdout


def test_a_run_that_fails_ends_both(demo):
    command = [sys.executable, SCRIPT, "--demo", demo, "--processes", "1", "--", "--micro-batch-size", "5"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "RSA ended early" in result.stderr and "micro" in result.stderr.lower()
