"""The benchmark runs, at a size at which its figures mean nothing but its error does."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "rsa_loss.py"


def test_it_measures_prints_and_appends(tmp_path):
    command = [sys.executable, SCRIPT, "--threads", "1", "--sizes", "48", "64", "--runs", "2", "--append", tmp_path / "f.jsonl"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    small, large = map(json.loads, (tmp_path / "f.jsonl").read_text().splitlines())
    assert (small["N"], large["N"]) == (48, 64)
    for figures in (small, large):
        assert figures["ours_s"] > 0 and figures["cdist_s"] > 0 and figures["gemm_part"] > 0
        assert figures["ratio"] == figures["cdist_s"] / figures["ours_s"]
        assert 0 < figures["error"] < 1e-5
    assert "| 64 |" in result.stdout
