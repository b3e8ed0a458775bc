"""`make reproduce`: what it plans, what it makes of logs, and all of it once for real, interrupted and taken up."""

import json
import re
from dataclasses import replace

import pytest
import reproduce
import reproduction_results as results
from reproduction_plan import ABLATIONS, DEFAULT, FULL, MAIN, TrainingRun, plan

from rsa_megatron.data.synthetic import data_sets
from rsa_megatron.job_queue import Queue, lock_folder, makespan
from rsa_megatron.plots.alignment_records import read_runs
from tests.support.reproduction_plans import PLACE, flag


@pytest.mark.parametrize("form", [DEFAULT, FULL], ids=["default", "full"])
@pytest.mark.parametrize("only", [None, "main", "ablations"])
def test_every_job_comes_once_and_after_what_it_needs(form, only):
    jobs = plan(PLACE, form, [1, 2, 3], only)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names) and len({job.command for job in jobs}) == len(jobs)
    for place, job in enumerate(jobs):
        assert set(job.needs) <= set(names[:place])
    runs = [job for job in jobs if isinstance(job, TrainingRun)]
    arms = {(run.arm, run.stage) for run in runs}
    main = {(arm, stage) for arm in MAIN for stage in ("1", "1.5", "2")} | {
        (f"{arm}, no stage 1.5", "2") for arm in MAIN
    }
    ablations = {(arm, "1") for arm in ABLATIONS}
    assert arms == {None: main | ablations, "main": main, "ablations": ablations | {(arm, "1") for arm in MAIN}}[only]
    # A stage reads the data sets of its mixture (data/captions are there before the parts).
    read = {"1": set(), "1.5": {"data/words", "data/texts"}, "2": {"data/questions"}}
    assert all({need for need in run.needs if need.startswith("data/")} == read[run.stage] for run in runs)
    assert all(run.before in names and (run.score in names) == (run.stage == "2") for run in runs)


def test_a_stage_begins_from_the_one_before_and_is_as_long_in_all_arms():
    runs = {(run.arm, run.stage): run for run in plan(PLACE, DEFAULT, [7], None) if isinstance(run, TrainingRun)}
    for arm, other in (("with RSA", "without"), ("with RSA, no stage 1.5", "without, no stage 1.5")):
        assert begins_from(runs[arm, "2"]) != begins_from(runs[other, "2"])
    for arm, folder in (("with RSA", "with-rsa"), ("without", "without")):
        assert begins_from(runs[arm, "1"]) == "/out/runs/seed-7/parts"
        assert (
            begins_from(runs[arm, "1.5"])
            == begins_from(runs[f"{arm}, no stage 1.5", "2"])
            == f"/out/runs/seed-7/{folder}/stage-1"
        )
        assert begins_from(runs[arm, "2"]) == f"/out/runs/seed-7/{folder}/stage-1.5"
    for stage in ("1", "1.5", "2"):
        assert len({flag(run, "--train-iters") for run in runs.values() if run.stage == stage}) == 1
    # Nothing but the arm's flags and how often it is evaluated tells stage 1 of an arm from that of another.
    bare = {
        arm: [word for word in run.command if is_no_place(word)] for (arm, stage), run in runs.items() if stage == "1"
    }
    expected = bare.pop("with RSA")
    interval = expected.index("--eval-interval") + 1
    for arm, command in bare.items():
        flags = list((MAIN | ABLATIONS)[arm])
        assert command[len(expected) :] == flags
        assert (
            command[:interval] + command[interval + 1 : len(expected)] == expected[:interval] + expected[interval + 1 :]
        )


def begins_from(run) -> str:
    return flag(run, "--pretrained-checkpoint")


def is_no_place(word: str) -> bool:
    """Of the arm's own; the parts are everybody's."""
    return not word.startswith("/out/runs/seed-7/") or word.endswith("/parts")


def test_it_fits_into_an_hour_on_two_cores():
    jobs = plan(PLACE, DEFAULT, [1, 2, 3], None)
    assert makespan(jobs, 2) < 54 * 60  # a tenth of the hour is left for a machine that is slower than assumed


