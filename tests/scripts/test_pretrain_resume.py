"""The training script, killed, stopped, finished, or under another layout, goes on exactly, or says why it cannot."""

import contextlib
import re
import shutil
import signal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import script
from tests.support.layouts import PP, TP, VPP
from tests.support.processes import Failed

DROPOUT = ("--hidden-dropout", "0.1", "--attention-dropout", "0.1")


def test_a_killed_run_resumes_to_the_last_digit(demo, tmp_path):
    flags = ("--train-iters", 24, "--num-workers", 1, "--global-batch-size", 16, "--save-interval", 4, *DROPOUT)
    # Three quarters of the split: an evaluation that went on where the last one had stopped would be on other samples.
    flags += (
        "--eval-interval",
        4,
        "--eval-iters",
        3,
        "--mutual-knn-samples",
        32,
        "--eval-metrics",
        "mutual-knn",
        "cka",
    )
    flags_of = {name: (*flags, "--save", tmp_path / name, "--tensorboard-dir", tmp_path / name) for name in "ab"}
    uninterrupted = script.run(2, demo, *flags_of["a"])
    killed = script.run(2, demo, *flags_of["b"], kill_when=lambda output: re.search(r"iteration +10/", output))
    assert (tmp_path / "b" / "run.lock").is_file()
    reached = max(script.iterations(killed))
    assert 10 <= reached < 24
    resumed = script.run(2, demo, *flags_of["b"], "--load", tmp_path / "b")
    assert "has ended without releasing it; taken over" in resumed[0]
    assert not list(tmp_path.glob("?/run.lock"))
    expected, actual = script.losses(uninterrupted), script.losses(resumed)
    first = min(actual)
    assert 4 < first <= reached + 1 and max(actual) == 24
    # Megatron alone would print the first iteration of a run twice, by itself and in the mean with the second.
    assert actual == {i: expected[i] for i in actual}
    expected, actual = (
        {line for line in validation_lines(outputs) if int(re.search(r"iteration (\d+)", line)[1]) >= first}
        for outputs in (uninterrupted, resumed)
    )
    assert len(actual) == 3 * len({i for i in range(first, 25) if i % 4 == 0}) and actual == expected
    said = "an evaluation reads 48 of the 64 samples of the split val, each time the same; never read: 16 beyond --eval-iters"
    assert [output.count(said) for output in resumed] == [1, 0]
    expected, actual = (scalars(tmp_path / name, first) for name in "ab")
    assert len(actual["lm loss"]) == 25 - first and actual == expected
    assert not [line for run in (*uninterrupted, *resumed) for line in run.splitlines() if "common state dict" in line]
    # It is the data position that does it: with the data from the beginning the same weights see other samples.
    flags = (*flags, "--exit-interval", first, "--load", tmp_path / "a", "--ckpt-step", first - 1)
    restarted = script.losses(script.run(2, demo, *flags, "--restart-data"))
    # So do both ranks' random numbers: with those of the first on both, the same samples are dropped otherwise.
    of_one_rank = script.losses(script.run(2, demo, *flags, sabotage=random_states_of_the_first_rank_for_all))
    assert script.losses(uninterrupted)[first] not in (restarted[first], of_one_rank[first])


def random_states_of_the_first_rank_for_all():
    from rsa_megatron.training import megatron_patches

    megatron_patches._keep_random_states_of_every_rank = lambda: None


def reading_draws_from_dropouts_generator():
    from rsa_megatron.data import loaders

    loaders.keep_generators = contextlib.nullcontext


