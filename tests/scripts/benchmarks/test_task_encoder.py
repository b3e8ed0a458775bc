"""The benchmark runs, on images so small that its figures mean nothing; and it stops where the two are not the same."""

import json
import subprocess
import sys

import pytest

from tests.support.environment import BENCHMARKS

pytestmark = pytest.mark.usefixtures("preloaded_benchmarks")

SCRIPT = BENCHMARKS / "task_encoder.py"
sys.path.append(str(SCRIPT.parent))


def test_it_measures_prints_and_appends(tmp_path):
    command = [sys.executable, SCRIPT, "--sizes", "90x60", "400x20", "--runs", "1", "--append", tmp_path / "f.jsonl"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "f.jsonl").read_text())
    small, wide = figures["images"]
    assert (small["size"], small["num_tiles"]) == ("90x60", 2) and (wide["size"], wide["num_tiles"]) == ("400x20", 3)
    for image in (small, wide):
        seconds = image["seconds"]
        assert seconds["ours"] > 0 and image["ratio"] == seconds["transformers"] / seconds["ours"]
    total = sum(image["seconds"]["ours"] for image in (small, wide))
    assert figures["samples_per_s"]["ours"] == pytest.approx(2 / total)
    assert "| 90 x 60 | 2 | " in result.stdout and "| all | 5 | " in result.stdout


def test_it_stops_where_pixels_or_tokens_differ():
    import task_encoder

    encoder, processor = task_encoder.make_contenders()
    encoder._images.grid_pinpoints = [(384, 768)]
    with pytest.raises(SystemExit, match="other pixels or tokens for an image of 90x60"):
        task_encoder.measure("90x60", encoder, processor, runs=1)
    encoder, processor = task_encoder.make_contenders()
    processor.vision_aspect_ratio = "anyres_max_1"
    with pytest.raises(SystemExit, match="other pixels or tokens for an image of 900x900"):
        task_encoder.measure("900x900", encoder, processor, runs=1)
