"""A packed row is its samples' own sequences, one after the other; what cannot be used leaves a hole, is named and counted."""

import functools
import json
import logging
import random

import pytest
import torch
from megatron.energon import SkipSample
from megatron.energon.errors import FatalSampleError

from rsa_megatron.data.packed_task_encoder import PackingTaskEncoder
from rsa_megatron.data.sample_encoder import sample_id
from rsa_megatron.data.stored_parts import StoredSample
from rsa_megatron.data.task_encoder import LlavaTaskEncoder
from tests.support import broken_data

TILE = 28
SETTINGS = dict(
    image_size=TILE,
    patch_size=14,
    template="qwen_1_5",
    image_aspect_ratio="anyres",
    grid_pinpoints=[(28, 56), (56, 28), (56, 56), (84, 84)],
    max_tiles=2,
)
ROW = 700


picture = functools.cache(broken_data.picture)


def make_encoder(tokenizer, row_length=ROW, **more):
    return PackingTaskEncoder(
        tokenizer, max_sequence_length=row_length, row_length=row_length, **SETTINGS | dict(max_tiles_per_row=75) | more
    )


def stored(key="a", answer="A red boat.", images=1, rsa=True, **more):
    names = ["png"] if images == 1 else [f"{number}.png" for number in range(images)]
    parts = {name: picture(30 + 7 * number) for number, name in enumerate(names)}
    turns = [{"from": "human", "value": "<image>\n" * images + "Tell me."}, {"from": "gpt", "value": answer}]
    fields = dict(images=parts, record=json.dumps({"conversations": turns}).encode())
    return StoredSample(__key__=key, __restore_key__=(), __subflavors__={"rsa": rsa}, **fields | more)


def draw(seed, count=40):
    rng = random.Random(seed)
    return [
        stored(f"{seed}-{number}", "boat " * rng.randint(1, 120), rng.choice([0, 1, 1, 1, 3]), rng.random() < 0.7)
        for number in range(count)
    ]


def rows_of(encoder, samples):
    """As Energon calls an encoder for a full buffer."""
    rows = []
    for row in encoder.select_samples_to_pack([encoder.preencode_sample(sample) for sample in samples]):
        encoded = []
        for sample in row:
            try:
                encoded.append(encoder.postencode_sample(sample))
            except SkipSample:
                pass
        rows.append(encoder.batch([encoder.pack_selected_samples(encoded)]))
    return rows


def check_row(row, alone, tokenizer, copies=False):
    """That each sequence of a row is the sample's own batch, by key, and its last token; return how many copies there are."""
    pad, image_token = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<image>")
    assert row.tokens.shape == row.labels.shape == row.loss_mask.shape == row.rsa.caption_mask.shape
    assert row.row_lengths.tolist() == [row.sequence_lengths.sum()] and row.row_lengths <= ROW
    assert row.rsa.captions_are_copies == copies
    place = tile = image = num_copies = 0
    lengths = iter(row.sequence_lengths.tolist())

    def take(count):
        nonlocal place
        place += count
        return [
            each[0, place - count : place] for each in (row.tokens, row.labels, row.loss_mask, row.rsa.caption_mask)
        ]

    for number, key in enumerate(row.keys, 1):
        own = alone[key]
        tokens, labels, loss_mask, marks = take(own.tokens.shape[1] + 1)
        assert torch.equal(tokens[:-1], own.tokens[0]) and torch.equal(labels[:-1], own.labels[0])
        assert tokens[-1] == own.labels[0, -1] and labels[-1] == pad
        assert torch.equal(loss_mask[:-1], own.loss_mask[0]) and not loss_mask[-1]
        assert next(lengths) == own.row_lengths.item() + 1
        eligible = own.rsa.eligible.item()
        copied = copies and eligible
        own_marks = own.rsa.caption_mask[0]
        assert (
            marks[:-1].tolist() == ([0] * len(own_marks) if copied else (number * own_marks).tolist()) and not marks[-1]
        )
        if copied:
            caption = own.tokens[0][own_marks > 0].tolist()
            tokens, labels, loss_mask, marks = (each.tolist() for each in take(len(caption) + 1))
            assert tokens == [*caption, pad] and set(labels) == {pad} and not any(loss_mask)
            assert marks == [number] * len(caption) + [0] and next(lengths) == len(tokens)
            num_copies += 1
        num_tiles = own.rsa.num_tiles.item()
        assert row.rsa.num_tiles[number - 1] == num_tiles and row.rsa.eligible[number - 1] == eligible
        assert torch.equal(row.images[tile : tile + num_tiles], own.images)
        num_images = len(own.image_layouts)
        assert torch.equal(row.image_layouts[image : image + num_images], own.image_layouts)
        assert num_images == (own.tokens == image_token).sum()
        tile, image = tile + num_tiles, image + num_images
        assert row.rsa.sample_id[number - 1] == sample_id(key) and row.records[number - 1] == own.records[0]
    assert place == row.tokens.shape[1] and tile == len(row.images) and next(lengths, None) is None
    return num_copies


