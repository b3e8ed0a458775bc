"""What a person sees of a training run under torchrun: few lines before the first iteration, one line at the end of a run that failed."""

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.support.environment import ROOT

FLAGS = (
    "--model demo --stage 1 --eval-iters 0 --log-interval 1 --micro-batch-size 4 --global-batch-size 8 --num-workers 0"
)


@pytest.fixture
def start(demo):
    """Starts the script; it leads a process group, as a job of a shell does."""

    def start(num_ranks: int, flags: str) -> subprocess.Popen:
        data = f"--data-path {demo}/data/captions --tokenizer-model {demo}/tokenizer"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        command = [*torchrun, "examples/pretrain_llava_rsa.py", *f"{FLAGS} {data} {flags}".split()]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start


def test_a_run_shows_what_runs_and_each_iteration_and_ctrl_c_ends_it_with_a_checkpoint(
    start, tmp_path, preloaded_commands
):
    save = tmp_path / "run"
    run = start(2, f"--train-iters 500 --save {save} --load {save}")
    shown = []
    for line in run.stdout:
        shown.append(line)
        if re.search(r"iteration +2/", line):
            os.killpg(run.pid, signal.SIGINT)
            break
    shown += list(run.stdout)
    assert run.wait(60) != 0
    first = next(index for index, line in enumerate(shown) if re.search(r"iteration +1/", line))
    assert first <= 40 and any(line.startswith("layout: 2 rank(s), DP 2") for line in shown[:first]), "".join(shown)
    assert f"log: {save}/logs/rank-0.log" in "".join(shown[:first])
    said = "".join(shown)
    assert "SIGINT: the run ends after this iteration, with a checkpoint in " in said
    stopped_at = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert f"checkpoint of iteration {stopped_at} in {save}\n" in said and stopped_at < 500
    assert "stopped by SIGINT; the same command goes on\n" in said and "KeyboardInterrupt" not in said
    # What is not shown is in the log.
    log = (save / "logs" / "rank-0.log").read_text()
    assert "tensor_model_parallel_size ...." in log and "tensor_model_parallel_size ...." not in said


def test_an_error_is_the_last_line_once_and_no_log_is_left(start, tmp_path, monkeypatch):
    """Under torchrun itself: the line waits for the end of its report."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    run = start(2, "--train-iters 3 --no-such-flag")
    shown, _ = run.communicate(timeout=120)
    assert run.returncode == 1 and shown.count("error: ") == 1
    assert shown.splitlines()[-1] == "error: unrecognized arguments: --no-such-flag"
    assert not list(tmp_path.glob("rsa-megatron-*"))


def test_a_traceback_is_in_the_log_and_its_last_line_on_the_screen(start, tmp_path, preloaded_commands):
    save = tmp_path / "run"
    run = start(2, f"--train-iters 1 --save {save} --metrics-file {tmp_path}")  # a folder: no line can be written there
    shown, _ = run.communicate(timeout=60)
    (line,) = re.findall(r"^error: .*", shown, re.MULTILINE)
    assert (
        run.returncode == 1
        and line.startswith("error: IsADirectoryError: ")
        and "Traceback" not in shown.split("error: ")[0]
    )
    (log,) = re.findall(r"the traceback is in (\S+)", line)
    assert re.search(r"Traceback .*\nIsADirectoryError: ", open(log).read().replace("[rank1]: ", ""), re.DOTALL)
