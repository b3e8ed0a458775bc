"""The time of a step: what each assumption and each axis of the layout does to it, on cases that can be done by hand."""

import math
from dataclasses import replace

import pytest

from rsa_megatron.models.architectures import ARCHITECTURES
from rsa_megatron.planning.flops import training_flops
from rsa_megatron.planning.parallel_layout import Layout, Run
from rsa_megatron.planning.rows import Row, Rows
from rsa_megatron.planning.step_time import Assumptions, step_time

ALL = ("vision", "projector", "embeddings", "language")
RUN = Run(ARCHITECTURES["llava-ov-7b"], ALL, row_length=8192, num_tiles=5)
# Bandwidths without end leave arithmetic alone.
ASSUMED = Assumptions(1000, 0.5, math.inf, math.inf, Rows([Row.of_mean_samples(1, 8192, 4)]))
SECONDS_OF_A_SAMPLE = sum(
    training_flops(
        RUN.architecture, ALL, num_tiles=4, num_positions=8192, squared_lengths=8192**2, num_image_tokens=4 * 729
    ).values()
) / (1000e12 * 0.5)


def test_without_communication_it_is_the_operations_at_the_assumed_rate():
    for layout in (
        Layout(micro_batch_size=2, num_micro_batches=8),
        Layout(data=4, micro_batch_size=4, num_micro_batches=4),
    ):
        assert step_time(RUN, layout, ASSUMED) == pytest.approx(16 * SECONDS_OF_A_SAMPLE, rel=1e-9)
    halved = step_time(RUN, Layout(tensor=2, num_micro_batches=16), ASSUMED)
    assert halved == pytest.approx(8 * SECONDS_OF_A_SAMPLE, rel=1e-9)


def test_a_pipeline_has_a_bubble_and_waits_for_its_slowest_stage():
    times = {m: step_time(RUN, Layout(pipeline=4, num_micro_batches=m), ASSUMED) for m in (1, 5, 61)}
    # m + 3 turns of the slowest stage
    assert times[5] / times[1] == pytest.approx(8 / 4) and times[61] / times[1] == pytest.approx(64 / 4)
    # A turn is longer than a quarter of a sample: the first stage has the tower beside its layers.
    assert 0.25 * SECONDS_OF_A_SAMPLE < times[1] / 4 < 0.6 * SECONDS_OF_A_SAMPLE


def test_rows_are_filled_up_under_pipeline_parallelism_alone():
    short = replace(ASSUMED, rows=Rows([Row.of_mean_samples(1, 1000, 4)]))
    assert step_time(RUN, Layout(), short) < 0.3 * step_time(RUN, Layout(), ASSUMED)
    assert step_time(RUN, Layout(pipeline=4), short) == step_time(RUN, Layout(pipeline=4), ASSUMED)


def test_full_recomputation_takes_the_layers_forward_pass_once_more():
    ratio = step_time(RUN, Layout(recompute="full"), ASSUMED) / step_time(RUN, Layout(), ASSUMED)
    assert 1.3 < ratio < 4 / 3  # forward 1, backward 2; the output layer and the projector are not made again


def test_bandwidth_counts_where_something_is_sent():
    slow_network, slow_node = (replace(ASSUMED, **{f"{what}_bandwidth": 10}) for what in ("network", "node"))
    data, tensor = Layout(data=2), Layout(tensor=2)
    # An all-reduce over 2 ranks moves each gradient twice by half: 4 bytes of each of 8.03e9 parameters at 10e9 a second.
    assert step_time(RUN, data, slow_network) - step_time(RUN, data, ASSUMED) == pytest.approx(
        4 * 8.0308 / 10, rel=1e-3
    )
    # The distributed optimizer: each gradient once by half, 4 bytes, and its bf16 parameter back, 2.
    divided = replace(data, distributed_optimizer=True)
    added = step_time(RUN, divided, slow_network) - step_time(RUN, divided, ASSUMED)
    assert added == pytest.approx(3 * 8.0308 / 10, rel=1e-3)
    assert step_time(RUN, tensor, slow_node) > step_time(RUN, tensor, ASSUMED) == step_time(RUN, tensor, slow_network)
    assert step_time(RUN, data, slow_node) == step_time(RUN, data, ASSUMED)
