"""Packed rows train as a row a sample does: figures, every gradient and the next parameters, in every layout.

Without the bounds of its samples a row trains on with a loss that hardly moves: the mistakes are seen by gradients.
"""

import pytest

from tests.support import packed_parity, processes
from tests.support.layouts import SINGLE, layout_of
from tests.support.packed_batches import as_packed_row
from tests.support.packed_parity import CASES, CP, CP_CASES, PP4, PackedParity
from tests.support.parity import TOLERANCE


@pytest.fixture(scope="module")
def packed(parity) -> PackedParity:
    return PackedParity(parity)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].name}, M={case[1]}")
def test_a_packed_row_equals_a_row_a_sample(packed, case):
    layout, num_micro_batches, flags = case
    rsa_weight = 0.0 if layout.name in ("PP=4", "PP=2 VPP=2") else 0.3  # bounds with v behind them, and without
    differences = packed.differences(layout, num_micro_batches, *flags, rsa_weight=rsa_weight)
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize("case", CP_CASES, ids=lambda case: f"{case[0].name}, M={case[1]}")
def test_context_parallel_ranks_share_each_sequence(packed, case):
    differences = packed.differences(*case, rsa_weight=0.3, sabotage=packed_parity.use_context_parallelism)
    assert max(differences.values()) < TOLERANCE, differences


def test_it_does_not_matter_how_samples_are_grouped(packed):
    """Eight samples alone, in two rows of four, and in one, by tokens."""
    (step,) = packed_parity.samples(4)[:1]
    eight = [one for micro_batch in step for row in micro_batch for one in row][:8]
    runs = [
        packed.train(
            SINGLE,
            [[[as_packed_row(eight[first : first + size])] for first in range(0, 8, size)]],
            "--rsa-weight",
            "0",
        )
        for size in (1, 4, 8)
    ]
    for run in runs[1:]:
        differences = packed_parity.differences(run, runs[0])
        assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize(
    "layout, mistake, last_tokens",
    [
        (SINGLE, packed_parity.no_bounds, 1),
        (PP4, packed_parity.no_bounds_on_the_way, 1),
        (SINGLE, None, 0),
        (CP, packed_parity.row_divided_as_one_sequence, 1),
    ],
    ids=["no bounds", "no bounds on the stages on the way", "the last token left out", "a row divided as one sequence"],
)
def test_a_mistake_would_be_seen(packed, layout, mistake, last_tokens):
    differences = packed.differences(layout, 1, sabotage=mistake, last_tokens=last_tokens)
    assert differences["gradients"] > 1000 * TOLERANCE


def test_stages_that_read_other_rows_stop_the_run(packed):
    with pytest.raises(processes.Failed, match="first and the last pipeline stage read different rows: sequences of "):
        packed.differences(layout_of("PP=2"), 1, sabotage=packed_parity.first_stage_reads_other_rows)


@pytest.mark.parametrize(
    "layout, flags, options, said",
    [
        (SINGLE, ("--seq-length", "48"), {}, "sequences have 86 positions, and the row only 48"),
        (layout_of("PP=2"), (), dict(sabotage=packed_parity.packs_no_rows), "the stages on the way must know of it"),
        (
            CP,
            (),
            dict(sabotage=packed_parity.use_context_parallelism, multiple=1),
            "under --context-parallel-size 2 each sequence of a packed row, and its padding, is to be a multiple of 4 positions",
        ),
    ],
    ids=["a row that is too long", "a pipeline that knows of no packed rows", "sequences that ranks cannot share"],
)
def test_what_cannot_be_packed_is_refused(packed, layout, flags, options, said):
    with pytest.raises(processes.Failed, match=said):
        packed.differences(layout, 1, *flags, **options)
