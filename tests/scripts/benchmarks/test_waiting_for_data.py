"""The benchmark runs on a few steps; and it counts whole ones."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.support.environment import BENCHMARKS

pytestmark = pytest.mark.usefixtures("preloaded_benchmarks")

SCRIPT = BENCHMARKS / "waiting_for_data.py"
sys.path.append(str(SCRIPT.parent))


def test_it_measures_prints_and_appends(tmp_path):
    command = [
        sys.executable,
        SCRIPT,
        "--threads",
        "1",
        "--processes",
        "1",
        "--workers",
        "0",
        "--iterations",
        "3",
        "--uncounted",
        "1",
        "--samples",
        "64",
        "--runs",
        "1",
        "--append",
        tmp_path / "f.jsonl",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads((tmp_path / "f.jsonl").read_text())["workers"]["0"]
    assert 0 < figures["share"] < 1 and figures["share"] == figures["waiting_s"] / figures["step_s"]
    assert "| 0 | " in result.stdout


def test_whole_steps_are_counted():
    import waiting_for_data

    # Two micro-batches a step of 10 s: 1 s of waiting for the first, 2 s for the second; the first step takes longer.
    asked = [(start, start + wait) for step in (-50, 0, 10, 20) for start, wait in ((step, 1), (step + 5, 2))]
    figures = waiting_for_data.of_whole_steps(asked, SimpleNamespace(processes=1, uncounted=1))
    assert figures == {"step_s": 10, "waiting_s": 3, "share": pytest.approx(0.3)}
