"""A unit test starts no process: that keeps these fast, and fit to run side by side all the time."""

import sys
from pathlib import Path

import pytest

_PROCESSES = ("subprocess.Popen", "os.posix_spawn", "os.system", "tests.processes.run")
_FOLDER = Path(__file__).parent
_is_unit_test = False


def _refuse_processes(event: str, args: tuple) -> None:
    if _is_unit_test and event in _PROCESSES:
        raise RuntimeError(f"a unit test starts a process ({event}): move it to tests/distributed or tests/scripts")


sys.addaudithook(_refuse_processes)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    global _is_unit_test
    _is_unit_test = item.path.is_relative_to(_FOLDER)  # pytest calls this for tests of other folders too
    try:
        return (yield)
    finally:
        _is_unit_test = False
