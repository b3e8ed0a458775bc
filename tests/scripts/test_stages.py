"""The three stages follow each other by their checkpoints, and each goes on where it was stopped."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import script
from tests.support.environment import ROOT
from tests.support.processes import Failed

pytestmark = pytest.mark.usefixtures("preloaded_commands")

FLAGS_OF = {"1": ("--trainable", "vision", "projector"), "1.5": (), "2": ()}


def flags(stage, save, load=None, *more):
    load = ("--load", load) if load else ()
    return ("--stage", stage, *FLAGS_OF[stage], *load, "--save", save, "--save-interval", 3, "--num-workers", 1, *more)


def data(demo, stage):
    return demo / "data" / f"stage{stage.replace('.', '_')}.yaml"


LAYOUT_OF = {"1": (2, ()), "1.5": (2, ("--pipeline-model-parallel-size", 2)), "2": (1, ())}
# As run.json says it, for the export.
SHOWN = {
    "1": {"template": "plain", "image_aspect_ratio": "square"},
    "1.5": {"template": "qwen_1_5", "image_aspect_ratio": "anyres"},
    "2": {"template": "qwen_1_5", "image_aspect_ratio": "anyres"},
}
PREVIOUS = {"1": None, "1.5": "1", "2": "1.5"}


@pytest.fixture(scope="module")
def stages(demo, tmp_path_factory):
    """{stage: (folder, log)} of the three in order, each under a layout of its own: DP=2, PP=2, one process."""
    folder, done = tmp_path_factory.mktemp("stages"), {}
    for stage, (world_size, layout) in LAYOUT_OF.items():
        previous = PREVIOUS[stage] and folder / PREVIOUS[stage]
        command = flags(stage, folder / stage, previous, *layout)
        done[stage] = (folder / stage, script.run(world_size, demo, *command, data=data(demo, stage)))
    return done


@pytest.mark.parametrize("stage", FLAGS_OF)
def test_a_stage_stopped_in_the_middle_goes_on_exactly(demo, stages, tmp_path, stage):
    """The same command both times: --load names the stage before, and counts until there is a checkpoint of its own."""
    world_size, layout = LAYOUT_OF[stage]
    previous = PREVIOUS[stage] and stages[PREVIOUS[stage]][0]
    command = flags(stage, tmp_path, previous, *layout)
    stopped = script.run(world_size, demo, *command, "--exit-interval", 3, data=data(demo, stage))
    assert list(script.iterations(stopped)) == [1, 2, 3] and "finished" not in json.loads(
        (tmp_path / "run.json").read_text()
    )
    if stage == "1":
        command = (*command, "--load", tmp_path)  # where there is no stage before, that is Megatron's way to go on
    resumed = script.losses(script.run(world_size, demo, *command, data=data(demo, stage)))
    expected = script.losses(stages[stage][1])
    assert resumed == {i: expected[i] for i in (4, 5, 6)}
    assert (
        json.loads((tmp_path / "run.json").read_text())
        == {"model": "tiny", "stage": stage, "finished": 6} | SHOWN[stage]
    )


def test_each_stage_learns_what_it_is_to_learn_with_rsa_where_it_belongs(stages):
    newline = "vision_projection.image_newline"
    for stage, (folder, outputs) in stages.items():
        before, after = (script.plain_tensors(folder / f"iter_000000{i}") for i in (3, 6))
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        frozen = ("language_model.",) if stage == "1" else ("vision_model.ln_post",)
        assert not {name for name in moved if name.startswith(frozen)}
        assert (newline in moved) == (stage != "1")  # AnyRes begins at 1.5
        assert ("language_model.decoder.final_layernorm.weight" in moved) == (stage != "1")
        assert all(("rsa loss" in line) == (stage != "2") for line in script.iterations(outputs).values())


@pytest.mark.parametrize("form", ["--load", "--pretrained-checkpoint"])
def test_a_stage_begins_with_the_weights_of_the_one_before_and_nothing_else(demo, stages, tmp_path, form):
    still = (
        "--lr",
        0,
        "--vision-lr",
        0,
        "--projector-lr",
        0,
        "--min-lr",
        0,
        "--train-iters",
        1,
        "--save-interval",
        1,
        "--clip-grad",
        0,
    )
    command = ("--stage", "1.5", "--save", tmp_path, form, stages["1"][0], *still)
    if form == "--pretrained-checkpoint":
        command = (*command, "--load", tmp_path)
    outputs = script.run(2, demo, *command, data=data(demo, "1.5"))
    assert list(script.iterations(outputs)) == [1]
    expected, actual = (
        script.plain_tensors(stages["1"][0] / "iter_0000006"),
        script.plain_tensors(tmp_path / "iter_0000001"),
    )
    assert expected.keys() == actual.keys() and all(torch.equal(expected[name], actual[name]) for name in expected)
    # The schedule and the data begin anew, and so do Adam's moments: after one step from nothing they are (1 - 0.9) g and
    # (1 - 0.999) g^2.
    moments = {name: moments_of(tmp_path / "iter_0000001", name) for name in ("exp_avg", "exp_avg_sq")}
    assert moments["exp_avg"].keys() == moments["exp_avg_sq"].keys() and len(moments["exp_avg"]) > 20
    for name, first in moments["exp_avg"].items():
        torch.testing.assert_close(moments["exp_avg_sq"][name] * 1000, (first * 10) ** 2, rtol=1e-4, atol=1e-12)
    later = {
        name: moments_of(stages["1"][0] / "iter_0000006", name) for name in moments
    }  # which those of six steps are not
    assert not all(
        torch.allclose(later["exp_avg_sq"][name] * 1000, (m * 10) ** 2, 1e-2) for name, m in later["exp_avg"].items()
    )
    assert re.search(r"consumed samples: +8 ", "".join(outputs))


def moments_of(folder, moment):
    prefix = f"optimizer.state.{moment}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in script.plain_tensors(folder, prefix).items()
        if tensor.any()
    }


def test_what_does_not_follow_is_one_line(demo, stages, tmp_path):
    def fails(message, *command):
        with pytest.raises(Failed) as failed:
            script.run(1, demo, *command, data=data(demo, "2"))
        assert re.search(f"^error: {message}", failed.value.output, re.M), failed.value.output

    first = stages["1"][0]
    fails(
        f"--save {first} holds a run of stage 1, this is stage 2: name another --save", "--stage", "2", "--save", first
    )
    fails(
        f"--load {first} is of stage 1, .*--pretrained-checkpoint .* is named too",
        "--stage",
        "2",
        "--load",
        first,
        "--pretrained-checkpoint",
        first,
    )
    (tmp_path / "run.json").write_text('{"stage": "1"}')
    fails(f"--load {tmp_path}: stage 1 has no checkpoint there yet", "--stage", "2", "--load", tmp_path)
    (tmp_path / "run.json").write_text('{"stage"')
    fails(f"{tmp_path}/run.json cannot be read", "--stage", "2", "--load", tmp_path)


def test_an_epoch_of_a_blend_ends_cleanly_with_its_last_partial_batch(demo, tmp_path):
    """312 samples of four kinds in batches of 32 on two pipeline stages: 10 iterations, the last three quarters full."""
    blend = "".join(
        f"      - {{path: {demo}/data/{kind}, repetitions: {times}}}\n"
        for kind, times in (("captions", 0.6), ("texts", 0.25), ("questions", 0.25), ("words", 0.2))
    )
    mixture = tmp_path / "m.yaml"
    mixture.write_text(
        f"__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend_epochized:\n{blend}"
    )
    command = (
        "--train-iters",
        0,
        "--global-batch-size",
        32,
        "--pipeline-model-parallel-size",
        2,
        "--save",
        tmp_path / "a",
        "--seq-length",
        160,
        "--save-interval",
        5,
        "--image-aspect-ratio",
        "anyres",
        "--template",
        "qwen_1_5",
    )
    outputs = script.run(2, demo, *command, data=mixture, sabotage=print_keys)
    assert "one pass over the data: 312 samples in 10 iterations of up to 32" in outputs[0]
    assert list(script.iterations(outputs)) == list(range(1, 11))
    seen = [re.findall(r"^read (.*)$", output, re.M) for output in outputs]
    assert seen[0] == seen[1] and len(set(seen[0])) == len(seen[0]) == 144 + 60 + 60 + 48 == 312
    # And taken up in its middle: the same losses, and the same end.
    resumed = script.run(2, demo, *command, "--load", tmp_path / "a", "--ckpt-step", 5, data=mixture)
    expected, actual = script.losses(outputs), script.losses(resumed)
    assert list(actual) == [6, 7, 8, 9, 10] and all(actual[i] == expected[i] for i in (6, 8, 9, 10))
    outputs = script.run(2, demo, *command[:-10], "--drop-last", data=mixture)
    assert "one pass over the data: 288 of 312 samples (--drop-last) in 9 iterations of 32" in outputs[0]


def print_keys():
    from rsa_megatron.data import loaders

    right = loaders.TrainLoader.__next__

    def read(self):
        batch = right(self)
        print("".join(f"read {key}\n" for key in batch.keys if key), end="", flush=True)
        return batch

    loaders.TrainLoader.__next__ = read


def test_exactly_the_flagged_samples_reach_the_rsa_loss(demo):
    outputs = script.run(2, demo, "--stage", "1.5", "--train-iters", 10, data=data(demo, "1.5"), sabotage=print_pairs)
    output = "".join(outputs)
    read, in_loss = ({*re.findall(rf"^{what} (\d+)", output, re.M)} for what in ("flagged", "in the loss"))
    assert read == in_loss and 30 < len(read) < 70  # six tenths of 80
    kinds = set(re.findall(r"^read (\w+)-", output, re.M))
    assert kinds == {"captions", "words", "texts"}


def print_pairs():
    """Ids of the flagged samples by their keys, as they are read, and of those in the kernels, where these are made."""
    from rsa_megatron import plugin
    from rsa_megatron.data import loaders
    from rsa_megatron.data.task_encoder import sample_id

    right_next, right_term = loaders.TrainLoader.__next__, plugin.rsa_term

    def read(self):
        batch = right_next(self)
        for key in batch.keys:
            print(f"read {key}", *([f"\nflagged {sample_id(key)}"] if key.startswith("captions") else []), flush=True)
        return batch

    def term(representations, *args):
        found = right_term(representations, *args)
        ids = representations.samples.sample_id[representations.samples.eligible > 0].tolist()
        assert len(ids) == found.num_own_pairs
        print("".join(f"in the loss {number}\n" for number in ids), end="", flush=True)
        return found

    loaders.TrainLoader.__next__, plugin.rsa_term = read, term


def test_run_stages_runs_them_in_order_and_goes_on_where_it_stopped(demo, tmp_path):
    """The shell script on the demo model, two processes: the first launch of a stage ends after two of its iterations."""
    small = (
        "--train-iters",
        "3",
        "--micro-batch-size",
        "2",
        "--global-batch-size",
        "4",
        "--eval-iters",
        "0",
        "--mutual-knn-samples",
        "0",
        "--num-workers",
        "0",
        "--shuffle-buffer-size",
        "1",
        "--exit-interval",
        "2",
        "--save-interval",
        "2",
        "--log-interval",
        "1",
    )
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DATA": str(demo / "data"),
        "TOKENIZER": str(demo / "tokenizer"),
        "OUT": str(tmp_path / "out"),
        "GPUS": "2",
        "GPU_FLAGS": "",
        "STAGES": "1 1.5",
        "STAGE1_5_FLAGS": "--lr 1e-3",
    }

    def run(**more):
        command = ["bash", "examples/run_stages.sh", *small]
        return subprocess.run(command, cwd=ROOT, env=environment | more, capture_output=True, text=True, timeout=400)

    result = run()
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    told = re.findall(r"^\[stage.*", result.stdout, re.M)
    out = tmp_path / "out"
    assert told == [
        f"[stage 1] from iteration 0; {out}/stage1/run.log",
        f"[stage 1] from iteration 2; {out}/stage1/run.log",
        f"[stage 1] done: {out}/stage1",
        f"[stage 1.5] from iteration 0, weights of {out}/stage1; {out}/stage1_5/run.log",
        f"[stage 1.5] from iteration 2, weights of {out}/stage1; {out}/stage1_5/run.log",
        f"[stage 1.5] done: {out}/stage1_5",
    ]
    assert re.findall(r"iteration +(\d)/ +3 ", result.stdout) == ["1", "2", "3"] * 2
    again = run()
    assert again.returncode == 0 and "iteration" not in again.stdout
    # A stage that fails ends the script, with its log named.
    failing = run(OUT=str(tmp_path / "other"), DATA=str(tmp_path))
    assert failing.returncode != 0 and "error: --data-path" in failing.stdout
    assert "error: stage 1 ended at iteration 0, where it began; see" in failing.stderr


def test_a_run_that_is_lost_is_started_again_as_long_as_it_gets_on(tmp_path):
    """A stand-in for a cluster's job: it fails after 10 more iterations, and ends well at 30."""
    job = tmp_path / "job.sh"
    job.write_text("""#!/bin/bash
reached=$(($(cat "$OUT/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0) + 10))
[ "$STAGE" = 2 ] && { echo "no step further"; exit 1; }
echo $reached > "$OUT/latest_checkpointed_iteration.txt"
echo "$STAGE from ${PRETRAINED:-nothing} with $DATA $* at $reached"
[ $reached -lt 30 ] && exit 1
echo '{"finished": 30}' > "$OUT/run.json"
""")
    job.chmod(0o755)
    environment = os.environ | {
        "RUN_STAGE": str(job),
        "DATA": "data",
        "TOKENIZER": "t",
        "OUT": str(tmp_path / "o"),
        "STAGE1_FLAGS": "--a b",
    }
    result = subprocess.run(
        ["bash", "examples/run_stages.sh", "--seed", "1"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1 and "error: stage 2 ended at iteration 0, where it began" in result.stderr
    launches = [line for line in result.stdout.splitlines() if " with " in line]
    assert launches == [f"1 from nothing with data/stage1.yaml --seed 1 --a b at {n}" for n in (10, 20, 30)] + [
        f"1.5 from {tmp_path}/o/stage1 with data/stage1_5.yaml --seed 1 at {n}" for n in (10, 20, 30)
    ]
