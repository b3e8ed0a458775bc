"""The set-up's search for a Python 3.12, on machines made up of folders."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.environment import ROOT

SCRIPT = ROOT / ".ci" / "find-python"


def a_python(path: Path, version: tuple[int, int]) -> Path:
    """A python of that version: a shell that evaluates the question that is asked of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{sys.executable} -c "import sys; sys.version_info = {(*version, 1)}; $2"\n')
    path.chmod(0o755)
    return path


def find(path, home, **environment):
    # The shell's own folder is not on the PATH: nothing but what a test puts there is found.
    environment = {"PATH": str(path), "HOME": str(home), **environment}
    return subprocess.run(["/bin/sh", SCRIPT], env=environment, capture_output=True, text=True)


def test_an_older_python3_is_passed_over_for_pyenvs(tmp_path):
    a_python(tmp_path / "bin" / "python3", (3, 11))
    wanted = a_python(tmp_path / ".pyenv" / "versions" / "3.12.4" / "bin" / "python", (3, 12))
    assert find(tmp_path / "bin", tmp_path).stdout.strip() == str(wanted)
    elsewhere = a_python(tmp_path / "root" / "versions" / "3.12.1" / "bin" / "python", (3, 12))
    assert find(tmp_path / "bin", tmp_path, PYENV_ROOT=str(tmp_path / "root")).stdout.strip() == str(elsewhere)


def test_the_users_choice_comes_first_then_the_path(tmp_path):
    a_python(tmp_path / "bin" / "python3.12", (3, 12))
    mine = a_python(tmp_path / "mine", (3, 12))
    assert find(tmp_path / "bin", tmp_path).stdout.strip() == "python3.12"
    assert find(tmp_path / "bin", tmp_path, PYTHON=str(mine)).stdout.strip() == str(mine)


@pytest.mark.parametrize("version", [None, (3, 11), (3, 13)])
def test_none_is_said_with_the_remedy(tmp_path, version):
    if version:
        a_python(tmp_path / "bin" / "python3", version)
    result = find(tmp_path / "bin", tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert "Python 3.12 is needed" in result.stderr and "make PYTHON=" in result.stderr
