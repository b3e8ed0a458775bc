"""The benchmark runs, on a model so small that its figures mean nothing."""

import json
import subprocess
import sys

import pytest

from rsa_megatron.models.architectures import get_architecture
from tests.support.environment import BENCHMARKS

pytestmark = pytest.mark.usefixtures("preloaded_benchmarks")

SCRIPT = BENCHMARKS / "conversion.py"


def test_it_measures_prints_and_appends(tmp_path):
    command = [
        sys.executable,
        SCRIPT,
        "--model",
        "demo",
        "--runs",
        "1",
        "--folder",
        tmp_path,
        "--append",
        tmp_path / "f.jsonl",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "f.jsonl").read_text())
    assert figures["checkpoint_bytes"] == 2 * (
        sum(sum(part.values()) for part in get_architecture("demo").parameter_counts().values()) + 2 * 160
    )  # bfloat16; and the tower's last norm
    for step in ("copy", "hf-to-megatron", "megatron-to-hf"):
        assert figures["seconds"][step] > 0 and figures["peak_bytes"][step] > figures["checkpoint_bytes"]
        assert f"| {step} | " in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["f.jsonl"]  # nothing is left
