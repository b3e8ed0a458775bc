"""The demo's data sets, small, and its tokenizer, as examples/prepare_demo.py writes them."""

import subprocess
import sys
from pathlib import Path

from tests.support.environment import EXAMPLES


def make_demo(out: Path) -> Path:
    """Write data and tokenizer into a folder."""
    command = [sys.executable, str(EXAMPLES / "prepare_demo.py"), "--out", str(out),
               "--train", "240", "--validation", "64", "--shard-size", "60"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return out
