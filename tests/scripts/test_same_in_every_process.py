"""Samples that are drawn, and figures, are the same in another process with other settings."""

import json
import os
import random
import subprocess
import sys

from rsa_megatron.cli import plot
from rsa_megatron.data.sources.open_pairs import sample
from tests.support.pictures import table
from tests.support.plot_lines import records_for


def test_a_sample_is_the_same_everywhere(tmp_path):
    pairs = table(tmp_path, 40)
    # Written down: another platform, Python or order of the file's rows must give these.
    expected = ["19.png", "22.png", "24.png", "31.png", "34.png"]
    assert [pair.key for pair in sample(pairs, 5, 0)] == expected
    shuffled = random.Random(0).sample(range(40), 40)
    other = sample(table(tmp_path, 40, shuffled), 5, 0)
    assert {pair.key for pair in other} == set(expected)
    assert [pair.key for pair in sample(pairs, 5, 1)] != expected
    # Another process has other hashes of its own (PYTHONHASHSEED).
    code = (
        f"from rsa_megatron.data.sources.open_pairs import open_pairs, sample; "
        f"print(*[pair.key for pair in sample(open_pairs({str(tmp_path / 'd.csv')!r}), 5, 0)])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [pair.key for pair in other]


def test_another_process_and_another_matplotlibrc_write_the_same_bytes(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in records_for("steps")))
    plot.main(["steps", str(path), "--out", str(tmp_path / "here")])
    (tmp_path / "matplotlibrc").write_text("font.size: 20\naxes.facecolor: red\nsvg.hashsalt: other\n")
    settings = os.environ | {"MATPLOTLIBRC": str(tmp_path), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-m", "rsa_megatron", "plot", "steps", path, "--out", tmp_path / "there"]
    result = subprocess.run(command, capture_output=True, text=True, env=settings)
    assert result.returncode == 0, result.stderr
    assert f"{tmp_path}/there.png" in result.stdout
    for kind in ("png", "svg"):
        assert (tmp_path / f"here.{kind}").read_bytes() == (tmp_path / f"there.{kind}").read_bytes()
