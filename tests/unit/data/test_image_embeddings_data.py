"""Images that come as embeddings, from a shard to a batch."""

import json

import numpy
import pytest
import torch
from megatron.energon import SkipSample

from rsa_megatron.anyres import ImageLayout
from rsa_megatron.data.cookers import cook
from rsa_megatron.data.image_embeddings import ImageEmbeddings
from rsa_megatron.data.task_encoder import LlavaTaskEncoder, StoredSample
from tests.support import broken_data
from tests.support.embedding_data import as_npy, embedding

WIDTH = 20
TEXT = {"conversations": [{"from": "human", "value": "<image>\nTell me."}, {"from": "gpt", "value": "A red boat."}]}


def encoder(tokenizer, positions=3, longest=640):
    embeddings = ImageEmbeddings(width=WIDTH, positions=positions) if positions else None
    return LlavaTaskEncoder(
        tokenizer,
        image_size=28,
        patch_size=14,
        max_sequence_length=longest,
        template="plain",
        image_aspect_ratio="square",
        grid_pinpoints=[],
        max_tiles=1,
        embeddings=embeddings,
    )


def stored(images, record=TEXT, key="a"):
    return StoredSample(
        __key__=key, __restore_key__=(), __subflavors__={"rsa": True}, images=images, record=json.dumps(record).encode()
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("positions", [1, 3, 576])
def test_a_row_of_as_many_positions_as_were_asked_for(tokenizer, positions, dtype):
    row = embedding("a", WIDTH).astype(dtype)
    made = encoder(tokenizer, positions)
    batch = made.batch([made.encode_sample(stored({"npy": as_npy(row)}))] * 2)
    assert torch.equal(batch.images, torch.from_numpy(row.astype(numpy.float32)).expand(2, WIDTH))
    assert [ImageLayout(*numbers) for numbers in batch.image_layouts.tolist()] == [
        ImageLayout.of_embedding(positions)
    ] * 2
    assert (batch.row_lengths == batch.tokens.shape[1] - 1 + positions).all()
    # The image is no target; all of the caption and its end are (T30).
    assert batch.rsa.eligible.tolist() == [1, 1] and batch.rsa.num_tiles.tolist() == [1, 1]
    assert batch.loss_mask[0].tolist() == [1.0] * batch.tokens.shape[1]
    assert (
        batch.tokens[0, 0] == tokenizer.convert_tokens_to_ids("<image>")
        and not (batch.labels == batch.tokens[0, 0]).any()
    )


def test_several_images_texts_and_empty_rows(tokenizer):
    two = {"conversations": [{"from": "human", "value": "<image> <image>"}, {"from": "gpt", "value": "Two."}]}
    rows = [embedding(key, WIDTH).astype(numpy.float32) for key in "ab"]
    made = encoder(tokenizer).of_one_epoch(3, 10)
    several = made.encode_sample(stored({"1.npy": as_npy(rows[1]), "0.npy": as_npy(rows[0])}, two))
    batch = made.batch([several])
    assert torch.equal(batch.images, torch.from_numpy(numpy.stack(rows))) and batch.rsa.num_tiles.tolist() == [2, 0, 0]
    text = {"conversations": [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Yes."}]}
    assert made.batch([made.encode_sample(stored({}, text))]).images.shape == (0, WIDTH)


def test_pixels_and_embeddings_of_the_same_sample(tokenizer):
    both = {"png": broken_data.picture(), "npy": as_npy(embedding("a", WIDTH))}
    assert encoder(tokenizer).encode_sample(stored(both)).tiles.shape == (1, WIDTH)
    assert encoder(tokenizer, positions=0).encode_sample(stored(both)).tiles.shape == (1, 3, 28, 28)


def test_embeddings_where_pixels_are_read_say_how_they_are(tokenizer, caplog):
    with pytest.raises(SkipSample):
        encoder(tokenizer, positions=0).encode_sample(stored({"npy": as_npy(embedding("a", WIDTH))}))
    assert "and the sample 0 image(s) in pixels; its embeddings (.npy) are read with --image-positions" in caplog.text


def pickled() -> bytes:
    return as_npy(numpy.array([{"a": 1}], dtype=object))


@pytest.mark.parametrize(
    "images, says",
    [
        ({}, "its text has 1 <image> and the sample 0 precomputed embedding(s) (.npy)"),
        ({"png": b"..."}, "its text has 1 <image> and the sample 0 precomputed embedding(s) (.npy)"),
        (
            {"npy": as_npy(numpy.ones(WIDTH + 1))},
            "npy: float64 array of shape [21]; it must be a floating-point vector of --image-embedding-width 20",
        ),
        ({"npy": as_npy(numpy.ones((1, WIDTH)))}, "npy: float64 array of shape [1, 20]"),
        ({"npy": as_npy(numpy.ones(WIDTH, int))}, "npy: int64 array of shape [20]"),
        ({"npy": as_npy(numpy.full(WIDTH, numpy.nan))}, "npy: it holds NaN, infinity or a number beyond float32"),
        ({"npy": as_npy(numpy.full(WIDTH, 1e300))}, "npy: it holds NaN, infinity or a number beyond float32"),
        ({"npy": b"no array"}, "npy: not an array in numpy's format"),
        ({"npy": as_npy(numpy.ones(WIDTH))[:-8]}, "npy: not an array in numpy's format"),
        (
            {"npy": pickled()},
            "npy: not an array in numpy's format: Object arrays cannot be loaded when allow_pickle=False",
        ),
        (
            {"1.npy": as_npy(numpy.ones(WIDTH))},
            "its images are 1.npy: it must have one, or 0.npy, 1.npy, ... without a gap",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_used_is_skipped_and_named(tokenizer, images, says, caplog):
    with pytest.raises(SkipSample):
        encoder(tokenizer).encode_sample(stored(images))
    assert "skipped sample a: " + says in caplog.text


def test_a_line_of_jsonl_names_its_file(tokenizer):
    found = cook(
        {
            "__key__": "7",
            "__shard__": "x.jsonl",
            "__restore_key__": (),
            "__sources__": (),
            "json": TEXT | {"image": "e/7.npy"},
        },
        None,
    )
    assert list(found.images) == ["0.npy"] and "names no images" in str(
        found.images["0.npy"]
    )  # there is no folder to read it from
