"""The tests' own interpreter for commands (support/preloaded.py) does what python does."""

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import os, signal, sys, time
print(sys.argv, os.getcwd(), os.environ["WORD"], __name__)
print("said", file=sys.stderr)
if sys.argv[1] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    open("pid", "w").write(str(os.getpid()))
    time.sleep(60)
if sys.argv[1] == "raise":
    raise ValueError("wrong")
sys.exit({"message": "a last word", "code": 3}.get(sys.argv[1]))
"""


def run(python, folder, *words):
    (folder / "script.py").write_text(SCRIPT)
    environment = os.environ | {"WORD": "here"}
    return subprocess.run([python, "script.py", *words], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("word", ["nothing", "message", "code", "raise"])
def test_output_and_exit_code_are_pythons(preloaded_python, tmp_path, word):
    actual, expected = (run(python, tmp_path, word) for python in (preloaded_python, sys.executable))
    assert (actual.returncode, actual.stdout) == (expected.returncode, expected.stdout)
    assert (
        actual.stderr.splitlines()[0] == "said" and actual.stderr.splitlines()[-1] == expected.stderr.splitlines()[-1]
    )


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 5), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_reaches_the_script(preloaded_python, tmp_path, number, code):
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen([preloaded_python, "script.py", "wait"], cwd=tmp_path, env=os.environ | {"WORD": "here"})
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (pid := (tmp_path / "pid").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(20) == code
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
