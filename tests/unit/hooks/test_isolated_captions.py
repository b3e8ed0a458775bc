"""Where captions are put once more, by hand; that they train rightly is in test_parity.py."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig

from rsa_megatron.batch import RSASamples
from rsa_megatron.hooks import isolated_captions

IMAGE = 3
# An image, a caption of two tokens and padding; a longer caption between other tokens; one that is not eligible.
TOKENS = torch.tensor([[IMAGE, 11, 12, 0, 0], [21, 22, 23, 24, 25], [IMAGE, 31, 32, 33, 34]])
MASK = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]])


def samples(eligible=(1, 1, 0)) -> RSASamples:
    one_each = torch.ones(3, dtype=torch.int64)
    return RSASamples(torch.tensor(eligible), MASK, one_each, one_each)


def arguments() -> dict:
    return dict(input_ids=TOKENS, labels=TOKENS.roll(-1, 1), loss_mask=torch.ones(3, 5), position_ids=None)


def test_eligible_captions_stand_at_the_end_of_their_rows():
    given = arguments()
    appended, num_copied = isolated_captions.append(given, samples())
    assert num_copied == 3
    assert given["input_ids"].tolist() == [
        [IMAGE, 11, 12, 0, 0, 11, 12, 0],
        [21, 22, 23, 24, 25, 22, 23, 24],
        [IMAGE, 31, 32, 33, 34, 0, 0, 0],
    ]
    assert (
        appended.caption_mask[:, 5:].tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0]]
        and not appended.caption_mask[:, :5].any()
    )
    assert (
        given["loss_mask"][:, 5:].sum() == 0
        and given["loss_mask"].dtype == torch.float32
        and given["position_ids"] is None
    )


def test_learned_positions_begin_anew():
    given = arguments() | dict(position_ids=torch.arange(5).expand(3, 5))
    isolated_captions.append(given, samples())
    assert given["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]] * 3


def test_a_batch_without_pairs_stays_as_it_is():
    given = arguments()
    _, num_copied = isolated_captions.append(given, samples((0, 0, 0)))
    assert num_copied == 0 and torch.equal(given["input_ids"], TOKENS)


def test_a_position_looks_back_within_its_segment():
    mask = isolated_captions.segment_mask(torch.tensor([2, 0]), 4)
    may_look = ~mask[:, 0]
    assert may_look[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert torch.equal(may_look[1], torch.ones(4, 4).tril().bool())
    assert isolated_captions.packed_segments(torch.tensor([2, 3]), 4).cu_seqlens_q.tolist() == [0, 2, 4, 7, 8]


def test_the_longest_sequence_is_said():
    """(With a row that has no copy: one sequence of all of it.)"""
    starts = {(5,): 5, (2,): 6, (4,): 4, (0,): 8, (2, 3): 6, (2, 0): 8}
    for start_B, expected in starts.items():
        packed = isolated_captions.packed_segments(torch.tensor(start_B), 8)
        assert (packed.max_seqlen_q, packed.max_seqlen_kv) == (expected, expected)
        lengths = packed.cu_seqlens_q.diff()
        assert lengths.max() == expected and lengths.sum() == 8 * len(start_B)


def rotated_copy(states_LHD, start: int, max_seqlen: int | None = None):
    """A row's copy as Megatron's unfused RoPE turns it, with as many positions as its GPTModel takes; and the caption alone."""
    packed = isolated_captions.packed_segments(torch.tensor([start]), len(states_LHD))
    if max_seqlen is not None:
        packed.max_seqlen_q = packed.max_seqlen_kv = max_seqlen
    rotary = RotaryEmbedding(states_LHD.shape[2], 1.0, use_cpu_initialization=True)
    one_half = rotary.get_freqs_non_repeated(rotary.get_rotary_seq_len(None, None, None, None, packed))
    angles = torch.cat([one_half, one_half], dim=1)[:, None, None]
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    one_rank = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    turned = apply_rotary_pos_emb(states_LHD, angles, config, cu_seqlens=packed.cu_seqlens_q, cp_group=one_rank)
    alone_L1HD = states_LHD[start:, None]
    alone = apply_rotary_pos_emb(alone_L1HD, angles[: len(alone_L1HD)], config, cp_group=one_rank)
    return turned[start:], alone[:, 0]


@pytest.mark.parametrize("start", [1, 5, 9])
def test_in_one_row_the_copy_s_positions_begin_anew(start):
    states_LHD = torch.randn(12, 2, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(*rotated_copy(states_LHD, start))


def test_the_row_s_length_for_the_longest_would_be_seen():
    states_LHD = torch.randn(12, 2, 8, generator=torch.Generator().manual_seed(0))
    in_row, alone = rotated_copy(states_LHD, 5, max_seqlen=12)
    assert (in_row - alone).abs().max() > 0.1


@pytest.mark.parametrize(
    "setting, packed, message",
    [
        (dict(context_parallel_size=2), True, "--context-parallel-size above 1"),
        (dict(tp_comm_overlap=True), True, "--tp-comm-overlap"),
        (dict(window_size=(4, 0)), False, "a window_size"),
        (dict(masked_softmax_fusion=True), False, "pass --no-masked-softmax-fusion"),
    ],
)
def test_attention_that_would_not_see_the_segments_is_refused(setting, packed, message):
    config = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2, masked_softmax_fusion=False)
    isolated_captions.check_settings(config, packed=packed)
    for name, value in setting.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=f"--rsa-text-source caption does not go with .*{message}"):
        isolated_captions.check_settings(config, packed=packed)
