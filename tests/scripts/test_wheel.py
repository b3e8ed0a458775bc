"""What pip installs: a wheel, unpacked in an empty folder, far from the checkout, gives every command a user types."""

import os
import subprocess
import sys

import pytest

import rsa_megatron
from rsa_megatron.cli import COMMANDS
from tests.support.environment import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed the package from a wheel, to be put before the checkout's."""
    folder = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run([*install, "--target", folder, ROOT], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def run(site, tmp_path_factory):
    """Runs `python WORDS` on the wheel's files, in an empty folder."""
    folder = tmp_path_factory.mktemp("empty")

    def run(*words):
        environment = os.environ | {"PYTHONPATH": str(site)}
        return subprocess.run(
            [sys.executable, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True
        )

    run.folder = folder
    return run


def test_the_command_lists_what_it_has_and_refuses_the_rest(run, site):
    helped = run(site / "bin" / "rsa-megatron")
    assert helped.returncode == 0 and all(f"rsa-megatron {name}" in helped.stdout for name in COMMANDS)
    assert run("-m", "rsa_megatron", "--version").stdout == f"rsa-megatron {rsa_megatron.__version__}\n"
    refused = run("-m", "rsa_megatron", "measur")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "measur is not a command" in refused.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_comes_with_the_wheel(name, run, site):
    where = "import rsa_megatron, checkpoint_conversion; print(rsa_megatron.__file__, checkpoint_conversion.__file__)"
    assert run("-c", where).stdout.count(str(site)) == 2  # not the checkout's
    result = run("-m", "rsa_megatron", name, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: rsa-megatron {name}")


def test_examples_are_copied_whole_or_not_at_all(run):
    result = run("-m", "rsa_megatron", "examples", "--out", "mine")
    assert result.returncode == 0, result.stderr
    there = {str(path.relative_to(run.folder / "mine")) for path in (run.folder / "mine").rglob("*") if path.is_file()}
    assert there >= {
        "pretrain_llava_rsa.py",
        "run_stages.sh",
        "mixtures/stage1.yaml",
        "slurm/multi_node.sbatch",
        "slurm/one_node.sh",
        "existing_jobs/megatron_lm.py",
        "demo/prepare_data.py",
    }
    assert os.access(run.folder / "mine" / "run_stages.sh", os.X_OK)
    again = run("-m", "rsa_megatron", "examples", "--out", "mine")
    assert (again.returncode, again.stderr) == (2, "error: --out mine exists: name another folder\n")


def test_the_wheel_trains(run, demo):
    """rsa_megatron.training is the example script, from the wheel."""
    flags = [
        "--model",
        "demo",
        "--stage",
        "1",
        "--data-path",
        demo / "data" / "captions",
        "--tokenizer-model",
        demo / "tokenizer",
    ]
    result = run("-m", "rsa_megatron.training", *flags, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "model demo, stage 1: fp32" in result.stdout