@pytest.mark.parametrize("copies", [False, True])
def test_a_row_holds_its_samples_own_sequences(tokenizer, copies):
    encoder = make_encoder(tokenizer, copies_captions=copies)
    num_copies = 0
    for seed in range(3):
        samples = draw(seed)
        # Long enough that none is truncated here; the packed row's limits are tested below.
        single = LlavaTaskEncoder(tokenizer, max_sequence_length=ROW, **SETTINGS)
        alone = {sample.__key__: single.batch([single.encode_sample(sample)]) for sample in samples}
        rows = rows_of(encoder, samples)
        assert sorted(key for row in rows for key in row.keys) == sorted(alone)
        num_copies += sum(check_row(row, alone, tokenizer, copies) for row in rows)
        assert sum(row.num_samples for row in rows) == 40 > 2 * len(rows)
        assert all(len(row.images) <= encoder.max_tiles_per_row for row in rows)
    assert (num_copies > 20) == copies


def test_the_longest_sample_fills_its_row_and_one_token_more_is_cut(tokenizer):
    def read(words, **settings):
        return make_encoder(tokenizer, 120, **settings).preencode_sample(stored(answer="boat " * words))

    for copies in (False, True):
        read_samples = [read(words, copies_captions=copies) for words in range(1, 150)]
        lengths = [sample.length + sample.copy_length for sample in read_samples]
        cut = [sample.is_truncated for sample in read_samples]
        assert max(lengths) <= 120 and lengths == sorted(lengths) and cut == sorted(cut)
        longest = lengths[cut.index(True) - 1]
        # A token more of the caption is one in the copy, too: then a position may stay free.
        assert 120 - longest < (3 if copies else 2) and 119 <= lengths[-1] and any(cut)
        assert (read_samples[-1].copy_length > 0) == copies
    # The row of the sample alone holds its last token as a label, so it has room for one more.
    assert len(read(149).text.tokens) == len(
        LlavaTaskEncoder(tokenizer, max_sequence_length=119, **SETTINGS)
        .encode_sample(stored(answer="boat " * 149))
        .text.tokens
    )


def test_what_cannot_be_used_leaves_a_hole_and_is_named_and_counted(tokenizer, caplog):
    encoder = make_encoder(tokenizer, 300)
    damaged = picture()[:-300]
    samples = [
        stored("good"),
        stored("no-answer", answer=""),
        stored("damaged", images=1),
        stored("also-good", images=0),
        stored("no-json", record=None),
        stored("too-many-images", images=60),
    ]
    samples[2].images["png"] = damaged
    (row,) = rows_of(encoder, samples)
    assert row.keys == ["good", "also-good"] and row.num_skipped == 4 and len(row.sequence_lengths) == 2
    lines = [record.message for record in caplog.records]
    for key, reason in (
        ("no-answer", "the caption is empty"),
        ("damaged", "png: "),
        ("no-json", "it has no .json"),
        ("too-many-images", "do not fit --seq-length 300"),
    ):
        (line,) = [line for line in lines if line.startswith(f"skipped sample {key}")]
        assert reason in line
    assert [row.num_skipped for row in rows_of(encoder, [stored("b")])] == [0]


