"""The benchmark runs, at a size at which its times mean nothing but the equality of results does."""

import json
import subprocess
import sys

import pytest

from tests.support.environment import BENCHMARKS

pytestmark = pytest.mark.usefixtures("preloaded_benchmarks")

SCRIPT = BENCHMARKS / "mutual_knn.py"


def test_it_measures_prints_and_appends(tmp_path):
    command = [
        sys.executable,
        SCRIPT,
        "--threads",
        "1",
        "--device",
        "cpu",
        "--sizes",
        "600",
        "--runs",
        "1",
        "--append",
        tmp_path / "f.jsonl",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert [(line["features"], line["N"]) for line in lines] == [("normal", 600), ("cone", 600)]
    for figures in lines:
        assert figures["ours_s"] > 0 and figures["full_s"] > 0 and figures["gemm_part"] > 0
        assert figures["ratio"] == figures["full_s"] / figures["ours_s"]
        # Theirs are float32 cosines: equal but for neighbours that these cannot tell apart.
        assert figures["difference"] < 2e-6 and figures["rows_that_differ"] <= 0.01 * figures["N"]
        assert abs(figures["scores"]["ours"] - figures["scores"]["full"]) < 1e-3
    assert "| cone | 600 |" in result.stdout
