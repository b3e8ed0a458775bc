"""Who takes part in RSA, read off the arguments of a LLaVAModel; and marks that come through its splice."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from rsa_megatron.hooks import caption_mask as caption_marks
from rsa_megatron.hooks import token_positions
from rsa_megatron.hooks.host import LLaVAHost
from rsa_megatron.hooks.sample_selection import Selection, samples_of

IMAGE = -200
HOST = LLaVAHost(SimpleNamespace(image_token_index=IMAGE, img_seq_len=4))
# One image of three tiles with a caption of two tokens; text; two images of one and two tiles.
TOKENS = torch.tensor([[1, IMAGE, 11, 12, 0], [21, 22, 23, 24, 25], [IMAGE, IMAGE, 31, 32, 0]])
LOSS_MASK = torch.tensor(
    [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 1, 0, 0]]
)  # at p: whether the token at p + 1 is learnt


def arguments(**others) -> dict:
    return dict(input_ids=TOKENS, loss_mask=LOSS_MASK, num_image_tiles=torch.tensor([3, 1, 2])) | others


def test_by_default_one_image_and_what_the_loss_learns():
    samples = samples_of(arguments(), HOST)
    assert samples.eligible.tolist() == [1, 0, 0]
    assert samples.num_tiles.tolist() == [3, 0, 3]
    assert samples.caption_mask.tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1], [0, 0, 1, 1, 0]]


def test_tiles_as_a_list_or_not_said():
    assert samples_of(arguments(num_image_tiles=[3, 1, 2]), HOST).num_tiles.tolist() == [3, 0, 3]
    assert samples_of(arguments(num_image_tiles=None), HOST).num_tiles.tolist() == [1, 0, 2]


def test_weights_of_the_loss_are_no_captions_of_half_a_token():
    weighted = samples_of(arguments(loss_mask=LOSS_MASK * 0.25), HOST)
    assert torch.equal(weighted.caption_mask, samples_of(arguments(), HOST).caption_mask)


def test_a_stage_without_a_loss_mask_knows_of_no_caption():
    samples = samples_of(arguments(loss_mask=None), HOST)
    assert not samples.caption_mask.any() and samples.eligible.tolist() == [1, 0, 0]


def test_images_and_the_token_before_one_are_no_caption():
    found = token_positions.readable(torch.ones(3, 5, dtype=torch.int64), TOKENS == IMAGE)
    assert found.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]


def test_a_script_says_who_and_which_tokens():
    caption_mask = torch.tensor([[0, 0, 0, 1, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0]])
    samples = samples_of(arguments(), HOST, Selection(caption_mask=caption_mask))
    assert torch.equal(samples.caption_mask, caption_mask) and samples.eligible.tolist() == [1, 0, 0]
    longer = torch.nn.functional.pad(caption_mask, (0, 1), value=1)  # the script has cut the last token off the texts
    assert torch.equal(samples_of(arguments(), HOST, Selection(caption_mask=longer)).caption_mask, caption_mask)
    # A sample without one image of its own cannot take part, whatever is said.
    assert samples_of(arguments(), HOST, Selection(eligible=torch.tensor([0, 1, 1]))).eligible.tolist() == [0, 0, 0]


def test_a_selection_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"gave eligible of shape \(2,\), the model's batch has \(3,\)"):
        samples_of(arguments(), HOST, Selection(eligible=torch.ones(2)))
    with pytest.raises(ValueError, match=r"gave caption_mask of shape \(3, 4\), the model's batch has \(3, 5\)"):
        samples_of(arguments(), HOST, Selection(caption_mask=torch.ones(3, 4)))


def test_ids_tell_samples_apart_and_are_found_again():
    ids = samples_of(arguments(), HOST).sample_id
    assert torch.equal(ids, samples_of(arguments(num_image_tiles=None), HOST).sample_id)
    assert len(set(ids.tolist())) == 3 and (ids >= 0).all()
    swapped = TOKENS[:, [0, 1, 3, 2, 4]]
    assert not (samples_of(arguments(input_ids=swapped), HOST).sample_id == ids).any()


def test_packed_samples_are_told_apart_by_where_they_end():
    """One row of three: an image (4 positions) with a caption, text alone, an image of two tiles (8) with a caption."""
    tokens = torch.tensor([[IMAGE, 11, 12, 21, 22, IMAGE, 31, 0]])
    loss_mask = torch.tensor([[1, 1, 1, 1, 0, 1, 0, 0]])  # the third 1 would learn the next sample's first token
    bounds = torch.tensor([0, 6, 8, 18], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    given = dict(input_ids=tokens, loss_mask=loss_mask, num_image_tiles=torch.tensor([1, 2]), packed_seq_params=packed)
    samples = samples_of(given, HOST)
    assert samples.eligible.tolist() == [1, 0, 1] and samples.num_tiles.tolist() == [1, 0, 2]
    assert samples.caption_mask.tolist() == [[0, 1, 1, 0, 2, 0, 3, 0]]
    assert len(set(samples.sample_id.tolist())) == 3
    with pytest.raises(ValueError, match="from one row, not 2: set --micro-batch-size 1"):
        samples_of(given | dict(input_ids=tokens.expand(2, -1), num_image_tiles=torch.tensor([1, 2, 1, 2])), HOST)


def test_text_lies_after_the_tokens_of_the_images_before_it():
    position_BS = token_positions.positions(TOKENS == IMAGE, torch.tensor([12, 4, 8]))
    assert position_BS.tolist() == [[0, 12, 13, 14, 15], [0, 1, 2, 3, 4], [3, 11, 12, 13, 14]]
    mask_BS = torch.tensor([[0, 0, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
    assert [row.nonzero().flatten().tolist() for row in token_positions.spliced(mask_BS, position_BS, 16)] == [
        [13, 14],
        [0],
        [14],
    ]
    assert token_positions.spliced(mask_BS, position_BS, 14).sum() == 2  # cut as LLaVAModel cuts


def test_a_context_parallel_rank_has_a_piece_and_its_mirror_image():
    row_BL = torch.arange(8)[None]
    assert token_positions.context_parallel_part(row_BL, 2, 0).tolist() == [[0, 1, 6, 7]]
    assert token_positions.context_parallel_part(row_BL, 2, 1).tolist() == [[2, 3, 4, 5]]
    assert token_positions.context_parallel_part(row_BL, 1, 0) is row_BL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("packed", [False, True])
def test_marks_leave_the_loss_mask_as_it_was(dtype, packed):
    weights = (
        torch.tensor([[0, 1, 1, 0, 1]]) if not dtype.is_floating_point else torch.tensor([[0, 1 / 3, 2.5, 1e-3, 0]])
    )
    loss_mask = weights.to(dtype)
    caption_mask = torch.tensor([[0, 0, 1, 3, 900]]) if packed else torch.tensor([[0, 0, 1, 1, 1]])
    marked = caption_marks.put_on(loss_mask, caption_mask, packed=packed)
    found, marks = caption_marks.take_off(marked, dtype, packed=packed)
    assert torch.equal(found, loss_mask) and found.dtype == dtype and torch.equal(marks.long(), caption_mask)
