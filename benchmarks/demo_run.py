"""The demo's training run, for benchmarks: its data in a folder of theirs, its command line, its environment.

Stage 1 of the demo model from random weights, without evaluation and without checkpoints: what is left is start-up and steps.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "pretrain_llava_rsa.py"


def prepare(folder: Path, num_samples: int) -> None:
    """The demo's captions and its tokenizer, as `make demo` makes them, of fewer scenes."""
    command = [
        sys.executable,
        ROOT / "examples" / "demo" / "prepare_data.py",
        "--out",
        folder,
        "--kinds",
        "captions",
        "--train",
        str(num_samples),
        "--validation",
        "1",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"the demo's data cannot be made:\n{result.stderr}")


def captions(folder: Path) -> Path:
    return folder / "data" / "captions"


def flags(folder: Path, *more: str) -> list[str]:
    """Of the script, for the data that `prepare` has put into the folder."""
    return [
        "--model",
        "demo",
        "--stage",
        "1",
        "--data-path",
        str(captions(folder)),
        "--tokenizer-model",
        str(folder / "tokenizer"),
        "--eval-iters",
        "0",
        "--mutual-knn-samples",
        "0",
        "--log-interval",
        "1",
        *more,
    ]


def environment(rank: int, world_size: int, port: int, threads: int) -> dict[str, str]:
    """What torchrun would set for a rank; torchrun itself takes seconds to start."""
    numbers = dict(
        RANK=rank,
        LOCAL_RANK=rank,
        WORLD_SIZE=world_size,
        LOCAL_WORLD_SIZE=world_size,
        MASTER_PORT=port,
        OMP_NUM_THREADS=threads,
        PYTHONUNBUFFERED=1,
    )
    return os.environ | {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "localhost"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
