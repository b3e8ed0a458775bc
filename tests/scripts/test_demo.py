"""`make demo` on next to nothing: it prints what happens, does nothing twice, and names what fails."""

import importlib
import json
import re
import shlex

import pytest
from PIL import Image

from rsa_megatron import cli

pytestmark = pytest.mark.usefixtures("preloaded_commands")

demo_script = importlib.import_module("demo")
SMALL = "--train-iters 2 --eval-iters 1 --mutual-knn-samples 32 --num-workers 0 --shuffle-buffer-size 1".split()


def test_all_of_it_on_next_to_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    small = "--processes 1 --scenes 64 64 --backbone-iterations 1".split()
    command = ["--out", str(out), *small, "--", *SMALL]
    demo_script.main(command)
    first = capsys.readouterr().out
    steps = [line for line in first.splitlines() if line.startswith("[")]
    assert [step[:3] for step in steps] == [f"[{number}]" for number in range(1, 9)]
    assert steps[3].endswith(" ".join(SMALL)) and steps[4].endswith(" ".join(SMALL) + " --rsa-weight 0")
    figures = [json.loads(line) for line in (out / "stage1" / "metrics.jsonl").read_text().splitlines()]
    # The figures of the run open with those of the evaluation before it.
    before = json.loads((out / "before" / "metrics.jsonl").read_text().splitlines()[-1])
    assert figures[0] == before and before["iteration"] == 0
    trained, measured = figures[1], figures[-1]
    assert f"    iteration    1 | lm loss {trained['lm loss']:.6f} | rsa loss {trained['rsa loss']:.4f}\n" in first
    assert f"| mutual-knn {before['mutual-knn validation']:.4f}\n" in first
    assert f"iteration    2 | validation lm loss {measured['lm loss validation']:.6f} | mutual-knn" in first
    assert "true caption: " in first and "transformers: " in first and "iterations 0 and 2" in first
    assert Image.open(out / "curves.png").width > 1000
    # It ends with what it showed, and with commands that can be typed.
    showed, following = first.split("What it showed")[1].split("Next:\n")
    without = json.loads((out / "without-rsa" / "metrics.jsonl").read_text().splitlines()[-1])
    scores = (before, measured, without)
    row = " +".join(f"{line['mutual-knn validation']:.3f}" for line in scores)
    assert re.search(rf"mutual-kNN \(chance 0\.\d+\) +{row}\n", showed)
    row = " +".join(f"{line['lm loss validation']:.3f}" for line in scores)
    assert re.search(rf"LM loss, nats per token +{row}\n", showed)
    measure = shlex.split(re.search(r"rsa-megatron (measure .*)", following)[1])
    assert cli.main([*measure, "--num-samples", "16", "--k", "3"]) == 0 and (out / "layers.jsonl").is_file()
    # Again: the results are shown, and nothing runs.
    capsys.readouterr()
    logs = {log: log.stat().st_size for log in out.rglob("run.log")}
    demo_script.main(command)
    again = capsys.readouterr().out
    assert [line[:3] for line in again.splitlines() if line.startswith("[")] == ["[6]", "[7]", "[8]"]
    assert first.endswith(again) and {log: log.stat().st_size for log in logs} == logs
    # Other settings in its place are refused.
    with pytest.raises(SystemExit, match=f"error: {out}/parts holds a run of other settings: name another --out"):
        demo_script.main(["--seed", "2", *command])


def test_a_step_that_fails_is_named_with_its_log(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        demo_script.main(["--out", str(tmp_path), "--processes", "1", "--scenes", "0", "0"])
    said = capsys.readouterr()
    assert end.value.code == 1 and "[2]" not in said.out
    assert f"error: prepare/captions failed; see {tmp_path}/prepare/captions/run.log" in said.err
