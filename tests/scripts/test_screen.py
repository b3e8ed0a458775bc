"""What a person sees of a training run under torchrun: few lines before the first iteration, one line at the end of a run that failed."""

import contextlib
import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from megatron.energon.errors import FatalSampleError
from torch._utils import ExceptionWrapper

from rsa_megatron import screen
from tests.support import processes, script
from tests.support.environment import ROOT

FLAGS = (
    "--model demo --stage 1 --eval-iters 0 --log-interval 1 --micro-batch-size 4 --global-batch-size 8 --num-workers 0"
)


@pytest.fixture
def start(demo):
    """Starts the script; it leads a process group, as a job of a shell does."""

    def start(num_ranks: int, flags: str, largest_file: int | None = None) -> subprocess.Popen:
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
            preexec_fn=largest_file
            and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))),
        )

    return start


def test_a_run_shows_what_runs_and_each_iteration_and_ctrl_c_ends_it_with_a_checkpoint(start, tmp_path):
    """Under torchrun itself: what it sends to a rank's group reaches the processes that write the checkpoint."""
    save = tmp_path / "run"
    run = start(2, f"--train-iters 500 --save {save} --load {save}")
    shown = []
    for line in run.stdout:
        shown.append(line)
        if re.search(r"iteration +2/", line):
            os.killpg(run.pid, signal.SIGINT)
            break
    reached = set()  # by a second one, while the checkpoint is written
    while ranks := children_of(run.pid):
        for helper in (child for rank in ranks for child in children_of(rank)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(helper, signal.SIGINT)
                reached.add(helper)
        time.sleep(0.1)
    assert reached
    shown += list(run.stdout)
    assert run.wait(60) != 0
    first = next(index for index, line in enumerate(shown) if re.search(r"iteration +1/", line))
    assert first <= 40 and any(line.startswith("layout: 2 rank(s), DP 2") for line in shown[:first]), "".join(shown)
    assert f"log: {save}/logs/rank-0.log" in "".join(shown[:first])
    said = "".join(shown)
    assert "SIGINT: the run ends after this iteration, with a checkpoint in " in said
    stopped_at = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert f"checkpoint of iteration {stopped_at} is in {save}\n" in said and stopped_at < 500
    assert "stopped by SIGINT; the same command resumes\n" in said and "KeyboardInterrupt" not in said
    assert not list(save.glob("run.lock"))
    # What is not shown is in the log.
    log = (save / "logs" / "rank-0.log").read_text()
    assert "tensor_model_parallel_size ...." in log and "tensor_model_parallel_size ...." not in said


def children_of(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def test_ctrl_c_while_the_last_checkpoint_is_written_waits_for_its_end():
    """After the last iteration no handler takes note; another thread than the one that saves may get the signal."""
    assert processes.run(interrupt_what_is_held, 1) == [["written", "ended"]]


def interrupt_what_is_held() -> list[str]:
    import threading

    from rsa_megatron.training.checkpoint_saving import hold_signals

    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    found = []
    try:
        with hold_signals(signal.SIGTERM):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            found.append("written")
    except KeyboardInterrupt:
        found.append("ended")
    return found


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN], ids=["", "of a script's background job"])
def test_ctrl_c_while_modules_are_imported_is_one_line(before):
    """In the midst of torch's, which takes seconds; where SIGINT was ignored, it was not heeded."""
    run = subprocess.Popen(
        [sys.executable, "-m", "rsa_megatron.training", "--help"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, before),
    )
    while "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text():
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=60)[0] == "stopped by SIGINT\n"
    assert run.returncode == -signal.SIGINT  # a shell's 130


