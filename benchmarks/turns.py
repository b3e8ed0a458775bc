"""Training runs side by side that take turns: one trains for a few iterations while the others wait.

Ranks of the first pipeline stage wait for their turn; those behind them wait for what they send.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import machine
import torch

_POLL_S = 0.0005


def start(
    script: str, side: str, folder: Path, *, processes: int, iterations: int, threads: int, flags: list[str]
) -> subprocess.Popen:
    """Start a run by the ranks' own `script` with --side, --folder and --iterations, and the training script's flags."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        script,
    ]
    command += ["--side", side, "--folder", folder, "--iterations", str(iterations), "--", *flags]
    log = open(folder / f"{side}.log", "w")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def take_turn(side: str, turn: int, folder: Path, run: subprocess.Popen, *, ranks: int, name: str) -> list[dict]:
    """Let a run train for a turn; return what each of its first `ranks`, the first pipeline stage's, says of it."""
    (folder / f"{side}-go-{turn}").touch()
    done = [folder / f"{side}-done-{turn}-{rank}" for rank in range(ranks)]
    while not all(file.exists() for file in done):
        if run.poll() is not None:
            raise SystemExit(f"error: the run {name} ended early:\n{read_log(side, folder)}")
        time.sleep(_POLL_S)
    return [json.loads(file.read_text()) for file in done]


def end(side: str, turn: int, folder: Path, run: subprocess.Popen, *, name: str) -> None:
    """Let a run end after its last turn."""
    (folder / f"{side}-go-{turn}").touch()
    if run.wait():
        raise SystemExit(f"error: the run {name} failed:\n{read_log(side, folder)}")


def read_log(side: str, folder: Path) -> str:
    return (folder / f"{side}.log").read_text()[-8000:]


def train(flags: list[str], make_turns) -> None:
    """Run one rank of a run: the training script with these flags, whose forward step make_turns wraps."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    sys.argv = ["pretrain_llava_rsa.py", *flags]
    import pretrain_llava_rsa

    pretrain_llava_rsa.forward_step = make_turns(pretrain_llava_rsa.forward_step)
    pretrain_llava_rsa.main()


class Turns:
    """A forward step that stops before the first micro-batch of every turn until it may go on, and says how long the turn took."""

    def __init__(self, args, device: torch.device, forward_step):
        self._args, self._device, self._forward_step = args, device, forward_step
        self._calls, self._turn, self._begin = 0, -1, None

    def __call__(self, *args, **kwargs):
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from megatron.core.parallel_state import is_pipeline_first_stage

        if not is_pipeline_first_stage():
            return self._forward_step(*args, **kwargs)
        if self._calls % (self._args.iterations * get_num_microbatches()) == 0:
            self._change()
        self._calls += 1
        return self._forward_step(*args, **kwargs)

    def count(self) -> dict:
        """Return what else a turn that ends has counted, and begin anew."""
        return {}

    def _change(self) -> None:
        machine.synchronize(self._device)
        name = self._args.folder / self._args.side
        if self._begin is not None:
            unfinished = Path(f"{name}-unfinished-{os.environ['RANK']}")
            unfinished.write_text(json.dumps({"seconds": time.perf_counter() - self._begin, **self.count()}))
            unfinished.rename(f"{name}-done-{self._turn}-{os.environ['RANK']}")
        self._turn += 1
        while not os.path.exists(f"{name}-go-{self._turn}"):
            time.sleep(_POLL_S)
        self._begin = time.perf_counter()
