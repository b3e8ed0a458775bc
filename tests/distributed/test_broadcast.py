"""Tensors reach the other ranks as they are, empty ones and changing shapes included."""

import torch

from rsa_megatron.hooks.broadcast import broadcast_tensors
from tests.support import processes

BATCHES = [
    dict(tokens=torch.arange(6).view(2, 3), images=torch.zeros(0, 3, 2, 2), count=torch.tensor(7)),
    dict(tokens=torch.arange(4).view(4, 1), images=torch.ones(2, 3, 2, 2), count=torch.tensor(0)),
]


def received():
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    return [broadcast_tensors(list(batch), batch if rank == 0 else None, torch.float32, group) for batch in BATCHES]


def test_every_rank_has_what_rank_0_read():
    for world_size in (1, 2):
        for result in processes.run(received, world_size):
            for actual, expected in zip(result, BATCHES):
                for name in expected:
                    assert actual[name].dtype == torch.float32
                    assert torch.equal(actual[name], expected[name].float())
