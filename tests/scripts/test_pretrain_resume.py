"""The training script, killed, stopped, finished, or under another layout, goes on exactly, or says why it cannot."""

import contextlib
import re
import signal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import script
from tests.support.layouts import PP, TP, VPP
from tests.support.processes import Failed

DROPOUT = ("--hidden-dropout", "0.1", "--attention-dropout", "0.1")


def test_a_killed_run_resumes_to_the_last_digit(demo, tmp_path):
    flags = ("--train-iters", 24, "--num-workers", 1, "--global-batch-size", 16, "--save-interval", 4, *DROPOUT)
    flags_of = {name: (*flags, "--save", tmp_path / name, "--tensorboard-dir", tmp_path / name) for name in "ab"}
    uninterrupted = script.run(2, demo, *flags_of["a"])
    killed = script.run(2, demo, *flags_of["b"], kill_when=lambda output: re.search(r"iteration +10/", output))
    reached = max(script.iterations(killed))
    assert 10 <= reached < 24
    resumed = script.run(2, demo, *flags_of["b"], "--load", tmp_path / "b")
    expected, actual = script.losses(uninterrupted), script.losses(resumed)
    first, second = sorted(actual)[:2]
    assert 4 < first <= reached + 1 and max(actual) == 24
    # Megatron prints the first iteration of a run twice, alone and in the mean with the second.
    del actual[second]
    assert actual == {i: expected[i] for i in actual}
    expected, actual = (scalars(tmp_path / name, first) for name in "ab")
    assert len(actual["lm loss"]) == 25 - first and actual == expected
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


def scalars(folder, first):
    """Every figure of the loss that TensorBoard has from iteration `first` on; of a resumed run, the later ones."""
    events = EventAccumulator(str(folder)).Reload()
    names = ("lm loss", "rsa loss", "rsa pairs", "rsa dist vision", "rsa dist text", "grad-norm")
    return {name: {e.step: e.value for e in events.Scalars(name) if e.step >= first} for name in names}


def test_a_finished_run_evaluates_as_what_it_is(demo, tmp_path):
    flags = (
        "--train-iters",
        3,
        "--save",
        tmp_path,
        "--load",
        tmp_path,
        "--save-interval",
        3,
        "--eval-iters",
        1,
        "--mutual-knn-samples",
        32,
    )
    first, again = (script.run(1, demo, *flags)[0] for _ in range(2))
    assert script.iterations([first]) and not re.search(r"iteration +\d+/", again)
    assert re.findall(r"mutual-knn@10 at iteration (\d+) .*value: ([\d.]+)", again) == re.findall(
        r"mutual-knn@10 at iteration (\d+) .*value: ([\d.]+)", first
    )
    assert "at iteration 3 | mutual-knn" in again


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


@pytest.fixture(scope="module")
def stopped_at_2(demo, tmp_path_factory):
    """A run of two ranks that stopped after two of six iterations."""
    folder = tmp_path_factory.mktemp("stopped")
    script.run(2, demo, "--exit-interval", 2, "--save", folder, "--save-interval", 2)
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
        script.run(world_size, demo, "--load", stopped_at_2, *change)
    assert message in str(failed.value) and "--restart-data" in str(failed.value)
    resumed = script.run(world_size, demo, "--load", stopped_at_2, *change, "--restart-data")
    assert list(script.iterations(resumed)) == [3, 4, 5, 6]


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
