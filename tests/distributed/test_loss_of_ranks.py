"""Each rank computes its own rows' share of the loss: together they are the whole, and the gradient needs no collective."""

import pytest
import torch

from rsa_megatron.alignment.gather import gather_rows
from rsa_megatron.alignment.loss import rsa_loss_of_rows, rsa_loss_reference
from tests.support import processes
from tests.support.adjoint_gather import all_gather_with_adjoint
from tests.support.loss_cases import pairs, relative, value_and_gradients

# Over ranks. Ragged: of 12 rows a rank, these many are valid; one rank has none.
VALID = {2: [9, 12], 3: [7, 0, 12]}


def shares_on_a_rank(distance, normalize, oracle):
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    world_size = torch.distributed.get_world_size()
    num_valid = VALID[world_size][rank]
    v_BD, t_BE = pairs(num_pairs=12, seed=rank)
    own_v, own_t = v_BD[:num_valid], t_BE[:num_valid]
    if oracle:
        all_v, all_t = (all_gather_with_adjoint(x, VALID[world_size], group) for x in (own_v, own_t))
        value = rsa_loss_reference(all_v, all_t, distance=distance, normalize=normalize) / world_size
    else:
        payload_BW = torch.cat([v_BD, t_BE], dim=1)
        gathered, first_row = gather_rows(payload_BW, torch.arange(12) < num_valid, group)
        all_v, all_t = gathered.split([5, 8], dim=1)
        assert not gathered.requires_grad
        value = rsa_loss_of_rows(
            own_v, own_t, all_v, all_t, first_row, distance=distance, normalize=normalize, group=group
        ).loss
    gradients = torch.autograd.grad(value, (v_BD, t_BE))
    return value.item(), [x.detach() for x in (own_v, own_t)], gradients


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "distance, normalize",
    [("euclidean", "none"), ("cosine", "none"), ("manhattan", "none"), ("euclidean", "mean-distance")],
)
def test_shares_of_ranks_add_up_to_the_whole(world_size, distance, normalize):
    results = processes.run(shares_on_a_rank, world_size, distance, normalize, False)
    v_ND, t_NE = (torch.cat([result[1][side] for result in results]).requires_grad_() for side in range(2))
    expected = value_and_gradients(rsa_loss_reference, v_ND, t_NE, distance=distance, normalize=normalize)
    assert sum(result[0] for result in results) == pytest.approx(expected[0].item(), rel=1e-13)
    for side in range(2):
        actual = torch.cat([r[2][side][:n] for r, n in zip(results, VALID[world_size])])
        assert relative(actual, expected[1 + side]) < 1e-13
        assert all((r[2][side][n:] == 0).all() for r, n in zip(results, VALID[world_size]))


def test_shares_equal_the_gather_whose_backward_communicates():
    shares = processes.run(shares_on_a_rank, 3, "euclidean", "none", False)
    oracle = processes.run(shares_on_a_rank, 3, "euclidean", "none", True)
    for share, adjoint in zip(shares, oracle):
        for actual, expected in zip(share[2], adjoint[2]):
            assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-14)
