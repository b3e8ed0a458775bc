"""RSA with packed rows: in every layout the figures and gradients of the same samples as rows of their own in one micro-batch.

v of each sample, and sums of inner text layers, travel behind the one row; where samples begin the stages tell one another.
"""

import functools

import pytest

from tests.support import layouts
from tests.support.layouts import PP, SINGLE, TP, VPP, Layout
from tests.support.packed_batches import as_packed_row, as_rows, sample, use_packed_rows
from tests.support.parity import CAPTION, LAYERS, RECOMPUTE, TOLERANCE, WHOLE, flags

PP4 = ("--pipeline-model-parallel-size", "4")
DP2 = Layout("DP=2", 2, 2)
DP2_PP2 = Layout("DP=2 PP=2", 4, 2, PP)
# Rows of the packed runs have room for both ranks' samples, and for their captions once more.
LENGTH = ("--seq-length", "128", "--calculate-per-token-loss")


@functools.cache
def samples(iteration: int, micro_batch: int) -> list[list]:
    """A micro-batch's samples on each of two ranks: as many as it happens, of the second micro-batch's none on the second that takes part."""
    seed = 1000 * iteration + 100 * micro_batch
    first = [
        sample(seed, 11, images=(1,), eligible=True),
        sample(seed + 1, 6),
        sample(seed + 2, 9, images=(2,), text_first=1, eligible=True),
        sample(seed + 3, 8, images=(1, 1)),
    ]
    second = [sample(seed + 4, 10, images=(1,), eligible=True), sample(seed + 5, 7, images=(1,), eligible=True)]
    return [first, second] if micro_batch == 0 else [[*first[:1], *second, first[2]], [first[3], first[1]]]


def batches(num_ranks: int, *, packed: bool, with_copies: bool = False) -> list[list]:
    """Two iterations of two micro-batches, each a list of what the ranks read; of all their samples where one rank has them.

    The first's are packed; the second's are rows of a sample, in the same model.
    """
    ranks_of = [[samples(iteration, micro_batch) for micro_batch in range(2)] for iteration in range(2)]
    if not packed:
        return [[[as_rows(sum(ranks, []))] for ranks in of_step] for of_step in ranks_of]
    first = [ranks if num_ranks == 2 else [sum(ranks, [])] for ranks in ranks_of[0]]
    # (Rows of a sample: as many on either rank.)
    second = [sum(ranks, []) for ranks in ranks_of[1]]
    second = [[whole[:3], whole[3:]] if num_ranks == 2 else [whole] for whole in second]
    return [
        [[as_packed_row(row, with_copies=with_copies) for row in rows] for rows in first],
        [[as_rows(row) for row in rows] for rows in second],
    ]


def run(parity, layout, options=(), sabotage=None, with_copies=False, packed=True) -> layouts.Run:
    size = layout.data_parallel_size
    argv = [*flags(parity.demo, 2, True, False, size, parity.folder), *LENGTH, *options]
    argv += ["--micro-batch-size", "1", "--global-batch-size", str(2 * size)]
    made = batches(size, packed=packed, with_copies=with_copies)
    return layouts.run(layout, made, argv, load=parity.initial, sabotage=sabotage or use_packed_rows)


_references = {}


def compare(parity, layout, options=(), sabotage=None, with_copies=False) -> dict[str, float]:
    """Largest relative differences of a packed run in a layout from rows of a sample on one process."""
    if options not in _references:
        _references[options] = run(parity, SINGLE, options, packed=False)
    expected = _references[options]
    actual = run(parity, layout, options, sabotage, with_copies)
    assert expected.losses[0]["rsa loss"] > 0.01
    found = {
        name: max(abs(a[name] / e[name] - 1) for a, e in zip(actual.losses, expected.losses))
        for name in expected.losses[0]
        if name == "lm loss" or (name.startswith("rsa ") and name != "rsa extra positions")
    }
    found["gradients"], _ = layouts.largest_difference(actual.gradients, expected.gradients)
    found["parameters"], _ = layouts.largest_difference(actual.parameters, expected.parameters)
    return found


NORMALIZED = ("--rsa-normalize", "mean-distance", "--rsa-stop-gradient", "text")


@pytest.mark.parametrize(
    "layout, options",
    [
        (SINGLE, ()),
        (DP2, NORMALIZED),
        (Layout("PP=2", 2, 1, PP), RECOMPUTE),
        (Layout("PP=4", 4, 1, PP4), LAYERS),
        (Layout("TP=2 SP PP=2", 4, 1, (*TP, "--sequence-parallel", *PP)), LAYERS),
        (DP2_PP2, WHOLE),
        (Layout("PP=2 VPP=2", 2, 1, VPP), ()),
    ],
    ids=lambda value: getattr(value, "name", " ".join(value) if isinstance(value, tuple) else None),
)
def test_packed_rows_are_rows_of_a_sample(parity, layout, options):
    differences = compare(parity, layout, options)
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize(
    "layout, options",
    [
        (DP2, CAPTION),
        (Layout("PP=2 VPP=2", 2, 1, VPP), (*LAYERS, *CAPTION)),
    ],
    ids=lambda value: getattr(value, "name", " ".join(value) if isinstance(value, tuple) else None),
)
def test_copies_in_packed_rows_are_captions_read_alone(parity, layout, options):
    """In the row as sequences of their own, against a mask of segments over copies at the end of each row."""
    differences = compare(parity, layout, options, with_copies=True)
    assert max(differences.values()) < TOLERANCE, differences