def test_neither_reading_nor_evaluating_changes_what_is_dropped(demo, tmp_path):
    """Without data workers, with one tensor-parallel rank that reads: an evaluation between steps, and a resumed run's start."""
    flags = (*TP, *DROPOUT, "--save-interval", 3)
    evaluated = ("--eval-interval", 2, "--eval-iters", 1, "--mutual-knn-samples", 16)
    outputs = script.run(2, demo, *flags, *evaluated, "--save", tmp_path)
    assert not any(
        "RNG state changed" in output for output in outputs
    )  # at each dropout, as on the CPU Megatron sees it
    expected = script.losses(outputs)
    for sabotage in (None, reading_draws_from_dropouts_generator):
        actual = script.losses(script.run(2, demo, *flags, "--load", tmp_path, "--ckpt-step", 3, sabotage=sabotage))
        assert list(actual) == [4, 5, 6]
        # (Of the second iteration of a run Megatron prints the mean with the first.)
        assert [actual[i] == expected[i] for i in (4, 6)] == [sabotage is None] * 2


def validation_lines(outputs):
    """What a run says of each evaluation but how long it took: of the loss, and of each score of alignment."""
    lines = re.findall(r"^.*validation .* at iteration \d+ .*", "\n".join(outputs), flags=re.MULTILINE)
    return {re.sub(r"[\d.]+ s \|", "", line) for line in lines}


def scalars(folder, first):
    """Every figure of the loss that TensorBoard has from iteration `first` on; of a resumed run, the later ones."""
    events = EventAccumulator(str(folder)).Reload()
    names = ("lm loss", "rsa loss", "rsa pairs", "rsa dist vision", "rsa dist text", "grad-norm")
    return {name: {e.step: e.value for e in events.Scalars(name) if e.step >= first} for name in names}


def test_a_finished_run_says_so_leaves_every_byte_and_evaluates_as_what_it_is(demo, tmp_path):
    """Its last checkpoint is not of an interval: Megatron would write it again, in its place."""
    evaluation = ("--eval-iters", 1, "--eval-interval", 3, "--mutual-knn-samples", 32)
    flags = ("--train-iters", 3, "--save-interval", 2, "--load", tmp_path / "run", *evaluation)
    saved = (*flags, "--save", tmp_path / "run")
    (first,) = script.run(1, demo, *saved)
    assert script.iterations([first]) and (tmp_path / "run" / "iter_0000003").is_dir()
    found = bytes_of(tmp_path / "run")
    # Its last iteration is of an interval of evaluations: Megatron would evaluate twice.
    assert found["metrics.jsonl"].count(b"lm loss validation") == first.count("validation loss at iteration 3") == 1
    for fewer in ((), ("--train-iters", 2)):
        again = script.run(2, demo, *saved, *fewer)
        assert re.search(
            r"^--load .*/run: its run has come to its end at iteration 3, .* nothing is left", again[0], re.M
        )
        assert "nothing is left" not in again[1] and bytes_of(tmp_path / "run") == found
    (evaluated,) = script.run(1, demo, *flags, "--skip-train")
    scores = [re.findall(r"mutual-knn@10 at iteration (\d+) .*value: ([\d.]+)", said) for said in (first, evaluated)]
    assert scores[0] == scores[1] and "at iteration 3 | mutual-knn" in evaluated
    # Killed after its last checkpoint, before its last evaluation: that is left to do, and the checkpoint is not written again.
    (tmp_path / "run" / "run.json").write_text('{"model": "tiny", "stage": "1"}\n')
    (ended,) = script.run(1, demo, *saved)
    assert "the checkpoint of iteration 3 is there already, and is not written again" in ended
    assert "at iteration 3 | mutual-knn" in ended and '"finished": 3' in (tmp_path / "run" / "run.json").read_text()
    now = bytes_of(tmp_path / "run")
    assert {name for name in now if now[name] != found.get(name)} == {"metrics.jsonl"}


def bytes_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_signal_ends_the_run_with_a_checkpoint(demo, tmp_path):
    flags = ("--train-iters", 1000, "--num-workers", 1, "--save", tmp_path, "--save-interval", 1000)
    outputs = script.run(
        2,
        demo,
        *flags,
        "--exit-signal-handler",
        kill_when=lambda output: re.search(r"iteration +5/", output),
        kill_with=signal.SIGTERM,
    )
    reached = max(script.iterations(outputs))
    assert 5 <= reached < 1000
    resumed = script.run(2, demo, *flags, "--load", tmp_path, "--exit-interval", reached + 3)
    assert min(script.iterations(resumed)) == reached + 1


