"""Packed rows in the planner: their time by hand, who waits for whom, and what packing is worth."""

import math

import pytest

from rsa_megatron.models.architectures import ARCHITECTURES
from rsa_megatron.planning.flops import training_flops
from rsa_megatron.planning.parallel_layout import Layout, Run
from rsa_megatron.planning.rows import Row, Rows
from rsa_megatron.planning.step_time import Assumptions, step_time

ALL = ("vision", "projector", "embeddings", "language")
MODEL = ARCHITECTURES["llava-ov-7b"]


def run(row_length: int, *, packs: bool) -> Run:
    return Run(MODEL, ALL, row_length, num_tiles=37, packs=packs)


def seconds(run: Run, layout: Layout, rows: Rows) -> float:
    return step_time(run, layout, Assumptions(1000, 0.5, math.inf, math.inf, rows))


def seconds_of(lengths, num_tiles: int) -> float:
    """Of sequences that attend to themselves alone, on one GPU."""
    sizes = dict(num_positions=sum(lengths), squared_lengths=sum(length**2 for length in lengths))
    flops = training_flops(MODEL, ALL, num_tiles=num_tiles, num_image_tokens=729 * num_tiles, **sizes)
    return sum(flops.values()) / (1000e12 * 0.5)


def test_a_packed_row_takes_the_time_of_its_samples_and_under_pp_of_its_padding():
    rows, packed = Rows([Row.of_samples([3000, 2000, 1000], [4, 3, 0])]), run(8192, packs=True)
    assert seconds(packed, Layout(), rows) == pytest.approx(seconds_of([3000, 2000, 1000], 7), rel=1e-9)
    padded = seconds_of([3000, 2000, 1000, 2192], 7)
    # Of two stages the slower: twice the half of the layers, and the output layer or the tower.
    steps = [seconds(packed, Layout(pipeline=2, num_micro_batches=m), rows) for m in (1, 1001)]
    turn = (steps[1] - steps[0]) / 1000
    assert padded / 2 < turn < 0.7 * padded
    unpacked = seconds(run(8192, packs=False), Layout(pipeline=2, num_micro_batches=1001), rows)
    assert unpacked > steps[1]  # one sequence of 8192: its attention is more


def test_a_step_waits_for_the_rank_that_has_most_to_do():
    """Rows of two lengths, as often: the larger of n draws is the long one unless all are short, 1 - 2^-n."""
    short, long = 1000, 9000
    rows, unpacked = Rows([Row.of_samples([length], [0]) for length in (short, long)]), run(9000, packs=False)
    for num_ranks in (1, 2, 4):
        found = seconds(unpacked, Layout(data=num_ranks), rows)
        none_long = 0.5**num_ranks
        expected = none_long * seconds_of([short], 0) + (1 - none_long) * seconds_of([long], 0)
        assert found == pytest.approx(expected, rel=0.03)  # 1000 to 4000 steps are drawn
    # The rows of a micro-batch are padded to its longest: of two, both are long in 3 of 4.
    expected = 2 * (0.25 * seconds_of([short], 0) + 0.75 * seconds_of([long], 0))
    assert seconds(unpacked, Layout(micro_batch_size=2), rows) == pytest.approx(expected, rel=0.03)
    # Over many micro-batches it evens out; under pipeline parallelism all rows are as long.
    even = seconds(unpacked, Layout(data=4, num_micro_batches=256), rows) / 256
    assert even == pytest.approx((seconds_of([short], 0) + seconds_of([long], 0)) / 2, rel=0.1)


@pytest.mark.parametrize(
    "row_length, fill, length, tiles, expected", [(8192, 0.958, 2750, 4, 2.95), (16384, 0.997, 3446, 6, 5.23)]
)
def test_under_pp_packing_is_worth_what_counting_operations_gives(row_length, fill, length, tiles, expected):
    """The same mean lengths and fills: 2.95 and 5.23 times, counted sample by sample (there the attention of long samples is more)."""
    num_samples, layout = fill * row_length / length, Layout(pipeline=4, num_micro_batches=1000)
    alone = seconds(run(row_length, packs=False), layout, Rows([Row.of_mean_samples(1, length, tiles)]))
    packed = seconds(run(row_length, packs=True), layout, Rows([Row.of_mean_samples(num_samples, length, tiles)]))
    assert alone / (packed / num_samples) == pytest.approx(expected, rel=0.04)
