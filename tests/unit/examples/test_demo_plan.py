"""The plan of the demo, and the lines that are printed while it trains."""

import importlib
import json
from pathlib import Path

import demo_plan
import pytest
from follower import Follower

from rsa_megatron.job_queue import Queue

demo_script = importlib.import_module("demo")
KINDS = ([], ["--compare", "--seeds", "1", "7"], ["--stages"], ["--packing"])


def parse(*arguments):
    return demo_script.parse(["--out", "/out", "--results", "/results", "--processes", "2", *arguments])


def commands_of(*arguments) -> dict[str, str]:
    return {job.name: " ".join(job.command) for job in demo_plan.plan(parse(*arguments))}


@pytest.mark.parametrize("kind", KINDS, ids=["demo", "compare", "stages", "packing"])
def test_every_job_comes_once_and_after_what_it_needs(kind):
    jobs = demo_plan.plan(parse(*kind))
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names) and len({job.command for job in jobs}) == len(jobs)
    for place, job in enumerate(jobs):
        assert set(job.needs) <= set(names[:place]) and job.sentence


def test_stage_1_has_the_flags_of_the_recipe_and_the_users_after_them():
    commands = commands_of("--seed", "3", "--data", "/data", "--", "--rsa-weight", "0.01")
    data = "--data-path /data/data/captions --tokenizer-model /data/tokenizer --seed 3"
    stage_1 = (
        f"pretrain_llava_rsa.py --model demo --stage 1 --train-iters 200 {data} --pretrained-checkpoint /out/parts"
    )
    folders = "--load /out/stage1 --save /out/stage1 --tensorboard-dir /out/stage1/tensorboard"
    assert "--standalone --nproc-per-node 2 " in commands["stage1"]
    assert commands["stage1"].endswith(f"{stage_1} {folders} --rsa-weight 0.01")
    assert commands["without-rsa"] == commands["stage1"].replace("/out/stage1", "/out/without-rsa") + " --rsa-weight 0"
    assert commands["before"].endswith(f"{stage_1} --skip-train --metrics-file /out/before/metrics.jsonl")
    assert commands["parts"].endswith(f"pretrain_backbones.py {data} --load /out/parts --save /out/parts")
    assert commands["prepare/captions"].endswith("prepare_data.py --out /data --kinds captions")


def test_runs_of_a_comparison_differ_only_by_rsa_and_seed():
    commands = commands_of("--compare", "--seeds", "1", "7", "--", "--lr", "1e-3")
    for seed in ("1", "7"):
        run, without = (commands[f"seed-{seed}/{name}"] for name in ("stage1", "without-rsa"))
        assert run.endswith(" --lr 1e-3") and f"--seed {seed} " in run
        assert without == run.replace(f"seed-{seed}/stage1", f"seed-{seed}/without-rsa") + " --rsa-weight 0"
        assert run.replace("seed-7", "seed-1").replace("--seed 7", "--seed 1") == commands["seed-1/stage1"]
    compare = commands["comparison-1-7"]
    assert compare.endswith(
        "--group with RSA /out/seed-1/stage1/metrics.jsonl /out/seed-7/stage1/metrics.jsonl "
        "--group without /out/seed-1/without-rsa/metrics.jsonl /out/seed-7/without-rsa/metrics.jsonl "
        "--out /results/demo.png --jsonl /results/demo.jsonl"
    )


def test_each_stage_starts_from_the_one_before_with_its_mixture():
    commands = commands_of("--stages", "--", "--lr", "1e-3")
    for arm, end in (("with-rsa", "--lr 1e-3"), ("without", "--lr 1e-3 --rsa-weight 0")):
        folder, begin = f"/out/stages/{arm}", "/out/parts"
        for stage, name, flags in (
            ("1", "stage1", "--train-iters 150 --eval-interval 1000"),
            ("1.5", "stage1_5", "--train-iters 60"),
            ("2", "stage2", "--train-iters 40"),
        ):
            own = f"{folder}/{name}"
            assert commands[f"stages/{arm}/{name}"].endswith(
                f"--model demo --stage {stage} --data-path /out/data/{name}.yaml --tokenizer-model /out/tokenizer --seed 1 "
                f"--pretrained-checkpoint {begin} --load {own} --save {own} --tensorboard-dir {own}/tensorboard {flags} {end}"
            )
            begin = own


