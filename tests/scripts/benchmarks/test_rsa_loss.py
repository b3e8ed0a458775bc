"""The benchmark runs, at a size at which its figures mean nothing but its error does."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.support.environment import BENCHMARKS, PYTHON

pytestmark = pytest.mark.usefixtures("preloaded_benchmarks")

SCRIPT = BENCHMARKS / "rsa_loss.py"


def test_it_measures_prints_and_appends(tmp_path):
    command = [sys.executable, SCRIPT, "--threads", "1", "--sizes", "48", "--widths", "24:48", "--seconds", "0.001"]
    # (Compiling takes half a minute.)
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}
    result = subprocess.run(
        [*command, "--append", tmp_path / "f.jsonl"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert [(row["N"], row["inputs"]) for row in rows] == [(48, "float32"), (48, "bfloat16")]
    for figures in rows:
        assert set(figures["seconds"]) == {"ours", "cdist", "products", "compiled"}
        assert figures["gemm_part"] > 0
        assert figures["ratio"]["cdist"] == figures["seconds"]["cdist"] / figures["seconds"]["ours"]
        # float32; and bf16 gradients, which have 8 bits
        assert 0 < figures["error"] < (1e-5 if figures["inputs"] == "float32" else 4e-3)
    assert "| 48 |" in result.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with torch on Linux only")
def test_fused_blocks_take_their_turns_where_they_can_be_had(tmp_path):
    command = [PYTHON, SCRIPT, "--threads", "1", "--sizes", "48", "--widths", "24:48", "--seconds", "0.001"]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [*command, "--append", tmp_path / "f.jsonl"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "f.jsonl").read_text().splitlines()[0])
    errors = figures["errors"]
    assert (
        list(errors)
        == list(figures["gemm_parts"])
        == ["ours", "fused ieee", "fused tf32x3", "fused tf32", "fused bf16"]
    )
    # float32; TF32 has 11 bits, bf16 8, and a row and w are rounded
    assert errors["ours"] == figures["error"] and max(errors["fused ieee"], errors["fused tf32x3"]) < 1e-5
    assert 1e-4 < errors["fused tf32"] < 4 * 2**-11 and 1e-3 < errors["fused bf16"] < 4 * 2**-8
    assert "| 48 | 24 48 | float32 | fused bf16 |" in result.stdout


def test_memory_is_taken_in_a_process_of_its_own():
    command = [sys.executable, SCRIPT, "--threads", "1", "--alone", "ours", "2048", "1152:1536", "float32"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    rows = 2048 * (1152 + 1536) * 4  # bytes
    # Centred rows, what adds up the gradients, the gradients: three times the rows; and some blocks.
    assert 2 * rows < figures["bytes"] < 5 * rows and figures["seconds"] > 0