SCHEDULE = (
    "--lr",
    "1e-3",
    "--min-lr",
    0,
    "--lr-decay-style",
    "linear",
    "--lr-warmup-fraction",
    0.1,
    "--vision-lr",
    "5e-4",
)


@pytest.fixture(scope="module")
def stopped_at_2(demo, tmp_path_factory):
    """A run of two ranks that stopped after two of six iterations."""
    folder = tmp_path_factory.mktemp("stopped")
    script.run(2, demo, "--exit-interval", 2, "--save", folder, "--save-interval", 2, *SCHEDULE)
    return folder


@pytest.mark.parametrize(
    "world_size, change, message",
    [
        (1, [], "data-parallel size of 2, this run has 1; an exact resume is impossible"),
        (2, ["--num-workers", 1], "--num-workers = 0, this run has 1; an exact resume is impossible"),
        (2, ["--micro-batch-size", 2], "--micro-batch-size = 4, this run has 2; an exact resume is impossible"),
    ],
)
def test_a_resume_that_cannot_be_exact_is_refused(demo, stopped_at_2, world_size, change, message):
    with pytest.raises(Failed) as failed:
        script.run(world_size, demo, "--load", stopped_at_2, *SCHEDULE, *change)
    assert message in str(failed.value) and "--restart-data" in str(failed.value)
    resumed = script.run(world_size, demo, "--load", stopped_at_2, *SCHEDULE, *change, "--restart-data")
    assert list(script.iterations(resumed)) == [3, 4, 5, 6]


def test_no_run_writes_over_the_checkpoints_of_another(demo, stopped_at_2, tmp_path, monkeypatch):
    monkeypatch.chdir(stopped_at_2.parent)
    save, other = ("--save", stopped_at_2, "--save-interval", 2, *SCHEDULE), tmp_path / "other"
    shutil.copytree(stopped_at_2, other)
    plain = stopped_at_2.name  # the same folder in other words
    commands = {
        "without --load this run would start from scratch and write over them: add --load .*, or name another --save": save,
        "without --load this": (*save, "--pretrained-checkpoint", other),
        "this run would begin with --load .*other and write over them: set --load .*, or name another": (
            *save,
            "--load",
            other,
        ),
        "with --finetune this run would start at iteration 0": (*save, "--load", stopped_at_2, "--finetune"),
        "": (*save, "--load", f"{plain}/../{plain}/"),
        " ": ("--save", tmp_path / "new", "--save-interval", 2, "--load", other, *SCHEDULE),
        "  ": (*save, "--skip-train"),
    }
    errors = script.parse_errors(demo, list(commands.values()))
    for expected, error in zip(commands, errors):
        if not expected.strip():
            assert error == ""
        else:
            assert re.search(rf"^error: --save {stopped_at_2} holds checkpoints \(the last: 2\), and {expected}", error)


OVERRIDE, USE_CHECKPOINT = "--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler"


