"""Every command ends in the same way: one `error: ...` line and status 2, 130 at Ctrl-C, 141 without a reader."""

import json
import os
import re
import resource
import shutil
import signal
import threading

import numpy
import pytest

from rsa_megatron.cli import main
from tests.support.plot_lines import GOOD, VERBS

pytestmark = pytest.mark.slow

COMMANDS = (
    *("data pack", "data link", "data show", "plan", "measure", *(f"plot {verb}" for verb in VERBS)),
    *("realign fit", "realign transform", "realign report"),
    *("convert hf-to-megatron", "convert megatron-to-hf", "convert verify", "examples"),
)
# A flag of each with a letter missing.
MISSPELT = {"plan": "--stge", "convert verify": "--toleranc"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of files that are not what they should be, and a few that are."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("empty", "empty.json", "empty.npy"):
        (folder / name).touch()
    (folder / "broken.json").write_text('{"a": ')
    for name in ("bytes.json", "bytes.npy"):
        (folder / name).write_bytes(b"\xff\xfe\x00text")
    (folder / "folder").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").touch()
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    checkpoint = folder / "checkpoint"
    (checkpoint / "iter_0000010").mkdir(parents=True)
    (checkpoint / "iter_0000010" / ".metadata").touch()
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("10")
    (checkpoint / "hf").mkdir()
    (checkpoint / "hf" / "config.json").write_text("{}")
    (folder / "lines.jsonl").write_text(json.dumps(GOOD) + "\n")
    rows_ND = numpy.random.default_rng(0).standard_normal((40, 8), dtype="float32")
    numpy.save(folder / "images.npy", rows_ND)
    numpy.save(folder / "texts.npy", rows_ND - 1)
    (folder / "d.json").write_text(json.dumps([{"id": n, "image": "0.png", "caption": "A boat."} for n in range(4)]))
    return folder


@pytest.fixture
def run(files, tmp_path, capsys, monkeypatch):
    """Runs a command in a copy of the folder; gives its status and its lines of errors."""
    shutil.copytree(files, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(command: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        try:
            status = main(command.split())
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_missing_or_misspelt_on_the_command_line_is_one_line(run, command):
    status, (line,) = run(command)
    assert status == 2
    assert re.fullmatch(rf"error: the following arguments are required: .*; see rsa-megatron {command} --help", line)
    flag = MISSPELT.get(command, "--ot")
    meant = {"--stge": "--stage", "--toleranc": "--tolerance", "--ot": "--out"}[flag]
    assert run(f"{command} {flag} x") == (2, [f"error: unrecognized arguments: {flag}; did you mean {meant}?"])
    status, (line,) = run(f"{command} --quite-another-thing")
    assert (status, line) == (
        2,
        f"error: unrecognized arguments: --quite-another-thing; see rsa-megatron {command} --help",
    )
    group, _, name = command.partition(" ")
    if name:
        status, (line,) = run(group)
        assert status == 2 and line.startswith("error: name one of ") and name in line
        assert run(f"{group} --quite-another-thing")[1] == [line.replace(";", ", before its flags;")]


def test_an_unknown_command_is_named_with_the_likely_one(run):
    assert run("mesure")[1][0].endswith("; did you mean measure?") and run("--bogus")[0] == 2


SHOW, ROWS = "--tokenizer folder", "--images images.npy --texts texts.npy"
FAULTS = {
    # a file or folder that is missing, empty, not readable, or the one where the other is expected
    **{f"data {how} none --out o": "none does not exist; name JSON" for how in ("pack", "link")},
    "data pack empty --out o": "empty is empty",
    "data pack empty.json --out o": "empty.json: no sample found",
    "data pack broken.json --out o": "broken.json is broken JSON",
    "data pack folder --out o": "folder: no sample found: it needs images",
    "data pack d.json --images empty --out o": "--images empty is not a folder",
    "data pack d.json --tokenizer none --out o": "--tokenizer none is not a folder",
    "data show none --tokenizer none": "--tokenizer none is not a folder",
    "data show none --tokenizer folder --out folder": "--out folder is not the name of a picture",
    "plan --model none --stage 1 --gpus 8": "--model none: neither a folder with a config.json nor one of demo",
    **{f"plot {verb} none --out o": "none: no such file or directory" for verb in VERBS},
    **{f"plot {verb} empty --out o": "empty is empty" for verb in VERBS},
    **{f"plot {verb} folder --out o": "folder: is a directory" for verb in VERBS},
    **{f"plot {verb} broken.json --out o": "broken.json, line 1: broken JSON" for verb in VERBS},
    **{f"plot {verb} bytes.json --out o": "bytes.json is not a text file" for verb in VERBS},
    "measure --features none none --out o": "none holds no features",
    "measure --random --out bytes.json": "bytes.json is not a text file",
    "measure --random --out broken.json": "broken.json, line 1: broken JSON",
    "measure --checkpoint none --data d.json --out o": "--checkpoint none is not a folder",
    "realign fit --images none --texts none --out o": "none not found",
    "realign fit --images folder --texts folder --out o": "folder holds no features",
    "realign fit --images empty.npy --texts empty.npy --out o": "empty.npy cannot be read as a numpy array",
    "realign fit --images bytes.npy --texts bytes.npy --out o": "bytes.npy cannot be read as a numpy array",
    "realign report --images none --texts none --out o": "none not found",
    "realign transform --operator none --texts texts.npy --out o.npy": "none/manifest.json cannot be read (not found)",
    "realign transform --operator empty --texts texts.npy --out o.npy": "empty/manifest.json cannot be read (not found)",
    **{f"convert hf-to-megatron --hf {name} --out o": f"{name}/config.json is missing" for name in ("none", "empty")},
    **{f"convert megatron-to-hf --checkpoint {name} --out o": f"{name}: not a Meg" for name in ("none", "empty")},
    "convert verify --hf none --checkpoint none": "none: not a Megatron checkpoint",
    # an output that exists, or cannot be there
    "data pack d.json --images . --out full": "--out full already exists and was not written by this command",
    "data pack d.json --images . --out empty/o": "the folder empty/o.unfinished cannot be made: empty is a file",
    "measure --random --out folder": "--out folder is a folder; name a file",
    "measure --random --num-samples 20 --out empty/o": "the folder empty cannot be made: empty is a file",
    "plot heatmap lines.jsonl --out empty/o": "the folder empty cannot be made: empty is a file",
    f"realign fit {ROWS} --out full": "full already exists: name another --out",
    f"realign fit {ROWS} --out empty/o": "the folder empty/o.unfinished cannot be made: empty is a file",
    "examples --out full": "--out full exists: name another folder",
    "examples --out empty/o": "the folder empty/o.unfinished cannot be made: empty is a file",
    # a model of the other kind
    "measure --model checkpoint --data d.json --out o": "checkpoint is a Megatron checkpoint, not a Hugging Face folder; "
    "--checkpoint checkpoint measures it, or rsa-megatron convert megatron-to-hf --checkpoint checkpoint",
    "measure --vision hf --language checkpoint/iter_0000010 --data d.json --out o": "--checkpoint checkpoint measures it",
    "measure --checkpoint hf --data d.json --out o": "--checkpoint hf is a Hugging Face folder, not a Megatron checkpoint; "
    "--model hf measures it",
    "measure --checkpoint checkpoint/hf --data d.json --out o": "the files beside a checkpoint: name checkpoint",
    "plan --model checkpoint --stage 1 --gpus 8": "its model is described by --model checkpoint/hf",
    "plan --model checkpoint/iter_0000010 --stage 1 --gpus 8": "its model is described by --model checkpoint/hf",
    "convert hf-to-megatron --hf checkpoint --out o": "checkpoint is a Megatron checkpoint, not a Hugging Face folder; "
    "rsa-megatron convert megatron-to-hf --checkpoint checkpoint --out HF makes one of it",
    "convert hf-to-megatron --vision checkpoint --language hf --out o": "checkpoint is a Megatron checkpoint, not",
    "convert megatron-to-hf --checkpoint hf --out o": "rsa-megatron convert hf-to-megatron makes one of it",
    "convert verify --hf checkpoint --checkpoint checkpoint": "checkpoint is a Megatron checkpoint, not",
    "convert verify --hf hf --checkpoint hf": "--checkpoint hf is a Hugging Face folder, not a Megatron checkpoint",
}


@pytest.mark.parametrize("command", FAULTS)
def test_a_fault_is_one_line_with_status_2_and_leaves_nothing(run, command):
    before = sorted(os.listdir())
    status, lines = run(command)
    assert (status, len(lines)) == (2, 1), lines
    assert lines[0].startswith("error: ") and FAULTS[command] in lines[0] and "Errno" not in lines[0]
    assert [name for name in sorted(os.listdir()) if name not in before] == []


FULL = {
    "data link d.json --images . --out o": "o.unfinished: file too large; make room, and the same command resumes",
    "measure --random --num-samples 20 --out o": "o: file too large; nothing half-written is left",
    "plot heatmap lines.jsonl --out o": "o.png: file too large; nothing half-written is left",
    f"realign fit {ROWS} --out o": "o: file too large; nothing half-written is left",
    "realign transform --operator op --texts texts.npy --out o.npy": "o.npy: file too large; nothing half-written is left",
    f"realign report {ROWS} --num-pairs 30 --fit-fraction 0.4 --out o": "o.png: file too large",
    "examples --out o": "o: file too large; nothing half-written is left",
}


@pytest.mark.parametrize("command", FULL)
def test_a_full_disk_is_one_line_that_names_the_place_and_leaves_nothing_under_its_name(run, command):
    """The kernel lets no file grow: the error is of the same kind as a full disk's."""
    if "--operator" in command:
        assert run(f"realign fit {ROWS} --out op") == (0, [])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, hard))
    try:
        status, lines = run(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2 and lines[-1].startswith(f"error: {FULL[command]}"), lines
    left = {name for name in os.listdir() if name.partition(".")[0] == "o"}
    assert left <= {"o.unfinished"} and ("resumes" in FULL[command] or not left)


@pytest.mark.parametrize(
    "command", ["plot heatmap pipe --out o", "measure --random --out pipe", "data pack pipe --out o"]
)
def test_ctrl_c_is_one_line_with_status_130(run, command):
    """The command waits for what a pipe will give, and is interrupted there."""
    os.mkfifo("pipe")
    written = []

    def interrupt():
        written.append(os.open("pipe", os.O_WRONLY))  # once the command has opened it
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where tests run in the background
    thread = threading.Thread(target=interrupt, daemon=True)
    try:
        thread.start()
        status, lines = run(command)
    finally:
        signal.signal(signal.SIGINT, before)
        thread.join(10)
        os.close(written[0])
    assert status == 130 and len(lines) == 1 and lines[0].startswith("interrupted")
    assert not os.path.exists("o")


@pytest.mark.parametrize("command", ["--help", "plan --help", "plan --model demo --stage 1 --gpus 8 --show-refused"])
def test_a_reader_that_has_gone_ends_a_command_quietly(run, monkeypatch, command):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        assert run(command) == (141, [])
