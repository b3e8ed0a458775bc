"""`make reproduce` scaled down, interrupted and resumed; and that the training script takes the flags of every arm."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import reproduce
import reproduction_plan
from reproduction_plan import ABLATIONS, DEFAULT, MAIN, plan

from rsa_megatron.plots.alignment_records import read_runs
from tests.support import processes
from tests.support.reproduction_plans import PLACE, flag

pytestmark = pytest.mark.usefixtures("preloaded_commands")


@pytest.mark.parametrize("arm", MAIN | ABLATIONS)
def test_the_training_script_takes_the_flags_of_every_arm(demo, arm):
    (run,) = (job for job in plan(PLACE, DEFAULT, [1], "ablations") if getattr(job, "arm", None) == arm)
    command = list(run.command[run.command.index(str(reproduction_plan.EXAMPLES / "pretrain_llava_rsa.py")) :])
    for name, value in (("--data-path", demo / "data" / "captions"), ("--tokenizer-model", demo / "tokenizer")):
        command[command.index(name) + 1] = str(value)
    for name in ("--save", "--load", "--pretrained-checkpoint"):  # there are none
        del command[command.index(name) : command.index(name) + 2]
    ((settings, weight),) = processes.run(parsed, 1, command)
    assert settings == (int(flag(run, "--train-iters")), "1", reproduction_plan.BATCH) and (weight == 0) == (
        "without" in arm
    )


def parsed(command):
    import pretrain_llava_rsa

    from rsa_megatron.plugin import RSAPlugin

    sys.argv, rsa = command, RSAPlugin()
    args = pretrain_llava_rsa.parse(rsa)
    return (args.train_iters, args.stage, args.micro_batch_size), rsa.config.weight


def test_all_of_it_interrupted_and_taken_up(tmp_path, monkeypatch, capsys):
    """The arm with RSA alone, two iterations a stage. First for some seconds, then to the end."""
    monkeypatch.setattr(reproduction_plan, "MAIN", {"with RSA": ()})
    command = [
        "--out",
        str(tmp_path / "out"),
        "--results",
        str(tmp_path),
        "--only",
        "main",
        "--seeds",
        "1",
        "--samples",
        "32",
        "--scenes",
        "120",
        "--iterations",
        "parts=2,1=2,1.5=2,2=2",
    ]
    # The first limit may fall between two jobs, where there is none to end; then the next job is under way at the second.
    for seconds in ("6", "1.5", "1.5", "1.5"):
        with pytest.raises(SystemExit) as end:
            reproduce.main([*command, "--time-limit", seconds])
        assert end.value.code == 1
        if "ended " in (output := capsys.readouterr().out):
            break
    assert "ended " in output, output
    deadline = time.monotonic() + 5  # a process that was killed may take a moment to be gone
    while processes_of(tmp_path / "out") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(tmp_path / "out")
    done = {path.parent: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")}
    reproduce.main(command)
    assert all((folder / "done.json").stat().st_mtime_ns == time for folder, time in done.items())
    runs = {(run.arm, run.stage): run for run in read_runs([tmp_path / "reproduce.jsonl"])}
    assert set(runs) == {("with RSA", "1"), ("with RSA", "1.5"), ("with RSA", "2"), ("with RSA, no stage 1.5", "2")}
    for (_, stage), run in runs.items():
        assert (
            run.figures["mutual-knn"][-1][0] == 2
            and run.num_samples == 32
            and run.chance == pytest.approx(10 / 31, abs=1e-4)
        )
        assert bool(run.figures.get("rsa loss")) == (stage != "2") and ("accuracy on questions" in run.figures) == (
            stage == "2"
        )
    output = capsys.readouterr().out
    assert "about 0 min left" in output and "| with RSA | " in output
    # Of the checkpoints only those that another run begins from are kept.
    kept = {path.parent.relative_to(tmp_path / "out" / "runs").as_posix() for path in tmp_path.rglob("iter_*")}
    assert {"seed-1/parts", "seed-1/with-rsa/stage-1"} <= kept and not any(name.endswith("before") for name in kept)
    logs = sorted(tmp_path.rglob("run.log"))
    sizes = [log.stat().st_size for log in logs]
    reproduce.main(command)  # nothing is left to do
    assert [log.stat().st_size for log in logs] == sizes and "started" not in capsys.readouterr().out


def processes_of(folder: Path) -> str:
    return subprocess.run(["pgrep", "--full", "--list-full", str(folder)], capture_output=True, text=True).stdout
