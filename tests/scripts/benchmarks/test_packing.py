"""The benchmark runs on a few steps; assumed samples are those of the recipes; and it counts what samples hold."""

import json
import subprocess
import sys

import pytest
import torch

from rsa_megatron.batch import LlavaBatch
from tests.support.environment import BENCHMARKS

pytestmark = pytest.mark.usefixtures("preloaded_benchmarks")

SCRIPT = BENCHMARKS / "packing.py"
sys.path.append(str(SCRIPT.parent))


def test_it_measures_prints_and_appends(demo, tmp_path):
    command = [sys.executable, SCRIPT, "--demo", demo, "--samples", "1000", "--processes", "1", "--stages", "1.5"]
    command += ["--layouts", "data parallel", "--turns", "1", "--iterations", "1", "--batch", "8"]
    command += ["--append", tmp_path / "f.jsonl", "--", "--num-workers", "0", "--shuffle-buffer-size", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "f.jsonl").read_text())
    of_demo, trained, assumed = figures["fill"]
    assert of_demo["row_length"] == 1792 and 0.95 < of_demo["fill"] < 1 and of_demo["samples"] == 1000
    assert trained["row_length"] == 2048 and 0.95 < trained["fill"] < 1
    assert assumed["fill"] > 0.9 > 0.4 > assumed["fill_padded"] and assumed["packer_us"] > 0
    (speed,) = figures["tokens"]
    assert speed["ratio"] == speed["tokens_per_s"]["packed"] / speed["tokens_per_s"]["padded"] > 0
    assert "| data parallel | 1.5 | " in result.stdout and "| demo, stage 1.5 | 1792 | 75 | 1000 |" in result.stdout


@pytest.mark.parametrize("stage, mean, padded", [("1.5", 2750, 0.336), ("2", 3446, 0.210)])
def test_assumed_samples_are_as_long_as_those_that_the_recipes_were_chosen_by(stage, mean, padded):
    import packing

    positions, tiles = packing.draw_lengths(stage, 4000)
    row_length = {"1.5": 8192, "2": 16384}[stage]
    # Of 4000 draws; their standard deviation is about 1000 and 2200.
    assert sum(positions) / len(positions) == pytest.approx(mean, rel=0.03)
    figures = packing.pack("x", positions, tiles, "llava-ov-7b", stage, row_length)
    assert figures["fill_padded"] == pytest.approx(padded, rel=0.03) and figures["fill"] > 0.92


def test_only_what_a_sample_would_have_alone_is_counted(monkeypatch):
    import packing

    monkeypatch.setattr(packing.turns.Turns, "__call__", lambda self, data, *rest: next(data))
    counted = packing.CountedTurns(None, None, None)
    fields = dict.fromkeys("tokens labels loss_mask images image_layouts rsa keys records".split())
    rows = [
        LlavaBatch(**fields, row_lengths=torch.tensor([7, 5])),
        LlavaBatch(**fields, row_lengths=torch.tensor([12])),
    ]
    rows[1].sequence_lengths = torch.tensor([7, 5])
    data = iter(rows)
    for _ in rows:
        counted(data)
    assert counted.count() == {"tokens": 12 + 10} and counted.count() == {"tokens": 0}
