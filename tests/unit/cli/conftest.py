"""Files of results for the scripts that draw them."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def write_lines(tmp_path):
    """A function that writes lines, objects or text as it is, and gives the file's path."""

    def write(lines: list, name="lines.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return path

    return write
