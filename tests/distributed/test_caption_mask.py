"""The caption mask rides in the loss mask; a language model that is given the loss mask, as megatron-core 0.20's is, sees none of it."""

import argparse

import pytest
import torch

from tests.support import packed_attention, processes
from tests.support.environment import ROOT  # noqa: F401


def passed_on(model, seen: list):
    """The model as 0.20 has it: LLaVAModel calls its language model with the spliced loss mask, which keeps what it is given."""
    spliced = {}
    splice = type(model)._preprocess_data

    class PassesOn(type(model)):
        def _preprocess_data(self, *args, **kwargs):
            result = splice(self, *args, **kwargs)
            spliced["loss_mask"] = result[2]
            return result

    class TakesIt(type(model.language_model)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs, loss_mask=spliced["loss_mask"])

        def forward(self, *args, loss_mask, **kwargs):
            seen.append(loss_mask.clone())
            return super().forward(*args, **kwargs)

    model.__class__, model.language_model.__class__ = PassesOn, TakesIt
    return model


def a_batch(packed: bool, dtype: torch.dtype) -> dict:
    """One image of 4 positions and a caption in each of two rows; or both samples packed into one."""
    from tests.support.core_job import IMAGE_TOKEN

    tokens = torch.tensor([[5, IMAGE_TOKEN, 11, 12, 13], [IMAGE_TOKEN, 21, 22, 23, 24]])
    loss_mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 1, 0]]).to(dtype)
    if dtype.is_floating_point:
        loss_mask = loss_mask * torch.tensor([1.0, 0.25, 2.5, 1 / 3, 0.0]).to(dtype)
    if packed:
        tokens, loss_mask = tokens.view(1, -1), loss_mask.view(1, -1)
    return dict(input_ids=tokens, loss_mask=loss_mask, labels=tokens.roll(-1, 1))


def forward(with_rsa: bool, packed: bool, dtype: torch.dtype, sabotage: bool = False):
    """What the language model gets for a loss mask, and what the model returns of it; with RSA also the spliced caption mask."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from rsa_megatron import RSAConfig, RSAPlugin
    from rsa_megatron.hooks.representations import RepresentationHooks
    from tests.support import core_job

    if sabotage:
        RepresentationHooks._without_caption_mask = lambda self, loss_mask_BL: loss_mask_BL
    local = core_job.get_gpt_layer_local_spec()
    local.submodules.self_attention.submodules.core_attention = packed_attention.PackedAttention
    core_job.get_gpt_layer_local_spec = lambda: local
    core_job.args = core_job.add_job_arguments(argparse.ArgumentParser()).parse_args(["--pixel-shuffle"])
    core_job.initialize()
    seen = []
    model = passed_on(core_job.model_provider(), seen)
    batch = a_batch(packed, dtype)
    if packed:
        # 5 texts' positions and an image that becomes 4.
        bounds = torch.tensor([0, 8, 16], dtype=torch.int32)
        batch["packed_seq_params"] = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=8, max_seqlen_kv=8)
    if with_rsa:
        RSAPlugin(RSAConfig()).attach(model)
        model.rsa_hooks.start_micro_batch(lambda: None)
    images = torch.randn(2, 3, core_job.IMAGE_SIZE, core_job.IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    position_ids = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    _, returned = model(images, position_ids=position_ids, attention_mask=None, **batch)
    found = model.rsa_hooks.pop().caption_mask_BL if with_rsa else None
    return seen, returned, found


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_the_language_model_is_given_the_loss_mask_as_it_was(packed, dtype):
    ((given,), returned, caption_mask), ((expected,), expected_returned, _) = (
        processes.run(forward, 1, with_rsa, packed, dtype)[0] for with_rsa in (True, False)
    )
    for actual in (given, returned):
        assert actual.dtype == expected.dtype == expected_returned.dtype == dtype
        assert torch.equal(actual, expected)
        assert not actual.is_floating_point() or not actual.signbit().any()  # not even -0.0
    assert caption_mask.sum() > 0


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_a_language_model_that_saw_the_marks_would_be_seen(packed):
    (given,), returned, _ = processes.run(forward, 1, True, packed, torch.float32, True)[0]
    assert (given < 0).any() and (given.abs() > 60).any() == packed and (returned >= 0).all()
