"""The gather, and the loss after it, communicate in the forward pass alone."""

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

from rsa_megatron.alignment.gather import gather_rows
from rsa_megatron.alignment.loss import rsa_loss_of_rows, rsa_loss_reference
from tests.support import processes
from tests.support.adjoint_gather import all_gather_with_adjoint

NUM_OWN = 6


def own_vectors(num_ranks_before: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_ranks_before)
    return [torch.randn(NUM_OWN, width, generator=generator).requires_grad_() for width in (5, 8)]


def share(normalize, group):
    v_nD, t_nE = own_vectors(group.rank())
    gathered, first_row = gather_rows(torch.cat([v_nD, t_nE], dim=1), torch.ones(NUM_OWN, dtype=torch.bool), group)
    v_ND, t_NE = gathered.split([5, 8], dim=1)
    return rsa_loss_of_rows(v_nD, t_nE, v_ND, t_NE, first_row, normalize=normalize, group=group).loss


def with_the_adjoint(group):
    counts = [NUM_OWN] * group.size()
    return rsa_loss_reference(*(all_gather_with_adjoint(x, counts, group) for x in own_vectors(group.rank())))


def collectives_on_a_rank(normalize):
    """Names of the collectives that the forward and the backward pass start on this rank."""
    group = torch.distributed.group.WORLD
    with CommDebugMode() as forward:
        loss = with_the_adjoint(group) if normalize == "adjoint" else share(normalize, group)
    with CommDebugMode() as backward:
        loss.backward()
    return [{str(name): count for name, count in mode.get_comm_counts().items()} for mode in (forward, backward)]


@pytest.mark.parametrize(
    "normalize, expected",
    [
        ("none", {"c10d._allgather_base_": 1}),
        ("mean-distance", {"c10d._allgather_base_": 1, "c10d.allreduce_": 1}),
    ],
)
def test_forward_gathers_once_and_backward_starts_no_collective(normalize, expected):
    for forward, backward in processes.run(collectives_on_a_rank, 3, normalize):
        assert forward == expected
        assert backward == {}


def test_a_collective_in_backward_would_be_seen():
    for forward, backward in processes.run(collectives_on_a_rank, 2, "adjoint"):
        assert forward == {"c10d.allgather_": 2}
        assert backward == {"c10d.allreduce_": 2}


def rows_that_are_valid(valid_by_rank):
    group = torch.distributed.group.WORLD
    valid_B = torch.tensor(valid_by_rank[group.rank()])
    return gather_rows(torch.arange(4.0)[:, None] + 10 * group.rank(), valid_B, group)


def test_rows_come_in_the_order_of_ranks_without_those_that_are_not_valid():
    valid = [[True, False, True, True], [False] * 4, [False, True, False, False]]
    results = processes.run(rows_that_are_valid, 3, valid)
    assert [first_row for _, first_row in results] == [0, 3, 3]
    for rows, _ in results:
        assert rows.flatten().tolist() == [0, 2, 3, 21]
