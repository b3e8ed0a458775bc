"""The benchmark runs, at a size at which its times mean nothing, and its memory and the equality of results do."""

import json
import subprocess
import sys

import pytest

from tests.support.environment import BENCHMARKS

pytestmark = pytest.mark.usefixtures("preloaded_benchmarks")

SCRIPT = BENCHMARKS / "realign.py"


def run(*flags):
    return subprocess.run([sys.executable, SCRIPT, "--threads", "1", *map(str, flags)], capture_output=True, text=True)


def test_it_measures_prints_and_appends(tmp_path):
    result = run("--rows", 20_000, "--width", 512, "--runs", 1, "--file", tmp_path, "--append", tmp_path / "f.jsonl")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert [(line["dtype"], line["files"]) for line in lines] == [
        ("float32", "cached"),
        ("float32", "disk"),
        ("float16", "cached"),
        ("float16", "disk"),
    ]
    for figures in lines:
        assert all(seconds > 0 for seconds in figures["seconds"].values())
        assert figures["difference"] < 1e-12  # sums of 2e4 numbers below 1 in another order
        assert abs(figures["scale"] - 1) > 0.01  # the trace step has something to do
        # A piece is 4.2 MB in float32, a block 2 MB, a set 41 MB. Plain holds a piece in float64, 8 MB, twice and more.
        piece = 2048 * 512 * (4 if figures["dtype"] == "float32" else 2)
        assert figures["memory_bytes"]["ours"] < piece + 8e6
        assert figures["memory_bytes"]["plain"] > piece + 2 * 2048 * 512 * 8
    assert "| float16 | disk |" in result.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "f.jsonl"]


def test_a_disk_that_is_too_small_is_told(tmp_path):
    result = run("--rows", 10**12, "--file", tmp_path)
    assert result.returncode != 0 and "pass --file FOLDER or fewer --rows" in result.stderr
