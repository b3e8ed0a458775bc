"""The benchmark runs, on so few samples that its figures mean nothing; and its stopwatch counts each function for itself."""

import json
import subprocess
import sys
import time

import pytest

from tests.support.environment import BENCHMARKS

pytestmark = pytest.mark.usefixtures("preloaded_benchmarks")

SCRIPT = BENCHMARKS / "loader.py"
sys.path.append(str(SCRIPT.parent))


def test_it_measures_prints_and_appends(tmp_path):
    command = [
        sys.executable,
        SCRIPT,
        "--captions",
        "64",
        "--images",
        "8",
        "--sizes",
        "90x60",
        "400x20",
        "--workers",
        "0",
        "1",
        "--runs",
        "1",
        "--append",
        tmp_path / "f.jsonl",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "f.jsonl").read_text())
    assert list(figures["data"]) == ["demo captions", "AnyRes JPEGs", "AnyRes JPEGs, packed"]
    for name, data in figures["data"].items():
        assert list(data["workers"]) == ["0", "1"]
        for rate in data["workers"].values():
            assert rate["samples_per_s"] > 0 and rate["first_batch_s"] > 0
        if name == "AnyRes JPEGs, packed":
            continue
        assert all(seconds > 0 for seconds in data["cpu_s"].values()) and len(data["cpu_s"]) == 8
    assert "| AnyRes JPEGs | 1 | " in result.stdout and "| handing over |" in result.stdout


def test_a_function_within_another_counts_for_itself_alone():
    import loader

    def busy(seconds):
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    stopwatch = loader.Stopwatch()
    inner = stopwatch.around("inner", busy)
    stopwatch.around("outer", lambda: (inner(0.02), busy(0.01), inner(0.02)))()
    # The CPU time of one thread: what others do on the machine does not count. A thousandth of a second is the calls themselves.
    assert stopwatch.seconds["inner"] == pytest.approx(0.04, abs=0.001)
    assert stopwatch.seconds["outer"] == pytest.approx(0.01, abs=0.001)