def test_packed_and_unpacked_begin_with_the_same_weights_and_see_as_many_samples():
    commands = commands_of("--packing", "--seeds", "1", "7", "--", "--lr", "1e-3")
    common = "--data-path /out/data/{0}.yaml --tokenizer-model /out/tokenizer --seed {1} --pretrained-checkpoint {2} "
    for seed in ("1", "7"):
        folder = f"packing/seed-{seed}"
        assert common.format("stage1", seed, "/out/parts") in commands[f"{folder}/stage1"]
        for arm in ("packed", "unpacked"):
            first, second = (commands[f"{folder}/{arm}/{stage}"] for stage in ("stage1_5", "stage2"))
            assert common.format("stage1_5", seed, f"/out/{folder}/stage1") in first
            assert common.format("stage2", seed, f"/out/{folder}/{arm}/stage1_5") in second
            assert first.endswith(" --lr 1e-3") and "--log-interval 1 " in first
            assert (" --calculate-per-token-loss " in first) == (arm == "unpacked")
    # Samples of a row as `rsa-megatron data fill` finds them, 8.2 of 2048 positions and 5 of 1696.
    for stage, per_row in (("1.5", 8.2), ("2", 5)):
        unpacked, packed = (demo_plan.PACKING_STAGES[stage][arm] for arm in ("unpacked", "packed"))
        packed = dict(zip(packed[::2], map(int, packed[1::2])))
        seen = packed["--train-iters"] * packed["--global-batch-size"] * per_row
        assert seen == pytest.approx(32 * int(unpacked[1]), rel=0.01)
    assert commands["packing/figures-1-7"].endswith(
        "--runs /out/packing/seed-1 /out/packing/seed-7 --before /out/before/metrics.jsonl "
        "--out /results/demo-packing.png --jsonl /results/demo-packing.jsonl"
    )


def test_a_follower_prints_each_whole_line_once(tmp_path):
    queue, said = Queue([], tmp_path, 1), []
    follower = Follower(queue, said.append)
    file = queue.metrics("run")
    file.parent.mkdir()

    def write(text: str) -> list[str]:
        with file.open("a") as opened:
            opened.write(text)
        follower.read()
        new, said[:] = list(said), []
        return new

    # An earlier start has left a line and a half, of which the training script cuts off the half.
    first = line(10, **{"lm loss": 9.0})
    file.write_text(first + '{"iteration": 20, "lm')
    follower.start("run")
    file.write_text(first)
    assert write("") == []
    text = line(20, **{"lm loss": 1.118221, "rsa loss": 1500.5, "grad-norm": 3.0})
    assert write(text[:30]) == [] and write("") == []
    assert write(text[30:] + text[:5]) == ["    iteration   20 | lm loss 1.118221 | rsa loss 1500.5000"]
    assert write("") == []
    evaluation = {"lm loss validation": 0.5, "mutual-knn validation": 0.15841, "mutual-knn chance validation": 0.01}
    lines = line(21, **{"lm loss": 1.0}) + line(23, **evaluation) + line(30, **{"lm loss": None, "rsa loss": 2.0})
    assert write(text[5:] + lines) == [
        "    iteration   20 | lm loss 1.118221 | rsa loss 1500.5000",
        "    iteration   23 | validation lm loss 0.500000 | mutual-knn 0.1584",
        "    iteration   30 | rsa loss 2.0000",
    ]


def line(iteration: int, **figures) -> str:
    return json.dumps({"iteration": iteration, **figures}) + "\n"


def test_processes_and_jobs_share_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    threads = [demo_script.count_threads(parse(*flags)) for flags in ((), ("--jobs", "3"), ("--processes", "4"))]
    assert threads == [3, 1, 2]


def test_a_dry_run_starts_nothing(tmp_path, capsys):
    demo_script.main(["--dry-run", "--out", str(tmp_path / "out"), "--processes", "2"])
    assert "8 jobs, 1 at a time: about " in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_examples_of_the_makefile_are_flags_of_the_script():
    text = (Path(demo_script.__file__).parents[2] / "Makefile").read_text()
    recipe = next(text for text in text.splitlines() if text.startswith("DEMO_RUN = "))
    for name, value in (("OUT", "/out"), ("DEMO", "/data"), ("SEED", "4"), ("SEEDS", "5 6"), ("PY", "python")):
        recipe = recipe.replace(f"$({name})", value)
    args = demo_script.parse([*recipe.split()[4:], "--processes", "2"])
    assert (args.seed, args.seeds, args.out, args.data) == (4, [5, 6], Path("/out"), Path("/data"))
