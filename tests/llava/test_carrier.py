"""v survives the way through the pipeline: exact in fp32, 16 bits in bf16, with its gradient and its sample."""

import pytest
import torch

from rsa_megatron.llava import carrier

WIDTHS = [(48, 32), (160, 128), (8, 32), (1152, 896), (17, 32), (18, 32), (19, 32)]


def vectors(width, batch_size=3):
    generator = torch.Generator().manual_seed(width)
    v_BD = torch.randn(batch_size, width, generator=generator) * 10
    sample_id_B = torch.randint(0, 2**63 - 1, (batch_size,), generator=generator)
    start_B = torch.randint(0, 2**31, (batch_size,), generator=generator)
    return v_BD.requires_grad_(), sample_id_B, start_B


@pytest.mark.parametrize("vector_width, hidden_width", WIDTHS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0), (torch.bfloat16, 2**-16), (torch.float16, 2**-21)])
def test_what_is_packed_is_unpacked(vector_width, hidden_width, dtype, tolerance):
    # hi keeps the type's own bits of v (8 in bf16, 11 in fp16), lo as many of the rest; fp16 has none below 2^-24.
    v_BD, sample_id_B, start_B = vectors(vector_width)
    rows_KBH = carrier.pack(v_BD, sample_id_B, start_B, hidden_width, dtype)
    assert rows_KBH.shape == (carrier.num_rows(vector_width, hidden_width, dtype), 3, hidden_width)
    assert rows_KBH.dtype == dtype
    hidden_SBH = torch.cat([torch.randn(5, 3, hidden_width, dtype=dtype), rows_KBH])
    assert carrier.vector_width(hidden_SBH) == vector_width
    unpacked_BD, unpacked_id_B, unpacked_start_B = carrier.unpack(rows_KBH, vector_width)
    smallest = 2**-24 if dtype == torch.float16 else 0
    assert torch.equal(unpacked_id_B, sample_id_B) and torch.equal(unpacked_start_B, start_B)
    assert ((unpacked_BD - v_BD).abs() <= tolerance * v_BD.abs() + smallest / 2).all()


def test_hi_alone_would_lose_the_digits():
    v_BD, _, _ = vectors(160)
    assert ((v_BD.bfloat16().float() - v_BD).abs() > 2**-11 * v_BD.abs()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_once(dtype):
    v_BD, *numbers = vectors(48)
    unpacked_BD, _, _ = carrier.unpack(carrier.pack(v_BD, *numbers, 32, dtype), 48)
    weight_BD = torch.randn(3, 48).bfloat16().float()  # exact in either type
    (unpacked_BD * weight_BD).sum().backward()
    assert torch.equal(v_BD.grad, weight_BD)
