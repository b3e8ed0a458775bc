"""A whole log interval without anything to compare is said once, and only then."""

import pytest
from megatron.core import num_microbatches_calculator

from rsa_megatron.hooks.pair_watch import PairWatch


@pytest.fixture(params=[None, 1, 4], ids=["no calculator", "1 micro-batch", "4 micro-batches"])
def num_micro_batches(request):
    """Of a step; without Megatron's calculator each counts as one."""
    if request.param:
        num_microbatches_calculator.init_num_microbatches_calculator(0, None, request.param, 1, 1)
    yield request.param or 1
    if request.param:
        num_microbatches_calculator.unset_num_microbatches_calculator()


def warnings(watch, pairs_of_steps, num_micro_batches) -> list[int]:
    """The steps at whose end a warning came; of a step's pairs, its last micro-batch has all."""
    found = []
    for step, num_pairs in enumerate(pairs_of_steps, start=1):
        for place in range(num_micro_batches):
            count = num_pairs if place == num_micro_batches - 1 else 0
            if message := watch.add(count, count, 0.01):
                assert place == num_micro_batches - 1
                found.append((step, message))
    return found


def test_a_warning_comes_once_an_interval(num_micro_batches):
    found = warnings(PairWatch(3), [0] * 8, num_micro_batches)
    assert [step for step, _ in found] == [3, 6]
    start = "WARNING: RSA is on (--rsa-weight 0.01), but in the last 3 iterations there was no pair: look for samples"
    assert all(message.startswith(start) and "\n" not in message for _, message in found)


def test_a_pair_starts_the_interval_anew(num_micro_batches):
    steps = [step for step, _ in warnings(PairWatch(3), [0, 0, 2, 0, 0, 8, 0, 0, 0, 2], num_micro_batches)]
    assert steps == [9]


def test_pairs_that_stand_alone_are_another_fault(num_micro_batches):
    ((step, message),) = warnings(PairWatch(3), [1, 0, 1], num_micro_batches)
    assert step == 3 and "no pair had another to be compared with: raise --micro-batch-size" in message


def test_with_pairs_of_earlier_micro_batches_one_is_enough():
    watch = PairWatch(1)
    assert watch.add(1, 2, 0.01) is None and watch.add(1, 1, 0.01) is not None