def test_openmoji_is_stage_1_from_the_parts_of_the_scenes():
    scenes, openmoji = (plan(replace(PLACE, data=data), DEFAULT, [1, 2], None) for data in ("scenes", "openmoji"))
    commands = {job.name: job.command for job in scenes}
    shared = [job for job in openmoji if job.name in commands]
    # In the same folder they are not done twice.
    assert {job.name for job in shared} == {"data/captions", "seed-1/parts", "seed-2/parts"}
    assert all(job.command == commands[job.name] for job in shared)
    runs = [job for job in openmoji if isinstance(job, TrainingRun)]
    assert {run.stage for run in runs} == {"1"} and all(
        flag(run, "--data-path") == "/out/data/openmoji" for run in runs
    )


def test_test_scenes_are_like_none_of_training_or_validation():
    sizes = data_sets.Sizes(seed=0, validation=200)
    test = [data_sets.get_scene(kind, index, "test", sizes) for kind in data_sets.KINDS for index in range(100)]
    val = {
        data_sets.get_content(data_sets.get_scene(kind, index, "val", sizes))
        for kind in data_sets.KINDS
        for index in range(200)
    }
    assert all(scene.is_validation for scene in test)  # training has none of that content
    assert not val & {data_sets.get_content(scene) for scene in test} and len({repr(scene) for scene in test}) == len(
        test
    )


METRICS = """\
{{"iteration": {half}, "lm loss": 0.79, "rsa loss": 600.0, "rsa dist vision": 8.0}}
{{"iteration": {all}, "lm loss": 0.69, "rsa loss": null, "rsa dist vision": 4.0}}
{{"iteration": {all}, "lm loss validation": {loss}, "mutual-knn validation": {score}, "mutual-knn chance validation": 0.1587}}
"""


@pytest.fixture
def finished(tmp_path):
    """A reproduction of two seeds that has run, but for seed 2's stage 2 with RSA, which failed: its arguments and queue."""
    args = reproduce.parse(
        [
            "--out",
            str(tmp_path / "out"),
            "--results",
            str(tmp_path),
            "--only",
            "main",
            "--samples",
            "64",
            "--seeds",
            "1",
            "2",
            "--iterations",
            "1=10,1.5=10,2=10",
        ]
    )
    jobs = plan(args.place, args.form, args.seeds, args.only)
    for number, job in enumerate(jobs):
        if job.name != "seed-2/with-rsa/stage-2":
            folder = tmp_path / "out" / "runs" / job.name
            folder.mkdir(parents=True)
            (folder / "done.json").write_text(json.dumps({"seconds": 1.5}))
            score = 0.2 if job.name.endswith("before") else 0.3 + number / 1000
            (folder / "metrics.jsonl").write_text(METRICS.format(half=5, all=10, loss=5 - number / 100, score=score))
            share = {"exact": 0.5, "base rate": 0.4, "tokens": 0.75, "content words": 0.25}
            (folder / "scores.json").write_text(json.dumps({"questions": share, "captions": share}))
    return args, Queue(jobs, tmp_path / "out" / "runs", 2)


def test_lines_hold_what_the_runs_metrics_say(finished):
    args, queue = finished
    lines = {results.key(line): line for line in reproduce.collected(queue, args)}
    assert len(lines) == 2 * 8 - 1 and ("scenes", "with RSA", 2, "2") not in lines
    line = lines["scenes", "with RSA", 1, "1"]
    number = [job.name for job in queue.jobs].index("seed-1/with-rsa/stage-1")
    assert line["figures"]["mutual-knn"] == [[10, 0.3 + number / 1000]] and line["figures"]["lm loss"] == [
        [5, 0.79],
        [10, 0.69],
    ]
    assert line["figures"]["rsa loss"] == [[5, 600.0]]  # NaN is no JSON
    assert line["before"]["mutual-knn"] == 0.2 and (line["chance"], line["num_samples"]) == (0.1587, 64)
    assert line["accuracy"] is None and line["flags"] == [] and line["iterations"] == 10
    assert lines["scenes", "without", 1, "2"]["accuracy"]["questions"] == 0.5
    assert lines["scenes", "without", 1, "1"]["flags"] == ["--rsa-weight", "0"]


