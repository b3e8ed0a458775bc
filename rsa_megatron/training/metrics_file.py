"""Every figure of a run in a file: a JSON object an iteration, under TensorBoard's names. Figures and tests read that, not the log.

    {"iteration": 20, "lm loss": 3.1, "rsa loss": 0.4, "learning-rate": 2e-06, "grad-norm": 1.3, ...}
    {"iteration": 20, "lm loss validation": 3.2, "mutual-knn validation": 0.15, ...}

Megatron writes figures where it asks for TensorBoard's writer, on the last rank; there stands a `MetricsFile`, in front of that
writer if there is one. A resumed run adds to the file; of an iteration that was run twice the later line counts.
"""

import functools
import json
import math
import os
from pathlib import Path

from megatron.training import training
from megatron.training.utils import is_last_rank


def add_arguments(group) -> None:
    group.add_argument(
        "--metrics-file", help="file for the figures of every iteration, JSON lines; default: metrics.jsonl in --save"
    )


class MetricsFile:
    """Writes figures to `path`, and on to TensorBoard's writer where there is one."""

    def __init__(self, path: Path):
        self._path = path
        self._line: dict[str, float | None] = {}
        self._iteration: int | None = None
        self._has_written = False
        self._find_tensorboard = training.get_tensorboard_writer
        self._to_tensorboard = True

    def apply(self) -> None:
        """Before pretrain(): training.py calls these by their names."""
        training.get_tensorboard_writer = lambda: self if is_last_rank() else self._find_tensorboard()
        training.training_log = self._with_line(training.training_log)
        evaluate = self._with_line(training.evaluate_and_print_results)

        @functools.wraps(evaluate)
        def evaluate_and_write(*args, write_to_tensorboard: bool = True, **kwargs):
            # With --skip-train Megatron keeps TensorBoard out; the file has those figures too.
            self._to_tensorboard = write_to_tensorboard
            try:
                return evaluate(*args, write_to_tensorboard=True, **kwargs)
            finally:
                self._to_tensorboard = True

        training.evaluate_and_print_results = evaluate_and_write

    def add_scalar(self, name: str, value, iteration: int) -> None:
        """As torch.utils.tensorboard.SummaryWriter has it."""
        if self._to_tensorboard and self._find_tensorboard():
            self._find_tensorboard().add_scalar(name, value, iteration)
        if name.endswith(" vs samples"):  # the same figures, against the number of samples instead of the iteration
            return
        value = float(value)
        self._iteration = iteration
        self._line[name] = value if math.isfinite(value) else None

    def __getattr__(self, name: str):
        """What else training.py asks of the writer (flush, ...)."""
        if "_find_tensorboard" not in self.__dict__:  # copy and pickle ask before there are attributes
            raise AttributeError(name)
        return getattr(self._find_tensorboard(), name) if self._find_tensorboard() else lambda *args, **kwargs: None

    def _with_line(self, function):
        @functools.wraps(function)
        def with_line(*args, **kwargs):
            result = function(*args, **kwargs)
            if self._line:
                self._write()
            return result

        return with_line

    def _write(self) -> None:
        line = json.dumps({"iteration": self._iteration, **self._line}) + "\n"
        self._line = {}
        if not self._has_written:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _drop_half_line(self._path)
            self._has_written = True
        with self._path.open("ab") as file:
            file.write(line.encode())


def write_metrics(args) -> None:
    """Before pretrain(): write the run's figures to --metrics-file, or to metrics.jsonl beside the checkpoints of --save."""
    if args.metrics_file:
        path = Path(args.metrics_file)
    elif args.save and not args.skip_train:
        path = Path(args.save, "metrics.jsonl")
    else:
        return
    MetricsFile(path).apply()


def _drop_half_line(path: Path) -> None:
    """Cut off what a killed run has left of a line."""
    content = path.read_bytes() if path.is_file() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
