"""Prints the figures of training jobs while they run, from what they add to their metrics.jsonl."""

import json
from collections.abc import Callable

from rsa_megatron.job_queue import Queue

EVERY = 10
#: What is printed of a line, by its name in the file.
FIGURES = {
    "lm loss": "lm loss {:.6f}",
    "scene loss": "scene loss {:.4f}",
    "rsa loss": "rsa loss {:.4f}",
    "lm loss validation": "validation lm loss {:.6f}",
    "mutual-knn validation": "mutual-knn {:.4f}",
}


class Follower:
    """Reads the lines that running jobs have added since the last reading."""

    def __init__(self, queue: Queue, say: Callable[[str], None]):
        self._queue = queue
        self._say = say
        self._positions: dict[str, int] = {}

    def start(self, name: str) -> None:
        """Begin at the end of what an earlier start of the job has written; half a line of it does not count."""
        file = self._queue.metrics(name)
        content = file.read_bytes() if file.is_file() else b""
        self._positions[name] = content.rfind(b"\n") + 1

    def read(self) -> None:
        """Print every tenth iteration, the first and all evaluations, of the whole lines that are new."""
        for name, position in self._positions.items():
            file = self._queue.metrics(name)
            if not file.is_file() or file.stat().st_size == position:
                continue
            with file.open("rb") as opened:
                opened.seek(position)
                new = opened.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._positions[name] += len(whole)
            for text in whole.splitlines():
                described = describe(json.loads(text))
                if described:
                    self._say(described)


def describe(line: dict) -> str | None:
    """Return the line's figures in words, or None if it is not to be printed."""
    is_evaluation = any(name.endswith(" validation") for name in line)
    if not is_evaluation and line["iteration"] != 1 and line["iteration"] % EVERY:
        return None
    figures = [form.format(line[name]) for name, form in FIGURES.items() if line.get(name) is not None]
    return " | ".join([f"    iteration {line['iteration']:>4}", *figures]) if figures else None
