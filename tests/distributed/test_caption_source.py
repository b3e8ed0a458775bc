"""--rsa-text-source caption: captions read alone, by a mask and as packed sequences, are the same in every layout."""

import pytest

from tests.support import packed_attention, processes
from tests.support.equation_6 import FIRST_TILES, with_and_by_plain_autograd
from tests.support.layouts import LAYOUTS, layout_of
from tests.support.parity import (
    CAPTION,
    RECOMPUTE,
    TOLERANCE,
    of_every_kind,
)

RECOMPUTED = (*CAPTION, *RECOMPUTE)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_captions_read_alone_in_every_layout(parity, layout):
    """Captions, grids of tiles, a text and an empty row in one micro-batch, its rows computed again in backward."""
    differences = parity.differences((layout, 2, True, False), options=RECOMPUTED, batches_of=of_every_kind)
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize("name", ["DP=2 PP=2", "TP=2 SP"])
def test_captions_read_alone_without_recomputation(parity, name):
    differences = parity.differences((layout_of(name), 2, True, False), options=CAPTION)
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize(
    "name, options",
    [
        ("DP=2", CAPTION),
        ("DP=2", RECOMPUTED),
        ("TP=2 PP=2", RECOMPUTED),
        ("PP=2 VPP=2", CAPTION),
    ],
    ids=["DP=2", "DP=2, recomputed", "TP=2 PP=2, recomputed", "PP=2 VPP=2"],
)
def test_packed_sequences_in_the_place_of_a_mask_are_the_same(parity, name, options):
    differences = parity.differences((layout_of(name), 2, True, False), packed_attention.use, options, of_every_kind)
    assert max(differences.values()) < TOLERANCE, differences


def test_packed_sequences_need_whole_rows(parity):
    with pytest.raises(
        processes.Failed, match="--sequence-parallel: each rank has a part of every row.*--micro-batch-size 1"
    ):
        parity.run((layout_of("TP=2 SP"), 1, False, False), packed_attention.use, CAPTION)


def payload_without_starts():
    from rsa_megatron.hooks import pipeline_payload

    right = pipeline_payload.pack

    def pack(payload, *args, **options):
        return right(payload._replace(start_B=0 * payload.start_B), *args, **options)

    pipeline_payload.pack = pack


@pytest.mark.parametrize("name", ["PP=2", "PP=2 VPP=2"])
def test_stages_that_do_not_know_where_the_copies_begin_would_be_seen(parity, name):
    differences = parity.differences((layout_of(name), 2, True, False), payload_without_starts, CAPTION)
    assert differences["gradients"] > 1000 * TOLERANCE


def copies_that_see_their_row():
    from rsa_megatron.hooks import isolated_captions

    right = isolated_captions.segment_mask
    isolated_captions.segment_mask = lambda start_B, length: right(0 * start_B, length)


def test_copies_that_saw_their_row_would_be_seen(parity, demo):
    actual, expected = with_and_by_plain_autograd(parity, demo, CAPTION, FIRST_TILES, "", copies_that_see_their_row)
    assert actual.losses[0]["lm loss"] == pytest.approx(expected["lm loss"], rel=1e-5)
    assert abs(actual.losses[0]["rsa loss"] / expected["rsa loss"] - 1) > 1e-2
