"""What transformers computes with a checkpoint, Megatron computes with the converted one, and mistakes would be seen."""

import pytest

from checkpoint_conversion import torch_dist_save
from tests.support.hf_parity import (
    LAYOUTS,
    MISTAKES,
    PADDED,
    TOLERANCE,
    flat,
    padding_in_the_softmax,
    parts_one_after_the_other,
    token_after_an_image_not_learnt,
)
from tests.support.packed_parity import no_bounds


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_losses_are_hugging_faces(models, layout):
    differences = models.differences(*flat(layout))
    assert max(differences.values()) < TOLERANCE, differences


# Nothing of these mistakes lies in the embeddings, which is all that tying is about.
UNTIED = pytest.mark.parametrize("models", ["untied"], indirect=True)


@UNTIED
@pytest.mark.parametrize("layout", ["one process", "TP=2 PP=2"])
def test_logits_of_a_packed_row_are_hugging_faces_of_each_sample(models, layout):
    assert models.packed_difference(*flat(layout)) < TOLERANCE


@UNTIED
def test_a_packed_row_read_as_one_sequence_would_be_seen(models):
    assert models.packed_difference(setup=no_bounds) > 1000 * TOLERANCE


@UNTIED
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_be_seen(models, mistake):
    assert models.differences(sabotage=MISTAKES[mistake])["logits"] > 10 * TOLERANCE


@pytest.mark.check
def test_padding_in_the_softmax_would_be_seen(models):
    differences = models.differences(*flat(PADDED), sabotage=padding_in_the_softmax)
    assert differences["logits"] < TOLERANCE < 10 * TOLERANCE < differences["loss"]


@UNTIED
def test_the_token_after_an_image_left_out_of_the_loss_would_be_seen(models):
    differences = models.differences(sabotage=token_after_an_image_not_learnt)
    assert differences["logits"] < TOLERANCE < 10 * TOLERANCE < differences["loss"]


@UNTIED
def test_queries_keys_and_values_not_interleaved_would_be_seen(models, monkeypatch, tmp_path):
    monkeypatch.setattr(torch_dist_save, "join", parts_one_after_the_other)
    assert models.differences(checkpoint=models.convert(tmp_path / "wrong"))["logits"] > 10 * TOLERANCE