def test_another_schedule_is_taken_where_it_is_plain_and_asked_about_where_not(demo, stopped_at_2):
    differs = {
        "--lr: 0.001 there, 0.002 here": ("--lr", "2e-3"),
        "--min-lr: 0 there, 0.0001 here": ("--min-lr", "1e-4"),
        "--lr-decay-style: linear there, cosine here": ("--lr-decay-style", "cosine"),
        r"--weight-decay \(--start-weight-decay\): 0 there, 0.1 here;": ("--weight-decay", 0.1),
        "--end-weight-decay: 0 there, 0.1 here; --weight-decay-incr-style: constant there, linear here": (
            "--weight-decay-incr-style",
            "linear",
            "--start-weight-decay",
            0,
        )
        + ("--end-weight-decay", 0.1),
        r"samples of warm-up .*: 4.8 there, 9.6 here;": ("--lr-warmup-fraction", 0.2),
        "--vision-lr: 0.0005 there, 0.0001 here": ("--vision-lr", "1e-4"),
        # What follows from another length needs no decision.
        "samples of warm-up [^;]* there, 12.8 here; set": ("--train-iters", 8, "--lr-warmup-fraction", 0.2),
        "--lr: 0.001 there, 0.003 here; set": ("--train-iters", 9, "--lr", "3e-3"),
    }
    load = ("--load", stopped_at_2, *SCHEDULE)
    remedies = f"; set them back, or take this run's with {OVERRIDE}, or the checkpoint's with {USE_CHECKPOINT}"
    for expected, error in zip(differs, script.parse_errors(demo, [(*load, *change) for change in differs.values()])):
        assert re.search(f"^error: --load .*: its schedule is another than this run's: {expected}", error)
        assert error.endswith(remedies)
    taken = [(*change, flag) for change in differs.values() for flag in (OVERRIDE, USE_CHECKPOINT)]
    lengths = [("--train-iters", count) for count in (0, 4, 8)] + [("--lr-decay-iters", 12)]
    again = [(), ("--lr", "2e-3", "--no-load-optim"), ("--lr", "2e-3", "--finetune")]
    assert set(script.parse_errors(demo, [(*load, *change) for change in taken + lengths + again])) == {""}
    packed = (*load, "--packing-buffer-size", 8)
    unit, *others = script.parse_errors(demo, [packed, (*packed, OVERRIDE), (*packed, "--no-load-optim")])
    assert re.match(
        r"error: --load .*: its schedule counts samples there, packed rows here \(.* 0 there, 8 here\): go on with",
        unit,
    )
    assert "--packing-buffer-size 0 --global-batch-size 8, or begin anew with --no-load-optim --restart-data" in unit
    assert others == ["", ""]
    refused = {
        "leave one out": (OVERRIDE, USE_CHECKPOINT),
        "--vision-lr: 0.0005 there, 0.001 here: the parts that learn at the same rate are others": (
            "--vision-lr",
            "1e-3",
            OVERRIDE,
        ),
        "--trainable was vision projector embeddings language there and is vision here": ("--trainable", "vision"),
        "--lr-warmup-fraction 1.0: it is from 0 to below 1": (
            "--train-iters",
            6,
            "--lr-warmup-fraction",
            1,
        ),
    }
    for expected, error in zip(refused, script.parse_errors(demo, [(*load, *change) for change in refused.values()])):
        assert re.search(f"^error: .*{expected}", error)


