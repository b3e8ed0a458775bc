"""Each part moves at its own rate in every layout, and what is frozen does not move at all."""

import re

import pytest

from tests.support import layouts, processes, script

FLAGS = (
    "--optimizer",
    "adam",
    "--trainable",
    "vision",
    "projector",
    "language",
    "--seq-length",
    "32",
    "--lr",
    "1e-3",
    "--min-lr",
    "0",
    "--vision-lr",
    "4e-3",
    "--projector-lr",
    "2.5e-4",
    "--lr-decay-style",
    "constant",
)
RATES = {"vision": 4e-3, "projector": 2.5e-4, "language": 1e-3, "embeddings": 0.0}
LAYOUTS = {
    "one process": (1, ()),
    "DP=2, distributed optimizer": (2, ("--use-distributed-optimizer",)),
    "TP=2": (2, ("--tensor-model-parallel-size", "2")),
    "PP=2": (2, ("--pipeline-model-parallel-size", "2")),
    "PP=2, distributed optimizer": (2, ("--pipeline-model-parallel-size", "2", "--use-distributed-optimizer")),
}


def movements(argv, sabotage=None) -> dict[str, set]:
    """{part: (smallest, largest) movement of each parameter of this rank} in one step of a gradient of ones."""
    from megatron.core.utils import get_attr_wrapped_model

    from rsa_megatron.models.llava_onevision import get_part

    trainer = layouts.Trainer(argv, sabotage)
    parameters = [
        (get_part(name, parameter), parameter)
        for chunk in trainer.model
        for name, parameter in get_attr_wrapped_model(
            chunk, "image_token_index", return_model_obj=True
        ).named_parameters()
    ]
    before = [parameter.detach().clone() for _, parameter in parameters]
    for chunk in trainer.model:
        for buffer in chunk.buffers:
            buffer.grad_data.fill_(1)
    trainer.optimizer.step()
    moved = {}
    for (part, parameter), old in zip(parameters, before):
        distance = (old - parameter.detach()).abs()
        moved.setdefault(part, set()).add((distance.min().item(), distance.max().item()))
    return moved


def run(demo, layout, *flags, sabotage=None):
    world_size, options = LAYOUTS[layout]
    data = ("--data-path", str(demo / "data" / "captions"), "--tokenizer-model", str(demo / "tokenizer"))
    argv = [*data, *FLAGS, "--global-batch-size", "8", *options, *map(str, flags)]
    found = {}
    for rank in processes.run(movements, world_size, argv, sabotage):
        for part, distances in rank.items():
            found.setdefault(part, set()).update(distances)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_moves_each_part_by_its_rate(demo, layout):
    found = run(demo, layout)
    assert set(found) == set(RATES)
    for part, rate in RATES.items():
        # Adam's first step with a gradient of 1 is rate / (1 + eps), eps being 0.01 here; parameters of up to 1 are
        # rounded to 6e-8, which of the smallest step is 2e-4.
        for smallest, largest in found[part]:
            assert smallest == pytest.approx(rate / 1.01, rel=1e-3) and largest == pytest.approx(rate / 1.01, rel=1e-3)


def test_a_rate_of_zero_moves_nothing(demo):
    found = run(demo, "one process", "--vision-lr", 0)
    assert found["vision"] == found["embeddings"] == {(0.0, 0.0)} and (0.0, 0.0) not in found["projector"]


def rates_not_applied():
    from rsa_megatron.training import learning_rates

    learning_rates.LearningRates.apply = lambda self: None


def test_without_its_groups_all_would_move_alike(demo):
    found = run(demo, "one process", sabotage=rates_not_applied)
    assert {round(largest, 5) for distances in found.values() for _, largest in distances} == {
        0.0,
        round(1e-3 / 1.01, 5),
    }


def test_rates_stand_in_the_table_and_in_the_log_as_they_decay(demo):
    flags = (
        "--lr",
        "1e-3",
        "--min-lr",
        "1e-4",
        "--vision-lr",
        "4e-3",
        "--lr-decay-style",
        "cosine",
        "--lr-warmup-fraction",
        0.25,
    )
    outputs = script.run(2, demo, "--train-iters", 8, *flags, "--trainable", "vision", "projector", "language")
    (table,) = [output for output in outputs if "peak learning rate" in output]  # once, not on each rank
    rows = dict(re.findall(r"^(vision|projector|embeddings|language) +[\d,]+  (\S+) ", table, re.M))
    assert rows == {"vision": "0.004", "projector": "0.001", "embeddings": "frozen", "language": "0.001"}
    warmup = "warm-up of 2 iterations: the rates begin at 0, and iteration 1 changes no weight"
    assert sum(warmup in output for output in outputs) == 1
    figures = script.iterations(outputs)
    assert float(figures[1]["vision lr"]) == 0
    # Megatron prints the rate of the step to come, ours is that of the step taken; its second line is the mean of two.
    for iteration in range(3, 9):
        previous = float(figures[iteration - 1]["learning rate"])
        assert float(figures[iteration]["projector lr"]) == pytest.approx(previous, rel=1e-5)
        assert float(figures[iteration]["vision lr"]) == pytest.approx(4 * previous, rel=1e-5)
    assert len({line["vision lr"] for line in figures.values()}) == 8


def test_rates_are_resumed(demo, tmp_path):
    flags = (
        "--train-iters",
        6,
        "--vision-lr",
        "4e-3",
        "--projector-lr",
        "2e-3",
        "--save-interval",
        3,
        "--save",
        tmp_path / "a",
    )
    expected = script.losses(script.run(2, demo, *flags, "--use-distributed-optimizer"))
    flags = (*flags, "--load", tmp_path / "a", "--ckpt-step", 3)
    actual = script.losses(script.run(2, demo, *flags, "--use-distributed-optimizer"))
    # The second line of a run is the mean of its first two.
    assert list(actual) == [4, 5, 6] and (actual[4], actual[6]) == (expected[4], expected[6])