def test_an_error_is_the_last_line_once_and_no_log_is_left(start, tmp_path, monkeypatch):
    """Under torchrun itself: the line waits for the end of its report."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    run = start(2, "--train-iters 3 --no-such-flag")
    shown, _ = run.communicate(timeout=120)
    assert run.returncode == 1 and shown.count("error: ") == 1
    assert shown.splitlines()[-1] == "error: unrecognized arguments: --no-such-flag"
    # And where torchrun's end is the end of all: in its own report.
    assert re.search(r"Root Cause .*\n(?:.*\n){0,6}  traceback : unrecognized arguments: --no-such-flag\n=+\n", shown)
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


def test_a_checkpoint_that_cannot_be_read_or_written_is_one_line(start, demo, tmp_path, preloaded_python, monkeypatch):
    save = tmp_path / "run"
    flags = f"--save {save} --load {save} --save-interval 1 --lr-decay-iters 9"
    python = sys.executable
    monkeypatch.setattr(sys, "executable", preloaded_python)
    run = start(1, f"--train-iters 2 {flags}")
    shown, _ = run.communicate(timeout=60)
    assert run.returncode == 0, shown
    # The kernel refuses to let a file grow, as it does when a disk is full.
    monkeypatch.setattr(sys, "executable", python)
    log = (save / "logs" / "rank-0.log").stat().st_size
    run = start(1, f"--train-iters 3 {flags}", largest_file=3 * log)
    shown, _ = run.communicate(timeout=60)
    (line,) = re.findall(r"^error: .*", shown, re.MULTILINE)
    assert f"--save {save}: the checkpoint of iteration 3 could not be written (" in line
    assert "); that of iteration 2 is whole; the traceback is in " in line
    monkeypatch.setattr(sys, "executable", preloaded_python)
    shutil.rmtree(save / "iter_0000003", ignore_errors=True)
    (data,) = (save / "iter_0000002").glob("__0_0.distcp")
    whole = data.read_bytes()
    data.write_bytes(bytes(len(whole)))
    run = start(1, f"--train-iters 3 {flags}")
    shown, _ = run.communicate(timeout=60)
    (line,) = re.findall(r"^error: .*", shown, re.MULTILINE)
    remedy = "; that of iteration 1 is whole: --ckpt-step 1 goes on from there"
    assert (
        f"--load {save}: its checkpoint of iteration 2 cannot be loaded (" in line and "CheckpointException" not in line
    )
    assert f"{remedy}; the traceback is in {save}/logs/rank-0.log" in line
    # A file that is missing or cut off is seen before anything is read.
    resume = ("--load", save, "--save", save, "--model", "demo", "--micro-batch-size", 4)
    faults = {
        f"__0_0.distcp has {len(whole) // 2:,} of its {len(whole):,} bytes{remedy}": lambda: data.write_bytes(
            whole[: len(whole) // 2]
        ),
        f"__0_0.distcp is missing{remedy}": data.unlink,
        f".metadata is missing{remedy}": (save / "iter_0000002" / ".metadata").unlink,  # no file of data is left
        "metadata.json is missing; there is no other that is whole: restore its files": lambda: [
            data.write_bytes(whole),
            *(file.unlink() for file in save.glob("iter_*/metadata.json")),
        ],
    }
    for expected, damage in faults.items():
        damage()
        (line,) = script.parse_errors(demo, [resume], world_size=1)
        assert line.startswith(
            f"error: --load {save}: its checkpoint of iteration 2 is damaged: iter_0000002/{expected}"
        )


def test_what_a_checkpoint_could_not_be_written_for_is_said_in_plain_words(tmp_path):
    """What each rank has of it: the first one the error itself, the others an exception of no rank."""
    full, of_another, of_another_on_a_full_disk, unknown = processes.run(explain_failed_saves, 1, str(tmp_path))[0]
    assert "(no space left on device; " in full and "(no space left on device; " in of_another_on_a_full_disk
    assert "(another rank says why; " in of_another and "(RuntimeError: it broke; " in unknown


def explain_failed_saves(folder: str) -> list[str]:
    from types import SimpleNamespace

    from torch.distributed.checkpoint import CheckpointException

    from rsa_megatron.training import checkpoint_faults

    checkpoint_faults.get_args = lambda: SimpleNamespace(save=folder)

    def explain(failures: dict) -> str:
        return checkpoint_faults.explain_save(3, CheckpointException("write", failures))

    full = explain({0: (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), None)})
    said = [full, explain({})]
    unknown = explain({1: (RuntimeError("it broke"), None)})
    checkpoint_faults._FULL = float("inf")
    return [*said, explain({}), unknown]


@pytest.mark.parametrize("is_in_worker", [True, False], ids=["data worker", "rank"])
def test_what_a_data_worker_said_is_shown_and_not_its_traceback(is_in_worker):
    def skip():
        try:
            raise KeyError("image")
        except KeyError:
            raise FatalSampleError("100 samples in a row were skipped; the last: a: b")

    def read_as_energon_does():
        try:
            skip()
        except FatalSampleError as error:
            raise FatalSampleError("Sample StoredSample(...) failed") from error

    def fail():
        raise RuntimeError("one\ntwo: three")

    for read, expected in (
        (read_as_energon_does, "100 samples in a row were skipped; the last: a: b"),
        (fail, "RuntimeError: one two: three"),
        (lambda: {}["key"], "KeyError: 'key'"),
    ):
        try:
            try:
                read()
            except Exception:
                if not is_in_worker:
                    raise
                ExceptionWrapper(where="in DataLoader worker process 0").reraise()
        except Exception as error:
            assert screen._describe(type(error), error) == expected


def test_a_tracker_that_names_no_checkpoint_is_one_line(demo, tmp_path):
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "iter_0000002" / "metadata.json").touch()
    (tmp_path / "iter_0000003").mkdir()  # killed while it was written
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for said, expected in (
        ("2x\n", "says '2x': write the iteration of the last whole checkpoint into it (there are 2)"),
        ("4", "says 4, and iter_0000004 is not there: write the iteration of another into it (there are 2)"),
    ):
        tracker.write_text(said)
        (line,) = script.parse_errors(demo, [("--load", tmp_path, "--save", tmp_path, "--save-interval", 1)])
        assert f"{tracker} {expected}" in line


def test_another_megatron_before_the_installed_one_is_named(tmp_path):
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").touch()
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 20\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-c", "import rsa_megatron.training"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.splitlines()[-1] == (
        f"error: megatron-core 0.20 is imported from {core}, and this script needs 0.19: "
        "install 'megatron-core[training]>=0.19.2,<0.20', or take another Megatron off PYTHONPATH"
    )
