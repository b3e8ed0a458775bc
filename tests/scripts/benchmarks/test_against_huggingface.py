"""The two sides train the same model on the same batch; at sizes at which the times mean nothing."""

import argparse
import json
import subprocess
import sys

import pytest

from tests.support.environment import BENCHMARKS

pytestmark = pytest.mark.usefixtures("preloaded_benchmarks")

SCRIPT = BENCHMARKS / "against_huggingface.py"


def test_both_sides_begin_alike_and_figures_are_appended(tmp_path):
    command = [
        sys.executable,
        SCRIPT,
        "--threads",
        "1",
        "--batch-size",
        "2",
        "--text-tokens",
        "8",
        "--turns",
        "2",
        "--steps",
        "1",
        "--trainable",
        "vision",
        "projector",
        "--append",
        tmp_path / "f.jsonl",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    (figures,) = map(json.loads, (tmp_path / "f.jsonl").read_text().splitlines())
    # An image of a base tile and a grid of one: 6 x 6 tokens, and 6 rows of 6 and a newline.
    assert (figures["positions"], figures["trainable"]) == (36 + 42 + 8, ["vision", "projector"])
    # Random weights know nothing of 1024 words: ln 1024 = 6.93.
    assert figures["first_loss"]["megatron"] == pytest.approx(figures["first_loss"]["transformers"], rel=1e-5)
    assert 6 < figures["first_loss"]["megatron"] < 8
    assert figures["ratio"] > 0 and all(0 < part < 1 for part in figures["gemm_part"].values())
    assert "| demo | 2 x 86 |" in result.stdout


class Side:
    """What a side's process answers: a time and its first loss."""

    def __init__(self, loss: float):
        self._loss = loss

    def send(self, num_steps: int):
        pass

    def recv(self) -> tuple[float, float]:
        return 0.1, self._loss


def test_sides_that_are_not_alike_are_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import against_huggingface

    args = argparse.Namespace(device="cpu", turns=1, steps=1, model="demo")
    with pytest.raises(SystemExit, match="error: the first losses differ by 1.0e-04"):
        against_huggingface.compare({"megatron": Side(6.0006), "transformers": Side(6.0)}, args)


@pytest.mark.parametrize(
    "name, part",
    [
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", "vision"),
        ("model.image_newline", "projector"),
        ("model.multi_modal_projector.linear_1.bias", "projector"),
        ("model.language_model.embed_tokens.weight", "embeddings"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "language"),
        ("lm_head.weight", "language"),
    ],
)
def test_parts_are_told_by_transformers_names(monkeypatch, name, part):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import against_huggingface

    assert against_huggingface.part_in_transformers(name) == part
