"""The gradient scale under context parallelism, where Megatron itself needs a GPU: the objective alone, over gloo.

Four processes, DP=2 x CP=2, each with half of every row. The script's division by tokens and micro-batches and DDP's
mean or sum over ranks are done here as Megatron does them (objective.py tells how).
"""

from types import SimpleNamespace

import processes
import pytest
import torch
import torch.distributed

from rsa_megatron.alignment.loss import rsa_loss_reference
from rsa_megatron.batch import RSASamples
from rsa_megatron.config import RSAConfig
from rsa_megatron.llava import objective
from rsa_megatron.llava.taps import Representations

WEIGHT, NUM_MICRO_BATCHES = 0.5, 2
B, L, D, E = 3, 8, 5, 6  # samples a data-parallel rank, rows, widths
ELIGIBLE = [[1, 0, 1], [1, 1, 1]]


def everything(dtype=torch.float32):
    """Two micro-batches of two data-parallel ranks; weights that make v and the hidden states of them."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_MICRO_BATCHES, 2)
    images = torch.randn(*shape, B, D, generator=generator).to(dtype)
    states = torch.randn(*shape, L, B, E, generator=generator).to(dtype)
    mask = (torch.rand(*shape, B, L, generator=generator) < 0.6).to(dtype)
    mask[0, 1, 2] = 0  # an eligible sample whose caption has no row
    weights = [torch.randn(n, generator=generator).to(dtype).requires_grad_() for n in (D, E)]
    return images, states, mask, weights


def gradients_on_a_rank(mode, sabotage):
    rank = torch.distributed.get_rank()
    data_rank, context_rank = divmod(rank, 2)
    groups = {name: [torch.distributed.new_group(ranks) for ranks in members] for name, members in {
        "cp": [[0, 1], [2, 3]], "dp": [[0, 2], [1, 3]], "tp": [[0], [1], [2], [3]], "dp_cp": [[0, 1, 2, 3]]}.items()}  # fmt: skip
    own = SimpleNamespace(
        cp=groups["cp"][data_rank], dp=groups["dp"][context_rank], tp=groups["tp"][rank], dp_cp=groups["dp_cp"][0]
    )
    if sabotage:
        objective._scale_gradient = lambda x, factor: x
    images, states, mask, weights = everything()
    half = slice(context_rank * L // 2, (context_rank + 1) * L // 2)
    num_tokens_of = [[[3, 5], [4, 0]], [[2, 2], [6, 1]]]  # micro-batch, data rank, context rank
    config, model_config = RSAConfig(weight=WEIGHT), SimpleNamespace(sequence_parallel=False)
    for m in range(NUM_MICRO_BATCHES):
        samples = RSASamples(torch.tensor(ELIGIBLE[data_rank]), None, torch.ones(B), torch.arange(B))
        representations = Representations(
            v_BD=images[m, data_rank] * weights[0],
            hidden_LBE=states[m, data_rank, half] * weights[1],
            caption_mask_BL=mask[m, data_rank, :, half],
            samples=samples,
            num_copied=0,
        )
        term = objective.rsa_term(representations, config, model_config, own)
        num_tokens = torch.tensor(num_tokens_of[m][data_rank][context_rank])
        outputs = (torch.zeros(()), {}) if mode == "pair" else (torch.zeros(()), num_tokens, {})
        loss, *_ = objective.add_to_loss(outputs, term, config, mode == "per-token", own)
        if mode == "pair":
            loss = loss * 2 / NUM_MICRO_BATCHES  # Megatron multiplies by the context-parallel size
        elif mode == "triple":
            loss = loss / num_tokens.clamp(min=1) / NUM_MICRO_BATCHES
        loss.backward()
    for weight in weights:
        torch.distributed.all_reduce(weight.grad)
        weight.grad /= sum(n for a in num_tokens_of for b in a for n in b) if mode == "per-token" else 4
    return [weight.grad for weight in weights]


def expected_gradients(mode):
    images, states, mask, weights = everything(torch.float64)
    total = 0
    num_tokens = [12, 11]  # of each micro-batch, all ranks
    for m in range(NUM_MICRO_BATCHES):
        takes_part = (torch.tensor(ELIGIBLE) > 0) & (mask[m].sum(-1) > 0)
        v_ND = (images[m] * weights[0])[takes_part]
        t_RBE = torch.einsum("rlbe,rbl->rbe", states[m] * weights[1], mask[m]) / mask[m].sum(-1).clamp(min=1)[..., None]
        share = num_tokens[m] / sum(num_tokens) if mode == "per-token" else 1 / NUM_MICRO_BATCHES
        total = total + WEIGHT * share * rsa_loss_reference(v_ND, t_RBE[takes_part])
    return torch.autograd.grad(total, weights)


@pytest.mark.parametrize("mode", ["triple", "per-token", "pair"])
def test_context_parallel_ranks_add_up_to_equation_6(mode):
    for gradients in processes.run(gradients_on_a_rank, 4, mode, False):
        for actual, expected in zip(gradients, expected_gradients(mode)):
            assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()  # float32 against float64


def test_counting_the_tower_once_a_context_rank_would_be_seen():
    (v_gradient, t_gradient), *_ = processes.run(gradients_on_a_rank, 4, "triple", True)
    expected_v, expected_t = expected_gradients("triple")
    assert (v_gradient - expected_v).abs().max() > 0.1 * expected_v.abs().max()
    assert (t_gradient - expected_t).abs().max() < 1e-5 * expected_t.abs().max()
