"""RSA with packed rows: in every layout the figures and gradients of the same samples as rows of their own in one micro-batch.

v of each sample, and sums of inner text layers, travel behind the one row; where samples begin the stages tell one another.
"""

import functools

import pytest

from tests.support import layouts, packed_parity, processes, tiny
from tests.support.layouts import PP, SINGLE, TP, Layout, layout_of
from tests.support.packed_batches import as_packed_row, as_rows, sample, use_packed_rows
from tests.support.packed_parity import PP4
from tests.support.parity import CAPTION, LAYERS, TOLERANCE, WHOLE, flags

TP2_SP_PP2 = Layout("TP=2 SP PP=2", 4, 1, (*TP, "--sequence-parallel", *PP))
DP2, PP2, PP2_VPP2, DP2_PP2 = map(layout_of, ("DP=2", "PP=2", "PP=2 VPP=2", "DP=2 PP=2"))
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


def run(parity, layout, options=(), sabotage=use_packed_rows, packed=True) -> layouts.Run:
    size = layout.data_parallel_size
    argv = [*flags(parity.demo, 2, True, False, size, parity.folder), *LENGTH, *options]
    argv += ["--micro-batch-size", "1", "--global-batch-size", str(2 * size)]
    made = batches(size, packed=packed, with_copies="caption" in options)
    return layouts.run(layout, made, argv, load=parity.initial, sabotage=sabotage)


_references = {}


def differences(parity, actual: layouts.Run, options) -> dict[str, float]:
    """Largest relative differences of a packed run from rows of a sample on one process."""
    if options not in _references:
        _references[options] = run(parity, SINGLE, options, packed=False)
    expected = _references[options]
    assert expected.losses[0]["rsa loss"] > 0.01
    # (What copies add depends on how far rows are filled up.)
    return {n: d for n, d in packed_parity.differences(actual, expected).items() if n != "rsa extra positions"}


NORMALIZED = ("--rsa-normalize", "mean-distance", "--rsa-stop-gradient", "text")


@pytest.mark.parametrize(
    "layout, options",
    [
        (DP2, NORMALIZED),
        (DP2_PP2, WHOLE),
        (PP4, LAYERS),
        (TP2_SP_PP2, LAYERS),
        (PP2_VPP2, (*LAYERS, *CAPTION)),
    ],
    ids=lambda value: getattr(value, "name", " ".join(value) if isinstance(value, tuple) else None),
)
def test_packed_rows_are_rows_of_a_sample(parity, layout, options):
    """And in its second iteration rows of a sample are what they are without packing. (The default settings: test_packed_rows.py.)"""
    found = differences(parity, run(parity, layout, options), options)
    assert max(found.values()) < TOLERANCE, found


def test_copies_in_the_row_are_captions_read_alone(parity):
    """As sequences of the row, against a mask of segments over copies at the end of rows of a sample."""
    actual = run(parity, DP2, CAPTION)
    found = differences(parity, actual, CAPTION)
    assert max(found.values()) < TOLERANCE, found
    rows = sum(batches(2, packed=True, with_copies=True)[0], [])
    copied = sum(int((row.rsa.caption_mask > 0).sum() + row.rsa.eligible.sum()) for row in rows)
    others = sum(int(row.row_lengths) for row in rows) - copied
    assert actual.losses[0]["rsa extra positions"] == pytest.approx(copied / others, rel=1e-6)


def test_a_row_with_a_copy_at_its_end_is_not_taken_for_a_packed_one(parity):
    """Rows of one sample and packed rows of one, by turns: what stages on the way receive may be as long."""
    options = (*CAPTION, *WHOLE)
    ones = [[sample(10 * i + m, 11 + m, images=(1,), eligible=True)] for i in range(2) for m in range(4)]
    rows = [[as_rows(one)] for one in ones]
    by_turns = [
        [as_packed_row(one, with_copies=True)] if number % 2 else rows[number] for number, one in enumerate(ones)
    ]
    argv = [*flags(parity.demo, 4, True, False, 1, None), *LENGTH, *options]
    argv += ["--micro-batch-size", "1", "--global-batch-size", "4"]
    expected, actual = (
        layouts.run(layout, [made[:4], made[4:]], argv, load=parity.initial, sabotage=use_packed_rows)
        for layout, made in ((SINGLE, rows), (PP2_VPP2, by_turns))
    )
    found = packed_parity.differences(actual, expected)
    found.pop("rsa extra positions")
    assert max(found.values()) < TOLERANCE, found


