"""The set-up: its search for a Python 3.12, on machines made up of folders, and what it does to an environment that is there."""

import shutil
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


FAILS = "echo Error: no room >&2; exit 1"
MAKES = 'mkdir -p "$3/bin"; cp "$0" "$3/bin/python"'


@pytest.fixture
def set_up(tmp_path):
    """Runs the set-up in an empty checkout, with a python that does `venv` for `-m venv`, and notes pip's calls in `pip`."""
    shutil.copytree(SCRIPT.parent, tmp_path / ".ci")
    (tmp_path / "pyproject.toml").write_text("one")
    python = tmp_path / "python"

    def run(venv: str = MAKES):
        python.write_text(f"""#!/bin/sh
case "$1 $2" in "-m venv") {venv} ;; "-m pip") echo "$0" >> pip ;; -c*) exec {sys.executable} "$@" ;; esac
""")
        python.chmod(0o755)
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
        return subprocess.run(
            ["/bin/sh", ".ci/set-up", ".venv"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return run


def test_the_set_up_compares_contents_not_times(set_up, tmp_path):
    for content, calls in (("one", 1), ("one", 1), ("two", 2)):
        (tmp_path / "pyproject.toml").write_text(content)  # younger each time
        assert set_up().returncode == 0
        assert len((tmp_path / "pip").read_text().splitlines()) == calls


def test_the_set_up_leaves_an_environment_that_it_has_not_made(set_up, tmp_path):
    assert set_up().returncode == 0
    (tmp_path / ".venv").rename(tmp_path / "elsewhere")
    (tmp_path / ".venv").symlink_to("elsewhere")
    (tmp_path / "pyproject.toml").write_text("two")
    linked = set_up(FAILS)
    assert linked.returncode == 0 and "is a link and is used as it is" in linked.stdout
    assert (tmp_path / ".venv").is_symlink() and len((tmp_path / "pip").read_text().splitlines()) == 1
    (tmp_path / ".venv").unlink()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "mine").touch()
    result = set_up()
    assert result.returncode == 1 and ".venv is no environment of Python 3.12: move it away" in result.stderr
    assert (tmp_path / ".venv" / "mine").exists()


def test_the_set_up_says_why_it_cannot_make_an_environment(set_up, tmp_path):
    result = set_up(FAILS)
    assert result.returncode == 1 and result.stderr.endswith("-m venv .venv: Error: no room\n")
    assert not (tmp_path / ".venv").exists()
    assert "apt install python3.12-venv" in set_up("echo ensurepip is not available; exit 1").stderr