def test_a_row_and_a_buffer_of_nothing_are_padding(tokenizer, caplog):
    encoder = make_encoder(tokenizer)
    (row,) = rows_of(encoder, [stored("bad", answer="")])
    assert row.keys == [""] and row.num_samples == 0 and row.num_skipped == 1
    # Ranks go through packed rows by other collectives than through others.
    assert row.sequence_lengths.tolist() == [1]
    assert not row.loss_mask.any() and row.row_lengths.tolist() == row.rsa.eligible.tolist() == [0]
    assert row.tokens.shape == (1, 1) and row.images.shape == (0, 3, TILE, TILE)
    assert encoder.batch([]).num_skipped == 0 and encoder.select_samples_to_pack([]) == [[]]


@pytest.mark.parametrize("copies", [False, True])
def test_sequences_are_filled_up_for_the_ranks_that_share_them(tokenizer, copies):
    plain, filled = (make_encoder(tokenizer, copies_captions=copies, multiple_of=size) for size in (1, 8))
    num_filled = 0
    for sample in draw(7, 20):
        (alone,), (row,) = rows_of(plain, [sample]), rows_of(filled, [sample])
        num_sequences = len(row.sequence_lengths)
        assert (row.sequence_lengths % 8 == 0).all() and num_sequences == len(alone.sequence_lengths)
        assert (row.sequence_lengths - alone.sequence_lengths < 8).all()
        num_filled += int((row.sequence_lengths > alone.sequence_lengths).sum())
        assert row.row_lengths.tolist() == [row.sequence_lengths.sum()]
        for name in ("loss_mask", "labels", "tokens"):
            own, others = (getattr(of, name)[0].tolist() for of in (row, alone))
            # All that is added is filler: the same is left where fillers are taken out.
            filler = 0 if name == "loss_mask" else tokenizer.pad_token_id
            assert [one for one in own if one != filler] == [one for one in others if one != filler]
        marked = row.rsa.caption_mask[0] > 0
        assert row.tokens[0][marked].tolist() == alone.tokens[0][alone.rsa.caption_mask[0] > 0].tolist()
    assert num_filled > 10 and filled.batch([]).sequence_lengths.tolist() == [8]


def test_many_faults_of_a_buffer_are_spread_over_its_rows(tokenizer, caplog):
    """A tenth of 1000 samples in a row of its own would be taken for data that is broken as a whole."""
    caplog.set_level(logging.ERROR)
    encoder = make_encoder(tokenizer, 200)
    rows = rows_of(encoder, [stored(str(n), answer="" if n % 3 else "boat " * 20, images=0) for n in range(450)])
    assert sum(row.num_skipped for row in rows) == 300 and max(row.num_skipped for row in rows) < 20
    with pytest.raises(FatalSampleError, match="100 samples in a row were skipped; the last: .*the caption is empty"):
        rows_of(encoder, [stored(str(n), answer="") for n in range(100)])


def test_a_picture_of_another_size_than_its_header_is_skipped(tokenizer, caplog):
    encoder = make_encoder(tokenizer)
    sample = encoder.preencode_sample(stored())
    sample.parts = {"png": picture(90)}
    with pytest.raises(SkipSample):
        encoder.postencode_sample(sample)
    assert "another size than its header" in caplog.text


def test_a_restored_row_that_has_become_too_long_ends_the_run(tokenizer):
    """As after another template: rows of a saved position are not divided anew."""
    encoder = make_encoder(tokenizer)
    samples = [encoder.postencode_sample(encoder.preencode_sample(stored(answer="boat " * 100))) for _ in range(9)]
    with pytest.raises(FatalSampleError, match="more than --seq-length 700.*--template.*--restart-data"):
        encoder.pack_selected_samples(samples)
