"""A packed row's parameters, and its bounds behind the hidden state of a pipeline."""

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd, _apply_rotary_pos_emb_thd

from rsa_megatron.models.packed_rows import (
    check_same_bounds,
    count_bounds_rows,
    make_packed_seq_params,
    put_on_bounds,
    take_off_bounds,
)

WIDTH = 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_bounds_come_through_exactly(dtype, num_shards):
    generator = torch.Generator().manual_seed(0)
    for row_length in (8, 128, 130, 1000, 5000):
        k = count_bounds_rows(row_length, WIDTH)
        assert k == -(-row_length // 128)
        hidden = torch.randn(row_length // num_shards, 1, WIDTH, generator=generator).to(dtype)
        ends = [*range(1, row_length + 1)]  # every bit of every number
        cuts = [torch.randint(1, row_length, (7,), generator=generator).unique().tolist() for _ in range(5)]
        for ends in (ends, [row_length], [1], *cuts, *([*cut, row_length] for cut in cuts)):
            lengths = tuple(end - begin for begin, end in zip([0, *ends], ends))
            packed = make_packed_seq_params(lengths, row_length)
            sent = put_on_bounds(hidden, packed, k)
            assert sent.dtype == dtype and sent.shape == (len(hidden) + k, 1, WIDTH)
            left, received = take_off_bounds(sent, k, num_shards)
            assert torch.equal(left, hidden) and received.sequence_lengths == lengths
            assert torch.equal(received.cu_seqlens_q, packed.cu_seqlens_q)
            check_same_bounds(received, packed)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rows_that_are_not_packed_have_none(batch_size):
    hidden = torch.randn(128, batch_size, WIDTH)
    sent = put_on_bounds(hidden, None, 1)
    assert sent.shape == (129, batch_size, WIDTH)
    left, received = take_off_bounds(sent, 1, 1)
    assert torch.equal(left, hidden) and received is None
    check_same_bounds(received, None)


def test_the_gradient_comes_back_without_the_bounds():
    hidden = torch.randn(8, 1, WIDTH, requires_grad=True)
    weights = torch.randn(8, 1, WIDTH)
    sent = put_on_bounds(hidden, make_packed_seq_params([3, 2], 8), 2).detach().requires_grad_()
    (take_off_bounds(sent, 2, 1)[0] * weights).sum().backward()
    assert torch.equal(sent.grad[:8], weights) and not sent.grad[8:].any()
    put_on_bounds(hidden, make_packed_seq_params([3, 2], 8), 2).backward(sent.grad)
    assert torch.equal(hidden.grad, weights)


def test_parameters_end_where_the_row_ends_and_name_the_longest_sequence():
    packed = make_packed_seq_params(torch.tensor([5, 9, 2]), 20)
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 5, 14, 16, 20]
    assert packed.cu_seqlens_q.dtype == torch.int32 and packed.qkv_format == "thd"
    assert (packed.max_seqlen_q, packed.max_seqlen_kv) == (9, 9) and type(packed.max_seqlen_q) is int
    assert make_packed_seq_params([5, 9, 2], 16).cu_seqlens_q.tolist() == [0, 5, 14, 16]
    assert make_packed_seq_params([1], 20).max_seqlen_q == 19


@pytest.mark.parametrize("lengths, row_length, said", [
    ([], 8, "one position or more"),
    ([3, 0, 2], 8, "one position or more, and has [3, 0, 2]"),
    ([5, 4], 8, "9 positions, and the row only 8"),
])  # fmt: skip
def test_lengths_that_cannot_be(lengths, row_length, said):
    with pytest.raises(ValueError) as error:
        make_packed_seq_params(lengths, row_length)
    assert said in str(error.value)


def test_stages_that_have_read_other_rows_are_named():
    first, last = make_packed_seq_params([3, 5], 8), make_packed_seq_params([5, 3], 8)
    with pytest.raises(RuntimeError, match="sequences of 3, 5 positions against 5, 3. Both stages must read"):
        check_same_bounds(first, last)
    with pytest.raises(RuntimeError, match="sequences of 3, 5 positions against no packed row's"):
        check_same_bounds(first, None)


class OneRank:
    """A process group of context parallelism, without it."""

    def size(self):
        return 1

    def rank(self):
        return 0


def test_rotary_positions_begin_anew_in_each_sequence():
    """With the longest sequence's table, or a longer one than the row; a table of the row's length is taken for the row's positions."""
    lengths, row_length = (30, 7, 60), 100
    packed = make_packed_seq_params(lengths, row_length)
    row = torch.randn(row_length, 2, 8)
    frequencies = torch.arange(4).repeat(2)

    def table(length):
        return (torch.arange(length)[:, None] * 1e4 ** (-frequencies / 4))[:, None, None]

    def rotated(length):
        return _apply_rotary_pos_emb_thd(row, packed.cu_seqlens_q, table(length), cp_group=OneRank())

    alone = [
        _apply_rotary_pos_emb_bshd(part[:, None], table(len(part)))[:, 0]
        for part in row.split([*lengths, row_length - sum(lengths)])
    ]
    assert packed.max_seqlen_q == 60
    for length in (packed.max_seqlen_q, row_length + 1):
        assert torch.equal(rotated(length), torch.cat(alone))
    assert (rotated(row_length) - torch.cat(alone)).abs().max() > 0.1
