"""Who takes part in RSA, read off the arguments of a LLaVAModel; and marks that come through its splice."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from rsa_megatron.hooks import caption_mask as caption_marks
from rsa_megatron.hooks import checks, sample_selection, token_positions
from rsa_megatron.hooks.hosts.llava import LLaVAHost
from rsa_megatron.hooks.sample_selection import Selection, samples_of

IMAGE = -200
MODEL = dict(
    image_token_index=IMAGE,
    img_seq_len=4,
    _language_max_sequence_length=64,
    _language_is_pipeline_parallel=False,
    sequence_parallel_lm=False,
    context_parallel_lm=1,
    tensor_model_parallel_size_lm=2,
)
HOST = LLaVAHost(SimpleNamespace(**MODEL))
SHARED = LLaVAHost(SimpleNamespace(**MODEL | dict(sequence_parallel_lm=True, tensor_model_parallel_size_lm=4)))
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


# One row of three: an image (4 positions) with a caption, text alone, an image of two tiles (8) with a caption. Of its loss mask
# the third 1 would learn the next sample's first token.
PACKED_TOKENS = torch.tensor([[IMAGE, 11, 12, 21, 22, IMAGE, 31, 0]])
PACKED_LOSS_MASK = torch.tensor([[1, 1, 1, 1, 0, 1, 0, 0]])
ENDS = [0, 6, 8, 18]


def packed_samples(host=HOST, chosen: Selection = Selection(), **bounds):
    """samples_of of that row with bounds as a script gives them, lists or anything else."""
    given = {
        name: torch.tensor(ends, dtype=torch.int32) if isinstance(ends, list) else ends for name, ends in bounds.items()
    }
    packed = PackedSeqParams(qkv_format="thd", **given)
    return samples_of(
        dict(
            input_ids=PACKED_TOKENS,
            loss_mask=PACKED_LOSS_MASK,
            num_image_tiles=torch.tensor([1, 2]),
            packed_seq_params=packed,
        ),
        host,
        chosen,
    )


def test_packed_samples_are_told_apart_by_where_they_end():
    samples = packed_samples(cu_seqlens_q=ENDS)
    assert samples.eligible.tolist() == [1, 0, 1] and samples.num_tiles.tolist() == [1, 0, 2]
    assert samples.caption_mask.tolist() == [[0, 1, 1, 0, 2, 0, 3, 0]]
    assert len(set(samples.sample_id.tolist())) == 3
    two_rows = dict(input_ids=PACKED_TOKENS.expand(2, -1), num_image_tiles=torch.tensor([1, 2, 1, 2]))
    two_rows |= dict(packed_seq_params=PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(ENDS)))
    with pytest.raises(ValueError, match="from one row, not 2: set --micro-batch-size 1"):
        samples_of(two_rows, HOST)


# (bounds, samples that take part, caption mask)
@pytest.mark.parametrize(
    "bounds, eligible, caption_mask",
    [
        (dict(cu_seqlens_q=[0, 6, 6, 8, 18, 18]), [1, 0, 0, 1, 0], [0, 1, 1, 0, 3, 0, 4, 0]),
        (dict(cu_seqlens_q_padded=ENDS), [1, 0, 1], [0, 1, 1, 0, 2, 0, 3, 0]),
        # The last token of all is padding, which the second bounds count alone; the third leaves it behind the sequences.
        (dict(cu_seqlens_q=[0, 6, 8, 17], cu_seqlens_q_padded=ENDS), [1, 0, 1], [0, 1, 1, 0, 2, 0, 3, 0]),
        (dict(cu_seqlens_q=[0, 6, 8, 17], total_tokens=18), [1, 0, 1], [0, 1, 1, 0, 2, 0, 3, 0]),
        # Token 12 is padding, and predicted by the one before it.
        (dict(cu_seqlens_q=[0, 5, 7, 17], cu_seqlens_q_padded=ENDS), None, "1 image, trained or caption tokens"),
    ],
    ids=["empty sequences", "padded alone", "padding of a sequence", "padding of the row", "a loss in padding"],
)
def test_bounds_with_padding_and_empty_sequences(bounds, eligible, caption_mask):
    if eligible is None:
        with pytest.raises(ValueError, match=f"{caption_mask} of the packed row lie in .* padding"):
            packed_samples(**bounds)
        return
    samples = packed_samples(**bounds)
    assert samples.eligible.tolist() == eligible and samples.caption_mask.tolist() == [caption_mask]


@pytest.mark.parametrize(
    "bounds, message",
    [
        # As the texts have them, an image one token: image 2 would be in no sequence, its caption sample 3's.
        (
            dict(cu_seqlens_q=[0, 3, 5, 8]),
            "cu_seqlens_q ends at 8, and the packed row has 18 positions with its images'",
        ),
        # Each image counted as one tile.
        (dict(cu_seqlens_q=[0, 6, 8, 14]), "ends at 14, and the packed row has 18 positions"),
        (dict(cu_seqlens_q=[0, 3, 5, 8], cu_seqlens_q_padded=[0, 3, 5, 8]), "cu_seqlens_q_padded ends at 8, and .* 18"),
        (
            dict(cu_seqlens_q=[0, 6, 8, 17]),
            "ends at 17, and the packed row has 18 positions .* padding to its last seq",
        ),
        (dict(cu_seqlens_q=[0, 6, 8, 20]), "ends at 20, and the packed row has 18 positions"),
        (
            dict(cu_seqlens_q=[0, 3, 5, 8], cu_seqlens_q_padded=ENDS),
            "4 image, trained or caption tokens .* cu_seqlens_q",
        ),
        (
            dict(cu_seqlens_q=[0, 3, 5, 8], total_tokens=18),
            "1 image, trained or caption tokens of the packed row lie in",
        ),
        (dict(cu_seqlens_q=[0, 3, 8, 18]), "ends a sequence within an image, 1 times: count each image as the tokens"),
        (dict(cu_seqlens_q=[6, 8, 18]), "cu_seqlens_q begins at 6: give 0 first"),
        (
            dict(cu_seqlens_q=[0, 8, 6, 18]),
            "cu_seqlens_q goes back from 8 to 6: give where each sequence ends, in order",
        ),
        (
            dict(cu_seqlens_q=[0, 7, 8, 18], cu_seqlens_q_padded=ENDS),
            "sequence 0 7 positions, and cu_seqlens_q_padded 6",
        ),
        (dict(cu_seqlens_q=[0, 18], cu_seqlens_q_padded=ENDS), "cu_seqlens_q has 2 bounds and cu_seqlens_q_padded 4"),
        (dict(cu_seqlens_q=[ENDS]), r"cu_seqlens_q is of shape \(1, 4\): give the bounds of n sequences in a tensor"),
        (dict(), "cu_seqlens_q is None: give the bounds"),
        (dict(cu_seqlens_q=[0]), r"cu_seqlens_q is of shape \(1,\): give"),
    ],
)
def test_bounds_that_cannot_be_the_row_s_are_refused(bounds, message):
    with pytest.raises(ValueError, match=message) as refused:
        packed_samples(**bounds)
    assert "\n" not in str(refused.value)


def test_without_the_refusal_captions_would_go_to_other_samples(monkeypatch):
    right = packed_samples(cu_seqlens_q=ENDS)
    monkeypatch.setattr(sample_selection, "check_bounds", lambda *args: None)
    wrong = packed_samples(cu_seqlens_q=[0, 3, 5, 8])
    assert not torch.equal(wrong.caption_mask, right.caption_mask)
    assert wrong.eligible.tolist() != right.eligible.tolist()


def test_a_row_may_be_cut_or_filled_up_for_the_ranks_that_share_it():
    cut = LLaVAHost(SimpleNamespace(**MODEL | dict(_language_max_sequence_length=15)))
    assert packed_samples(cut, cu_seqlens_q=[0, 6, 8, 15]).eligible.tolist() == [1, 0, 1]
    assert packed_samples(SHARED, cu_seqlens_q=[0, 6, 8, 20]).eligible.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="ends at 15, and the packed row has 18"):
        packed_samples(cu_seqlens_q=[0, 6, 8, 15])


def test_under_pipeline_parallelism_every_row_is_filled_up():
    model = SimpleNamespace(**MODEL | dict(_language_is_pipeline_parallel=True))
    samples = packed_samples(LLaVAHost(model), cu_seqlens_q=[0, 6, 8, 18, 64])  # the rest as one more sequence
    assert samples.eligible.tolist() == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="ends at 63, and the packed row has 18"):
        packed_samples(LLaVAHost(model), cu_seqlens_q=[0, 6, 8, 63])
    with pytest.raises(ValueError, match="ends at 64, and the packed row has 18"):
        packed_samples(cu_seqlens_q=[0, 6, 8, 64])


def test_the_row_s_padding_may_be_a_sequence_more_than_a_script_has_samples():
    chosen = Selection(eligible=torch.tensor([1, 1, 0]))
    samples = packed_samples(chosen=chosen, cu_seqlens_q=[0, 6, 8, 18, 20], host=SHARED)
    assert samples.eligible.tolist() == [1, 0, 0, 0]
    with pytest.raises(
        ValueError, match="eligible of 2 samples, and the packed row has 3 sequences, of which the last is not"
    ):
        packed_samples(chosen=Selection(eligible=torch.tensor([1, 1])), cu_seqlens_q=ENDS)
    with pytest.raises(ValueError, match=r"eligible of shape \(1,\), the model's batch has \(3,\)"):
        packed_samples(chosen=Selection(eligible=torch.tensor([1])), cu_seqlens_q=ENDS)


def test_stages_that_read_no_data_must_be_told_the_bounds():
    with pytest.raises(
        ValueError, match="where the 3 sequences of its packed row begin.* pass packed_seq_params"
    ) as refused:
        checks.check_bounds_are_known(HOST, {}, 3)
    assert "\n" not in str(refused.value)
    checks.check_bounds_are_known(HOST, dict(packed_seq_params=object()), 3)
    checks.check_bounds_are_known(HOST, {}, 0)  # rows of one sample
    checks.check_bounds_are_known(
        LLaVAHost(SimpleNamespace(**MODEL, packs_rows=True)), {}, 3
    )  # its stages tell one another


def test_both_ends_must_have_packed_as_many_samples():
    checks.check_same_number(3, 3)
    with pytest.raises(
        RuntimeError, match="different samples .a packed row of 3 against a packed row of 4.: image and"
    ):
        checks.check_same_number(3, 4)
    with pytest.raises(RuntimeError, match="different samples .rows of one against a packed row of 1.: image and"):
        checks.check_same_number(0, 1)


@pytest.mark.parametrize(
    "packed, alone, copies, message",
    [
        (True, True, False, "--rsa-text-source caption with packed sequences: each caption is to stand once more"),
        (True, False, True, "captions_are_copies is for --rsa-text-source caption with packed sequences .*: set it"),
        (False, True, True, "captions_are_copies is for --rsa-text-source caption .*: the copies would see their rows"),
        (True, True, True, None),
        (True, False, False, None),
        (False, True, False, None),
    ],
)
def test_copies_of_captions_in_packed_rows_are_the_data_s(packed, alone, copies, message):
    given = dict(reads_captions_alone=alone, captions_are_copies=copies)
    if message is None:
        checks.check_packing(packed, **given)
        return
    with pytest.raises(ValueError, match=message):
        checks.check_packing(packed, **given)


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
    # Of packed sequences, one of them empty, of each.
    row_BL, bounds = torch.arange(12)[None], torch.tensor([0, 4, 4, 12])
    assert token_positions.context_parallel_part(row_BL, 2, 0, bounds).tolist() == [[0, 3, 4, 5, 10, 11]]
    assert token_positions.context_parallel_part(row_BL, 2, 1, bounds).tolist() == [[1, 2, 6, 7, 8, 9]]


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
