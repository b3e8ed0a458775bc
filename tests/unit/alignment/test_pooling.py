"""Pooling takes the tokens it should and no others."""

import pytest
import torch

from rsa_megatron.alignment.pooling import image_vectors, pool_text, pool_tiles, tile_weights


def test_tiles_are_averaged_with_their_weights():
    tokens_TPD = torch.arange(3 * 2 * 4, dtype=torch.float32).view(3, 2, 4)
    weight_BT = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5], [0, 0, 0]])
    v_BD = pool_tiles(tokens_TPD, weight_BT)
    assert torch.equal(v_BD[0], tokens_TPD[0].mean(0))
    assert torch.equal(v_BD[1], tokens_TPD[1:].flatten(0, 1).mean(0))
    assert torch.equal(v_BD[2], torch.zeros(4))


@pytest.mark.parametrize("base_tile", ["first", "last"])
@pytest.mark.parametrize("counts", [[3, 0, 1, 4], [0, 2, 0, 1], [1, 1, 1]])
def test_base_tiles_alone_are_what_their_weights_make_of_all(counts, base_tile):
    count_B = torch.tensor(counts)
    tokens_TPD = torch.randn(sum(counts), 5, 4, dtype=torch.bfloat16, requires_grad=True)
    like_BD = torch.randn(len(counts), 4)
    expected_BD = pool_tiles(tokens_TPD, tile_weights(count_B, sum(counts), "base", base_tile))
    actual_BD = image_vectors(tokens_TPD, count_B, base_tile=base_tile)
    expected, actual = (torch.autograd.grad(x, tokens_TPD, like_BD)[0] for x in (expected_BD, actual_BD))
    assert torch.equal(actual_BD, expected_BD) and torch.equal(actual, expected)
    if max(counts) > 1:  # the check can fail
        other = image_vectors(tokens_TPD, count_B, base_tile="last" if base_tile == "first" else "first")
        assert not torch.equal(other, expected_BD)


def test_pooling_keeps_no_tokens_alive_and_reads_the_base_tiles_alone():
    """What autograd holds is smaller than one tile; and of 12 tiles, of which 2 count, it makes no float32 copy."""
    tokens_TPD, count_B = torch.randn(12, 64, 128, dtype=torch.bfloat16, requires_grad=True), torch.tensor([6, 6])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.untyped_storage().nbytes()) or x, lambda x: x
    ):
        v_BD = image_vectors(tokens_TPD, count_B)
    assert sum(saved) < 64 * 128 * 2
    assert largest_allocation(v_BD.sum().backward) == tokens_TPD.numel() * 2  # the tokens' own gradient
    all_BD = pool_tiles(tokens_TPD, tile_weights(count_B, 12, "base", "first"))
    assert largest_allocation(all_BD.sum().backward) == tokens_TPD.numel() * 4  # the check can fail


def largest_allocation(work) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    return max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


def test_text_outside_the_mask_counts_for_nothing():
    hidden_SBE = torch.randn(6, 2, 3)
    mask_BS = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]])
    sum_BE = pool_text(hidden_SBE, mask_BS)
    assert torch.allclose(sum_BE[0], hidden_SBE[1:3, 0].sum(0))
    hidden_SBE[0], hidden_SBE[5, 0] = 1e9, 1e9
    assert torch.equal(pool_text(hidden_SBE, mask_BS), sum_BE)


def test_bf16_activations_are_summed_in_float32():
    hidden_SBE = torch.full((4096, 1, 1), 1.01, dtype=torch.bfloat16)
    exact = hidden_SBE.double().sum().item()
    assert pool_text(hidden_SBE, torch.ones(1, 4096)).item() == exact
    assert pool_tiles(hidden_SBE.transpose(0, 1), torch.ones(1, 1)).item() == exact / 4096
    # In bf16 itself a sum of 4096 such terms is off by whole units: the check can fail.
    total = torch.zeros((), dtype=torch.bfloat16)
    for value in hidden_SBE.flatten()[:600]:
        total += value
    assert abs(total.item() - 600 * exact / 4096) > 1
