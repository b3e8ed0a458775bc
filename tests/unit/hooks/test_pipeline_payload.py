"""v survives the way through the pipeline: exact in fp32, 16 bits in bf16, with its gradient and its sample."""

import pytest
import torch

from rsa_megatron.hooks import pipeline_payload
from rsa_megatron.hooks.pipeline_payload import PipelinePayload

NO_MASK = torch.zeros(3, 0, dtype=torch.int64)
WIDTHS = [(48, 32), (160, 128), (8, 32), (1152, 896), (17, 32), (18, 32), (19, 32)]


def vectors(width, batch_size=3) -> PipelinePayload:
    generator = torch.Generator().manual_seed(width)
    v_BD = torch.randn(batch_size, width, generator=generator) * 10
    sample_id_B = torch.randint(0, 2**63 - 1, (batch_size,), generator=generator)
    start_B = torch.randint(0, 2**31, (batch_size,), generator=generator)
    return PipelinePayload(v_BD.requires_grad_(), sample_id_B, start_B, NO_MASK[:1].expand(batch_size, 0))


@pytest.mark.parametrize("vector_width, hidden_width", WIDTHS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0), (torch.bfloat16, 2**-16), (torch.float16, 2**-21)])
def test_what_is_packed_is_unpacked(vector_width, hidden_width, dtype, tolerance):
    # hi keeps the type's own bits of v (8 in bf16, 11 in fp16), lo as many of the rest; fp16 has none below 2^-24.
    given = vectors(vector_width)
    rows_KBH = pipeline_payload.pack(given, hidden_width, dtype)
    assert rows_KBH.shape == (pipeline_payload.num_rows(vector_width, hidden_width, dtype), 3, hidden_width)
    assert rows_KBH.dtype == dtype
    hidden_SBH = torch.cat([torch.randn(5, 3, hidden_width, dtype=dtype), rows_KBH])
    assert pipeline_payload.vector_width(hidden_SBH) == vector_width
    assert pipeline_payload.num_rows_received(hidden_SBH, vector_width) == len(rows_KBH)
    found = pipeline_payload.unpack(rows_KBH, vector_width)
    smallest = 2**-24 if dtype == torch.float16 else 0
    assert torch.equal(found.sample_id_B, given.sample_id_B) and torch.equal(found.start_B, given.start_B)
    assert ((found.vector_BF - given.vector_BF).abs() <= tolerance * given.vector_BF.abs() + smallest / 2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length, shards", [(1, 1), (7, 1), (64, 2), (255, 1), (256, 4), (300, 3)])
def test_a_mask_as_long_as_the_row_tells_of_finds_its_place(length, shards, dtype):
    """K depends on how long the mask is, and how long it is on K: one K alone fits, whatever the length."""
    mask_BL = (torch.rand(3, length * shards, generator=torch.Generator().manual_seed(length)) < 0.5).long()
    rows_KBH = pipeline_payload.pack(vectors(40)._replace(mask_BL=mask_BL), 8, dtype)
    hidden_SBH = torch.cat([torch.zeros(length, 3, 8, dtype=dtype), rows_KBH])
    assert pipeline_payload.num_rows_received(hidden_SBH, 40, shards) == len(rows_KBH)
    assert torch.equal(pipeline_payload.unpack(rows_KBH, 40, length * shards).mask_BL, mask_BL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "num_samples, length, shards", [(1, 0, 0), (3, 0, 0), (300, 0, 0), (1, 64, 2), (3, 255, 1), (7, 300, 4)]
)
def test_packed_samples_have_their_rows_one_after_the_other(num_samples, length, shards, dtype):
    """How many they are, and where each has its caption, is read off what is received."""
    generator = torch.Generator().manual_seed(length)
    mask_nL = (torch.rand(num_samples, length * shards, generator=generator) < 0.5).long()
    given = vectors(40, num_samples)._replace(mask_BL=mask_nL)
    rows = pipeline_payload.pack(given, 16, dtype, in_one_row=True)
    k = pipeline_payload.num_rows(40, 16, dtype, length * shards)
    assert rows.shape == (num_samples * k, 1, 16)
    received = torch.cat([torch.randn(length or 9, 1, 16).to(dtype), rows])
    assert pipeline_payload.num_packed_samples(received) == num_samples
    assert pipeline_payload.vector_width(received) == 40
    assert pipeline_payload.num_rows_received(received, 40, shards, num_samples) == len(rows)
    found = pipeline_payload.unpack(rows, 40, length * shards, num_samples)
    assert torch.equal(found.sample_id_B, given.sample_id_B) and torch.equal(found.mask_BL, mask_nL)
    # Each sample's are those that it would have as a row of its own.
    alone = pipeline_payload.unpack(pipeline_payload.pack(given, 16, dtype), 40, length * shards)
    assert torch.equal(found.vector_BF, alone.vector_BF)
    weight_BF = torch.randn(num_samples, 40, generator=generator).bfloat16().float()
    (found.vector_BF * weight_BF).sum().backward()
    assert torch.equal(given.vector_BF.grad, weight_BF)


def test_rows_of_one_sample_say_that_they_are_not_packed():
    for batch_size in (1, 3):
        rows_KBH = pipeline_payload.pack(vectors(48, batch_size), 32, torch.bfloat16)
        assert pipeline_payload.num_packed_samples(rows_KBH) == 0


def test_rows_without_a_carrier_are_named():
    with pytest.raises(RuntimeError, match="hold no payload of a vector of width 40: do all stages have RSA's hooks"):
        pipeline_payload.num_rows_received(torch.zeros(3, 1, 8), 40, 1)


def test_packing_again_changes_nothing():
    """A stage on the way takes the vector out, puts its sums in and packs it again: v stays to the bit."""
    rows_KBH = pipeline_payload.pack(vectors(48), 32, torch.bfloat16)
    assert torch.equal(pipeline_payload.pack(pipeline_payload.unpack(rows_KBH, 48), 32, torch.bfloat16), rows_KBH)


def test_hi_alone_would_lose_the_digits():
    v_BD = vectors(160).vector_BF
    assert ((v_BD.bfloat16().float() - v_BD).abs() > 2**-11 * v_BD.abs()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_once(dtype):
    given = vectors(48)
    found_BF = pipeline_payload.unpack(pipeline_payload.pack(given, 32, dtype), 48).vector_BF
    weight_BF = torch.randn(3, 48).bfloat16().float()  # exact in either type
    (found_BF * weight_BF).sum().backward()
    assert torch.equal(given.vector_BF.grad, weight_BF)
