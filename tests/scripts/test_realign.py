"""realign.py over ranks, and its help."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from rsa_megatron.realign.baselines import load_operator
from rsa_megatron.realign.realign import ReAlign
from tests.support import processes
from tests.support.realign_runs import GIVEN, assert_same_operator, rows, run, write_rows


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_on_a_rank(folder, flags) -> str:
    os.chdir(folder)
    run(*flags)
    return processes.output()


def test_ranks_give_the_operator_of_one_process(tmp_path):
    write_rows()
    run("fit", *GIVEN, "--out", "one")
    outputs = processes.run(run_on_a_rank, 3, tmp_path, ["fit", *GIVEN, "--out", "three"])
    assert_same_operator(load_operator("three"), load_operator("one"))
    assert [output.count("s = ") for output in outputs] == [1, 0, 0] and "after realign" in outputs[0]
    # Negative control: a rank's rows alone give another one.
    images_ND, texts_ND = torch.from_numpy(numpy.load("images.npy")), rows(37, seed=2, shift=-1.0)
    with pytest.raises(AssertionError):
        assert_same_operator(ReAlign.fit(images_ND[:16], texts_ND), load_operator("one"))


def test_what_is_wrong_on_one_rank_ends_all_and_is_said_once(tmp_path):
    write_rows()
    numpy.save("images.npy", numpy.concatenate([numpy.ones((40, 7)), numpy.zeros((3, 7))]))  # the last rank's share
    with pytest.raises(processes.Failed) as end:
        processes.run(run_on_a_rank, 3, tmp_path, ["fit", *GIVEN, "--out", "bad"])
    assert (
        end.value.output.count("error: image embeddings: rank 2: images.npy: 3 of 15 embeddings have no direction") == 1
    )
    assert "SystemExit: 2" in str(end.value) and not Path("bad").exists()
    with pytest.raises(processes.Failed) as end:
        processes.run(run_on_a_rank, 2, tmp_path, ["fit", "--encoder", "none", "--data", "none", "--out", "bad"])
    assert end.value.output.count("error: none does not exist") == 1


def test_help_names_every_command():
    result = subprocess.run(
        [sys.executable, "-m", "rsa_megatron", "realign", "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert result.returncode == 0 and all(name in result.stdout for name in ("fit", "transform", "report"))
