"""Samples become rows of a batch with the right tokens, masks and tiles; what cannot is skipped, named and counted."""

import json
import logging

import broken_data
import pytest
import torch
from megatron.energon import SkipSample
from megatron.energon.errors import FatalSampleError
from transformers import AutoTokenizer

from rsa_megatron.data.task_encoder import LlavaTaskEncoder, StoredSample, sample_id


@pytest.fixture(scope="module")
def tokenizer(demo):
    return AutoTokenizer.from_pretrained(demo / "tokenizer")


@pytest.fixture
def encoder(tokenizer):
    return LlavaTaskEncoder(tokenizer, image_size=28, image_tokens=4, max_sequence_length=128, template="plain")


def stored(key="a", answer="A red boat.", image=True, rsa=True, prompt=None):
    prompt = prompt or ("<image>\nDescribe it." if image else "Tell me.")
    record = {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]}
    return StoredSample(
        __key__=key,
        __restore_key__=(),
        __subflavors__={"rsa": rsa},
        image=broken_data.picture() if image else None,
        record=json.dumps(record).encode(),
    )


def test_a_batch_lines_up(encoder, tokenizer):
    samples = [stored("a"), stored("b", "A long green boat is here.", rsa=False), stored("c", image=False)]
    batch = encoder.batch([encoder.encode_sample(sample) for sample in samples])
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == batch.rsa.caption_mask.shape
    is_token = batch.tokens[:, 1:] != 0  # the last label of a row is no input
    assert torch.equal(batch.tokens[:, 1:][is_token], batch.labels[:, :-1][is_token])
    for row, answer in enumerate(["A red boat.", "A long green boat is here.", "A red boat."]):
        caption = batch.tokens[row][batch.rsa.caption_mask[row] > 0]
        assert tokenizer.decode(caption) == answer
        learnt = batch.labels[row][batch.loss_mask[row] > 0]
        # Without an image the first token of the row is the caption's own, which nothing precedes.
        assert tokenizer.decode(learnt) == (answer + "\n" if row < 2 else answer[1:] + "\n")
    assert batch.rsa.eligible.tolist() == [1, 0, 0]
    assert batch.rsa.num_tiles.tolist() == [1, 1, 0]
    assert batch.images.shape == (2, 3, 28, 28) and batch.num_image_tiles.tolist() == [1, 1]
    assert batch.keys == ["a", "b", "c"]
    assert batch.rsa.sample_id.tolist() == [sample_id(key) for key in "abc"]


def test_pixels_are_siglips(encoder):
    tiles = encoder.encode_sample(stored()).tiles
    assert tiles.shape == (1, 3, 28, 28) and tiles.dtype == torch.float32
    assert -1 <= tiles.min() < -0.5 and 0.5 < tiles.max() <= 1


def test_sample_ids_are_fixed_and_fit_63_bits():
    assert sample_id("train-00000.tar/000001") == 341419117525882545
    ids = {sample_id(str(i)) for i in range(1000)}
    assert len(ids) == 1000 and all(0 <= i < 2**63 for i in ids)


def test_an_unusable_sample_is_skipped_named_and_counted(encoder, caplog):
    with caplog.at_level(logging.WARNING):
        for key, answer in (("tar/empty", " "), ("tar/long", "word " * 400)):
            with pytest.raises(SkipSample):
                encoder.encode_sample(stored(key, answer))
    lines = [record.message for record in caplog.records]
    assert lines[0] == "skipped sample tar/empty: the caption is empty"
    assert lines[1].startswith("skipped sample tar/long:") and "--seq-length 128" in lines[1]
    good = encoder.encode_sample(stored())
    assert encoder.batch([good]).num_skipped == 2
    assert encoder.batch([good]).num_skipped == 0  # counted once


def test_the_longest_row_that_fits_is_kept(encoder, tokenizer):
    answer = "a" * 400
    while len(tokenizer(answer)["input_ids"]) + 4 > 128:  # 4 image tokens; the newline is label only
        answer = answer[:-1]
    encoder.encode_sample(stored(answer=answer))
    with pytest.raises(SkipSample):
        encoder.encode_sample(stored(answer=answer + " boat boat boat"))


def test_a_data_set_of_unusable_samples_ends_the_run(encoder):
    for _ in range(99):
        with pytest.raises(SkipSample):
            encoder.encode_sample(stored(answer=""))
    with pytest.raises(FatalSampleError, match="100 samples in a row cannot be used; the last: .*the caption is empty"):
        encoder.encode_sample(stored(answer=""))
