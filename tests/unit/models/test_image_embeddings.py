"""An image that is an embedding takes all its positions from one projected row."""

import torch

from rsa_megatron.anyres import ImageLayout
from rsa_megatron.models.anyres_projector import pack_images


def test_all_positions_are_one_projected_embedding():
    tokens_TPH = torch.randn(2, 1, 4, requires_grad=True)
    packed = pack_images(
        tokens_TPH, [ImageLayout.of_embedding(576), ImageLayout.of_embedding(1)], torch.zeros(4), side=2, max_tiles=9
    )
    assert (
        packed.shape == (577, 4)
        and torch.equal(packed[:576], tokens_TPH[0].expand(576, 4))
        and torch.equal(packed[576:], tokens_TPH[1])
    )
    packed.sum().backward()
    assert torch.equal(tokens_TPH.grad[:, 0, 0], torch.tensor([576.0, 1.0]))
