"""The command that `rsa-megatron data` prints fits what was written, however little."""

import re
from pathlib import Path

import prepare_data
import pytest

from rsa_megatron.cli.data_first_run import TOKENIZER, format_first_run


def test_what_makes_the_tokenizer_is_there_until_it_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts = {"train": 8, "val": 0}
    first, *_ = format_first_run("data", counts, takes_part=True).splitlines()
    python, made_by, *flags = first.partition("#")[0].split()
    assert python == "python" and Path(made_by).is_file() and prepare_data.parse(flags).out == Path("demo")
    Path(TOKENIZER).mkdir(parents=True)
    assert format_first_run("data", counts, takes_part=True).split()[0] == "torchrun"


def flag(command: str, name: str) -> int:
    return int(re.search(rf"--{name} (\d+)", command)[1])


@pytest.mark.parametrize("num_val", [0, 1, 2, 3, 5, 15, 1000])
@pytest.mark.parametrize("num_train", [1, 2, 7, 45, 10**6])
def test_batches_and_neighbours_are_there(num_train, num_val):
    command = format_first_run("data", {"train": num_train, "val": num_val}, takes_part=num_val % 2 == 0)
    size = flag(command, "micro-batch-size")
    assert size <= num_train and flag(command, "global-batch-size") == 2 * size
    assert ("--rsa-weight 0" in command) == (num_val % 2 == 1)
    if num_val:
        assert size <= num_val and flag(command, "eval-iters") >= 1
    else:
        assert flag(command, "eval-iters") == 0
    if "--mutual-knn-k" in command:
        assert 1 <= flag(command, "mutual-knn-k") < num_val // size * size
    else:
        assert flag(command, "mutual-knn-samples") == 0 and num_val // size * size < 2
