"""The lock of --save among real processes, and ranks whose launcher is killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from rsa_megatron import folder_lock
from rsa_megatron.folder_lock import NAME, FolderLock
from tests.support import script
from tests.support.environment import PYTHON, ROOT

HOLD = """
import sys, time
from rsa_megatron.folder_lock import FolderLock
FolderLock(sys.argv[1], print).acquire()
print("held", flush=True)
time.sleep(60)
"""

RANK = """
import os, sys, time
from rsa_megatron.ranks import end_with_launcher
if sys.argv[1] == "alone":
    del os.environ["TORCHELASTIC_RUN_ID"]  # as where something else has started it
end_with_launcher()
print("rank", os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_lock_whose_process_was_killed_is_taken_over_at_once(tmp_path):
    said = []
    lock = FolderLock(tmp_path, said.append, said.append)
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {holder.pid} on "):  # control: while it lives
            lock.acquire()
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # a zombie: nobody has asked for its status yet
        begin = time.monotonic()
        lock.acquire()
        assert time.monotonic() - begin < 1
        lock.release()
    assert len(said) == 1 and f"process {holder.pid} on " in said[0] and said[0].endswith("taken over")


def test_a_run_whose_launcher_is_gone_is_waited_for(tmp_path):
    """Its ranks are about to end, as the next test shows."""
    lock = FolderLock(tmp_path, print)
    with subprocess.Popen(["sleep", "0.5"]) as holder:
        holds = folder_lock._describe_this_process() | {
            "pid": holder.pid,
            "begun": folder_lock._find_start(holder.pid),
        }
        (tmp_path / NAME).write_text(json.dumps(holds))
        with pytest.raises(ValueError, match=f"process {holder.pid}"):  # control: its launcher lives
            lock.acquire()
        (tmp_path / NAME).write_text(json.dumps(holds | {"parent begun": "1"}))
        lock.acquire()
        assert folder_lock._find_start(holder.pid) is None  # it has ended
        lock.release()


def test_ranks_end_when_their_torchrun_is_killed(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    torchrun = [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    launches = {}
    for name in ("with", "alone"):
        log = (tmp_path / name).open("w")
        command = [*torchrun, tmp_path / "rank.py", name]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        launches[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    ranks = {}
    try:
        for name, launch in launches.items():
            ranks[name] = wait_for(lambda name=name: pids(tmp_path / name, 2))
            launch.kill()
            launch.wait()
        wait_for(lambda: not any(map(is_alive, ranks["with"])))
        lines = [line for line in (tmp_path / "with").read_text().splitlines() if "error" in line]
        assert lines == [f"error: torchrun (process {launches['with'].pid}) is gone; this run ends"]
        assert all(map(is_alive, ranks["alone"]))  # control: they are what a killed torchrun leaves behind
    finally:
        for pid in sum(ranks.values(), []):
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_run_into_the_folder_of_a_living_one_is_refused_on_all_ranks(demo, tmp_path):
    flags = ("--train-iters", 1, "--save", tmp_path / "run", "--save-interval", 1)
    lock = FolderLock(tmp_path / "run", print)
    lock.acquire()
    line = script.error_line(2, demo, *flags)
    assert f"error: --save {tmp_path}/run is in use by another run, process {os.getpid()} on " in line
    assert [path.name for path in (tmp_path / "run").iterdir()] == [NAME]  # nothing was written
    assert "in use" not in script.run(1, demo, *flags, "--dry-run")[0]
    lock.release()
    script.run(2, demo, *flags)
    assert not (tmp_path / "run" / NAME).exists() and (tmp_path / "run" / "iter_0000001").is_dir()


def pids(log, count: int) -> list[int]:
    found = [int(pid) for pid in re.findall(r"rank (\d+)", log.read_text())]
    return found if len(found) == count else []


def is_alive(pid: int) -> bool:
    return folder_lock._find_start(pid) is not None


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found