@pytest.mark.parametrize("optimizer", [(), ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")])
def test_the_schedule_that_is_said_to_be_taken_is_the_one_that_is_followed(demo, stopped_at_2, tmp_path, optimizer):
    folder = stopped_at_2
    if optimizer:
        folder = tmp_path
        flags = ("--exit-interval", 2, "--save", folder, "--save-interval", 2)
        script.run(2, demo, *flags, *SCHEDULE, *optimizer)
    load = ("--load", folder, *SCHEDULE, *optimizer)

    def rates(*change) -> tuple[str, dict[int, tuple[float, float]]]:
        outputs = script.run(2, demo, *load, *change)
        (said,) = re.findall(r"^schedule: .*", "".join(outputs), re.M)
        assert "".join(outputs).count(f"resumes {folder} at iteration 2\n") == 1
        assert "changes no weight" not in "".join(outputs)
        other_samples = (
            f"--load {folder}: --seq-length: 128 there, 120 here; from here on longer samples are cut elsewhere"
        )
        assert "".join(outputs).count(other_samples) == ("--seq-length" in change)
        figures = script.iterations(outputs)
        # Megatron prints the rate of the step to come, ours is that of the step taken; the second line is the mean of two.
        return said, {
            i: (float(line["learning rate"]), float(line["vision lr"])) for i, line in figures.items() if i != 4
        }

    def decayed(peak: float, iterations: int) -> dict[int, tuple[float, float]]:
        def rate(i: int) -> float:
            return peak * (1 - i) / (1 - 0.1)

        last = 8
        return {i: (rate(i / iterations), rate((i - 1) / iterations)) for i in (3, *range(5, last + 1))}

    said, found = rates("--train-iters", 8, "--lr", "2e-3", "--vision-lr", "4e-3", OVERRIDE)
    assert said.startswith(f"schedule: this run's ({OVERRIDE}), not the checkpoint's: --lr: 0.001 there, 0.002 here")
    for i, (rate, of_vision) in decayed(2e-3, 8).items():
        assert found[i] == pytest.approx((rate, of_vision * 2), rel=1e-5, abs=1e-12)  # six digits are printed
    if optimizer:
        return
    said, found = rates("--train-iters", 8, "--seq-length", 120)
    assert said.startswith("schedule: this run's, not the checkpoint's: iterations: 6 there, 8 here")
    for i, (rate, of_vision) in decayed(1e-3, 8).items():
        assert found[i] == pytest.approx((rate, of_vision / 2), rel=1e-5, abs=1e-12)
    said, found = rates("--lr", "2e-3", "--vision-lr", "4e-3", USE_CHECKPOINT)
    assert said.startswith(
        f"schedule: the checkpoint's ({USE_CHECKPOINT}), not this run's: --lr: 0.001 there, 0.002 here"
    )
    for i, (rate, of_vision) in list(decayed(1e-3, 6).items())[:3]:
        assert found[i] == pytest.approx((rate, of_vision / 2), rel=1e-5, abs=1e-12)


def test_interleaved_pipelines_say_that_the_data_position_is_not_saved(demo, tmp_path):
    flags = (*VPP, "--save", tmp_path, "--save-interval", 2)
    outputs = script.run(2, demo, "--exit-interval", 2, *flags)
    assert (
        "cannot save the data position of interleaved pipelines; a resumed run will need --restart-data" in outputs[0]
    )
    with pytest.raises(Failed, match="no data position is saved for iteration 2"):
        script.run(2, demo, *flags, "--load", tmp_path)
    resumed = script.run(2, demo, *flags, "--load", tmp_path, "--restart-data")
    assert list(script.iterations(resumed)) == [3, 4, 5, 6]


@pytest.mark.parametrize(
    "optimizer",
    [(), ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")],
    ids=["", "distributed optimizer"],
)
def test_a_checkpoint_of_tp_2_goes_on_under_pp_2_and_alone(demo, tmp_path, optimizer):
    flags = (*optimizer, "--save-interval", 3, "--lr", "5e-3")
    script.run(2, demo, *flags, *TP, "--exit-interval", 3, "--save", tmp_path)
    load = (*flags, "--load", tmp_path)
    expected = script.iterations(script.run(2, demo, *load, *TP))
    for world_size, layout in ((2, PP), (1, ())):
        actual = script.iterations(script.run(world_size, demo, *load, *layout))
        assert list(actual) == list(expected) == [4, 5, 6]
        for iteration in actual:
            for name in ("lm loss", "rsa loss", "grad norm"):
                # The noise floor of fp32 in another order, seen through three decimals of the grad norm.
                a, e = float(actual[iteration][name]), float(expected[iteration][name])
                assert a == pytest.approx(e, rel=2e-5, abs=1e-3 if name == "grad norm" else 0)
    # The optimizer's state came along: without it the second step already goes elsewhere.
    without = script.iterations(script.run(1, demo, *load, "--no-load-optim"))
    assert float(without[5]["lm loss"]) != pytest.approx(float(expected[5]["lm loss"]), rel=1e-3)
