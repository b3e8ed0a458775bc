"""Pooling takes the tokens it should and no others."""

import torch

from rsa_megatron.alignment.pooling import pool_text, pool_tiles


def test_tiles_are_averaged_with_their_weights():
    tokens_TPD = torch.arange(3 * 2 * 4, dtype=torch.float32).view(3, 2, 4)
    weight_BT = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5], [0, 0, 0]])
    v_BD = pool_tiles(tokens_TPD, weight_BT)
    assert torch.equal(v_BD[0], tokens_TPD[0].mean(0))
    assert torch.equal(v_BD[1], tokens_TPD[1:].flatten(0, 1).mean(0))
    assert torch.equal(v_BD[2], torch.zeros(4))


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
