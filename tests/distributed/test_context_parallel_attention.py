"""The tests' own context-parallel attention is causal attention of the whole row, so it may take Transformer Engine's place."""

import pytest
import torch

from tests.support import context_parallel_attention, processes
from tests.support.context_parallel_attention import in_order

B, N, G, W = 2, 4, 2, 3  # samples, heads, groups of keys, width of a head


LENGTH = 16


def queries_keys_values() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(LENGTH, B, n, W, generator=generator, dtype=torch.float64) for n in (N, G, G)]


def weight_of_each_output() -> torch.Tensor:
    return torch.randn(LENGTH, B, N, W, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def attention_on_a_rank(sabotage):
    from megatron.core.utils import get_batch_on_this_cp_rank

    from rsa_megatron.hooks import token_positions

    if sabotage:
        sabotage()
    group = torch.distributed.new_group(list(range(torch.distributed.get_world_size())))

    def own(whole):  # Megatron's split, of rows in dimension 1
        part = get_batch_on_this_cp_rank({"rows": whole.transpose(0, 1)}, is_hybrid_cp=False, cp_group=group)["rows"]
        return part.transpose(0, 1).contiguous()

    parts = [own(whole).requires_grad_() for whole in queries_keys_values()]
    seen = context_parallel_attention.attention(*parts, group)
    gradients = torch.autograd.grad((seen * own(weight_of_each_output())).sum(), parts)
    places = own(torch.arange(LENGTH)[:, None])[:, 0]
    assert torch.equal(
        places, token_positions.context_parallel_part(torch.arange(LENGTH)[None], group.size(), group.rank())[0]
    )
    return places, seen.detach(), gradients


def expected_attention() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Position by position, head by head, over the whole row."""
    query, key, value = whole = [x.requires_grad_() for x in queries_keys_values()]
    rows = []
    for s in range(LENGTH):
        for b in range(B):
            for n in range(N):
                g = n * G // N
                share = (key[: s + 1, b, g] @ query[s, b, n] / W**0.5).softmax(0)
                rows.append(share @ value[: s + 1, b, g])
    seen = torch.stack(rows).view(LENGTH, B, N, W)
    return seen.detach(), torch.autograd.grad((seen * weight_of_each_output()).sum(), whole)


def largest_error(size: int, sabotage=None) -> float:
    """Of any output or gradient on any rank."""
    expected_seen, expected_gradients = expected_attention()
    errors = []
    for places, seen, gradients in processes.run(attention_on_a_rank, size, sabotage):
        for actual, expected in zip((seen, *gradients), (expected_seen, *expected_gradients)):
            errors.append((actual - expected[places]).abs().max().item())
    return max(errors)


def keys_without_gradient():
    right = context_parallel_attention.all_gather_with_adjoint

    def own_alone(rows, counts, group):
        others = right(rows, counts, group).detach()
        own = torch.nn.functional.pad(rows - rows.detach(), (0, 0, group.rank() * len(rows), 0))
        return others + torch.nn.functional.pad(own, (0, 0, 0, len(others) - len(own)))

    context_parallel_attention.all_gather_with_adjoint = own_alone


@pytest.mark.parametrize("size", [1, 2, 4])
def test_split_attention_is_causal_attention_of_the_whole_row(size):
    assert largest_error(size) < 1e-13  # float64: some tens of roundings of 1e-16 of numbers up to 10


@pytest.mark.parametrize("sabotage", [in_order, keys_without_gradient])
def test_wrong_attention_would_be_seen(sabotage):
    assert largest_error(2, sabotage) > 0.1
