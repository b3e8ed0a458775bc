"""The folder says what a file may import: imports run one way."""

import ast
from pathlib import Path

import pytest

from tests.support.environment import ROOT

OURS = "rsa_megatron"

# What each place may not import; more and more is allowed from top to bottom.
FORBIDDEN = {
    "rsa_megatron/config.py": ["torch", "megatron", "transformers", "PIL", OURS],
    "rsa_megatron/batch.py": ["megatron", "transformers", "PIL", OURS],
    "rsa_megatron/anyres.py": ["torch", "megatron", "transformers", "PIL", OURS],
    "rsa_megatron/huggingface_files.py": ["megatron", f"{OURS}.plugin", f"{OURS}.alignment", f"{OURS}.huggingface"],
    "rsa_megatron/huggingface.py": ["megatron", f"{OURS}.plugin", f"{OURS}.alignment"],
    "rsa_megatron/alignment": ["megatron", "transformers", "PIL", f"{OURS}.data", f"{OURS}.llava", f"{OURS}.plugin",
                               f"{OURS}.batch", f"{OURS}.config", f"{OURS}.measurement"],
    "rsa_megatron/data": ["megatron.core", "megatron.training", f"{OURS}.llava", f"{OURS}.alignment", f"{OURS}.plugin",
                          f"{OURS}.measurement"],
    "rsa_megatron/llava": ["megatron.training", "megatron.energon", "transformers", f"{OURS}.data", f"{OURS}.plugin",
                           f"{OURS}.measurement"],
    "rsa_megatron/measurement": ["megatron.core", "megatron.training", f"{OURS}.llava", f"{OURS}.plugin"],
    "rsa_megatron": ["megatron.training", "examples", "recipes", "checkpoint_conversion"],
    "checkpoint_conversion": ["megatron.training", "recipes", f"{OURS}.plugin", f"{OURS}.alignment"],
    "examples": ["checkpoint_conversion"],
}  # fmt: skip


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it goes"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("place", FORBIDDEN)
def test_a_folder_imports_only_what_it_may(place):
    path = ROOT / place
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            for forbidden in FORBIDDEN[place]:
                assert not (name + ".").startswith(forbidden + "."), f"{file} imports {name}"


def test_no_file_is_named_for_nothing():
    names = {path.stem for folder in ("rsa_megatron", "examples", "checkpoint_conversion", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    assert not names & {"utils", "util", "common", "helpers", "misc", "base"}
