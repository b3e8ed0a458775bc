"""docs/quickstart.md, "Try your own captions": its commands as they stand, from captions to a model in Hugging Face format."""

import json
import os
import re
import subprocess

import pytest
from PIL import Image, ImageDraw

from rsa_megatron.plots.training_figures import read_figures
from tests.support.environment import ROOT

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("ellipse", "rectangle")


@pytest.fixture
def folder(tmp_path, demo, preloaded_python):
    """Sixty pictures with captions, beside what the page needs: the examples, the demo's tokenizer and the commands."""
    (tmp_path / "images").mkdir()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "demo").symlink_to(demo)
    records = []
    for n in range(60):
        colour, shape = COLOURS[n % 6], SHAPES[n % 2]
        picture = Image.new("RGB", (96, 64), "white")
        getattr(ImageDraw.Draw(picture), shape)((n // 2, 8, n // 2 + 30, 48), fill=colour)
        picture.save(tmp_path / "images" / f"{n:03d}.png")
        answer = f"A {colour} {shape} on white, {n // 2} from the left."
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": answer}]
        records.append({"id": f"{n}", "image": f"{n:03d}.png", "conversations": turns})
    (tmp_path / "captions.json").write_text(json.dumps(records))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "rsa-megatron").write_text(f'#!/bin/sh\nexec {preloaded_python} -m rsa_megatron "$@"\n')
    (tmp_path / "bin" / "rsa-megatron").chmod(0o755)
    return tmp_path


def test_a_run_by_hand_can_be_looked_at_first(folder, preloaded_python):
    """ "Start a run by hand", but for the making of the data, which are there."""
    section = (ROOT / "docs" / "quickstart.md").read_text().partition("## Start a run by hand")[2]
    (command,) = re.findall(r"^    (torchrun (?:.*\\\n)*.*--dry-run)$", section, re.MULTILINE)
    result = run(command, folder, preloaded_python)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "RSA: weight 0.001; up to " in result.stdout


def run(commands: str, folder, preloaded_python):
    path = os.pathsep.join([str(folder / "bin"), os.path.dirname(preloaded_python), os.environ["PATH"]])
    environment = os.environ | {"PATH": path}
    return subprocess.run(["bash", "-e"], input=commands, capture_output=True, text=True, cwd=folder, env=environment)


def test_own_captions_become_a_model_scores_and_figures(folder, preloaded_python):
    section = (ROOT / "docs" / "quickstart.md").read_text().partition("## Try your own captions")[2]
    (block,) = re.findall(r"(?:^    .*\n)+", section, re.MULTILINE)
    result = run(block, folder, preloaded_python)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    # The very command that `data pack` has printed trains at the first try, too.
    command = re.search(r"^ +(torchrun (?:.*\\\n)*.*)$", result.stdout, re.MULTILINE)[1]
    assert "--eval-interval 10" in command
    first = run(f"{command} --save runs/first", folder, preloaded_python)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert read_figures(folder / "runs" / "first" / "metrics.jsonl")["mutual-knn"]
    figures = read_figures(folder / "runs" / "mine" / "metrics.jsonl")
    assert list(figures["lm loss"]) == list(range(1, 41)) and list(figures["mutual-knn"]) == [20, 40]
    assert figures["lm loss"][40] < figures["lm loss"][1] and figures["chance"][40] == 3 / 7
    assert json.loads((folder / "runs" / "mine" / "run.json").read_text())["finished"] == 40
    (line,) = map(json.loads, (folder / "results" / "mine.jsonl").read_text().splitlines())
    assert line["metric"] == "mutual-knn" and line["num_samples"] == 40
    for name in ("runs/mine-hf/model.safetensors", "results/mine.png", "results/mine.svg", "runs/mine/curves.png"):
        assert (folder / name).stat().st_size > 5000, name