def test_results_are_written_drawn_and_put_into_the_page(finished):
    args, queue = finished
    queue.failed.add("seed-2/with-rsa/stage-2")
    (args.results / "README.md").write_text("what was found\n<!-- reproduce -->\nold\n<!-- /reproduce -->\nthe end\n")
    reproduce.report(queue, args)
    assert len(read_runs([args.jsonl])) == 15
    page = (args.results / "README.md").read_text()
    assert page.startswith("what was found\n<!-- reproduce -->\nData: scenes,") and page.endswith(
        "\n<!-- /reproduce -->\nthe end\n"
    )
    names = [job.name for job in queue.jobs]
    first, second = (0.3 + names.index(f"seed-{seed}/with-rsa/stage-1") / 1000 for seed in (1, 2))
    mean, deviation = (first + second) / 2, abs(first - second) / 2**0.5
    assert (
        f"| with RSA | 0.2000 ± 0.0000 (0.200, 0.200) | {mean:.4f} ± {deviation:.4f} ({first:.3f}, {second:.3f}) |"
        in page
    )
    assert "| with RSA | 0.5000 | 0.4000 | 0.7500 | 0.2500 |" in page  # of the seed that did not fail
    assert all((args.results / f"reproduce-{name}.png").stat().st_size > 5000 for name in reproduce.PICTURES)
    # Again, nothing changes.
    before = args.jsonl.read_text()
    reproduce.report(queue, args)
    assert args.jsonl.read_text() == before and (args.results / "README.md").read_text() == page


def test_lines_of_other_seeds_stay_and_those_of_another_form_go(finished):
    args, queue = finished
    lines = reproduce.collected(queue, args)
    other_seed, other_form = lines[0] | {"seed": 9}, lines[0] | {"seed": 8, "form": "longer"}
    results.write_lines(args.jsonl, [other_seed, other_form, lines[0] | {"chance": 0.5}])
    assert sorted(map(results.key, reproduce.collected(queue, args))) == sorted(map(results.key, [*lines, other_seed]))
    assert all(line["chance"] == 0.1587 for line in reproduce.collected(queue, args))


def test_what_is_recorded_is_left_out_but_for_what_others_begin_from(finished):
    args, queue = finished
    results.write_lines(args.jsonl, reproduce.collected(queue, args))
    left = [job.name for job in reproduce.without_recorded(queue.jobs, args)]
    stages = [
        f"seed-2/with-rsa/{name}" for name in ("stage-1", "stage-1.5", "stage-2", "stage-2/export", "stage-2/score")
    ]
    assert left == [*(f"data/{kind}" for kind in data_sets.KINDS), "seed-2/parts", "seed-2/before", *stages]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "100"], "--samples 100 is no multiple of the batch, 32"),
        (["--iterations", "3=5"], "3=5 is not as 1=100,1.5=60"),
        (["--data", "openmoji", "--only", "main"], "leave out --only and --samples"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        reproduce.parse(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_two_do_not_work_in_one_folder(tmp_path):
    with lock_folder(tmp_path):
        with pytest.raises(
            ValueError, match=f"another run is at work in {tmp_path}: wait for it, or name another --out"
        ):
            lock_folder(tmp_path)
    lock_folder(tmp_path).close()


def test_a_dry_run_starts_nothing(tmp_path, capsys):
    reproduce.main(["--dry-run", "--seeds", "5", "--out", str(tmp_path / "out"), "--results", str(tmp_path)])
    output = capsys.readouterr().out
    assert (
        "--seed 5" in output
        and re.search(r"\d+ jobs, 2 at a time: about \d+ minutes", output)
        and not list(tmp_path.iterdir())
    )