def vectors_of_other_samples():
    from rsa_megatron.hooks import pipeline_payload

    use_packed_rows()
    right = pipeline_payload.unpack

    def unpack(*args):
        payload = right(*args)
        return payload._replace(vector_BF=payload.vector_BF.roll(1, dims=0))

    pipeline_payload.unpack = unpack


def masks_of_other_samples():
    from rsa_megatron.hooks.transport import Transport

    use_packed_rows()
    right = Transport._own_mask
    Transport._own_mask = lambda self, batch: right(self, batch).roll(1, dims=0)


@pytest.mark.parametrize("sabotage", [vectors_of_other_samples, masks_of_other_samples])
def test_what_came_to_other_samples_would_be_seen(parity, sabotage):
    found = differences(parity, run(parity, PP2, LAYERS, sabotage), LAYERS)
    assert found["gradients"] > 1000 * TOLERANCE and found["lm loss"] < 1e-2


def one_sample_fewer():
    from rsa_megatron.hooks import pipeline_payload

    use_packed_rows()
    right = pipeline_payload.num_packed_samples
    pipeline_payload.num_packed_samples = lambda received: max(right(received) - 1, 0)


def other_samples_on_the_last_stage():
    import pretrain_llava_rsa as script
    from megatron.core import mpu

    use_packed_rows()
    right = script.RSAPlugin

    def of_the_last_stage(batch):
        if mpu.is_pipeline_last_stage():
            batch.rsa.sample_id = batch.rsa.sample_id.flip(0)
        return batch.rsa

    script.RSAPlugin = lambda: right(select=of_the_last_stage)


@pytest.mark.parametrize(
    "sabotage, message",
    [
        (one_sample_fewer, "read different samples .a packed row of 5 against a packed row of 6.: image and caption"),
        (other_samples_on_the_last_stage, "read different samples .ids 0x[0-9a-f]+ against"),
    ],
)
def test_ends_of_a_pipeline_with_other_samples_are_named(parity, sabotage, message):
    with pytest.raises(processes.Failed, match=message):
        run(parity, PP2, sabotage=sabotage)


def test_a_bf16_pipeline_keeps_the_digits_of_each_sample_s_image_vector(parity):
    expected, actual = (run(parity, layout, ("--bf16",)) for layout in (SINGLE, PP4))
    # hi + lo, good to 2^-17; what hi alone loses is seen in test_parity.py.
    assert actual.losses[0]["rsa dist vision"] == pytest.approx(expected.losses[0]["rsa dist vision"], rel=2**-17)
    # Two roundings to bf16's 8 bits. (Seen: the same figures, and gradients off by 2e-3.)
    assert actual.losses[0]["rsa loss"] == pytest.approx(expected.losses[0]["rsa loss"], rel=2**-7)
    assert layouts.largest_difference(actual.gradients, expected.gradients)[0] < 2**-7


def scores(argv, packs_rows: bool):
    """mutual-kNN of eight samples, in a model whose rows may be packed or not."""
    from rsa_megatron.evaluation.online import measure_alignment, read_pairs

    trainer = layouts.Trainer(argv, use_packed_rows if packs_rows else None)
    for chunk in trainer.model:
        chunk.eval()
    reads = [tiny.batch(0), tiny.batch(1)]
    pairs = read_pairs(trainer.model, iter(reads), num_samples=8, micro_batch_size=4)
    sizes = dict(num_samples=8, micro_batch_size=4, seq_length=128)
    result = measure_alignment(trainer.model, pairs, **sizes, k=2, layer_pairs=((-1, -1), (0, 1), (1, 3)))
    return result and {names: score.value for names, score in result[0].items()}


def test_alignment_is_measured_in_a_model_whose_rows_may_be_packed(parity):
    argv = [*flags(parity.demo, 2, True, False, 1, None), *LENGTH, *PP2_VPP2.flags]
    argv += ["--pretrained-checkpoint", str(parity.initial)]
    packs, does_not = (processes.run(scores, 2, argv, packs_rows)[-1] for packs_rows in (True, False))
    assert packs == does_not and len(packs) == 3
