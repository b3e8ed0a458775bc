"""What RSA cannot train is refused in one line when the hooks are put on, or at the first batch; on a real model."""

import contextlib
from dataclasses import fields, replace

import pytest
import torch

from tests.support import layouts, processes, tiny

#: what is set on the model's config or (as "model.") on the model, and what the line says
SETTINGS = [
    (dict(mtp_num_layers=1), "leave --mtp-num-layers out"),
    (dict(overlap_moe_expert_parallel_comm=True), "leave --overlap-moe-expert-parallel-comm out"),
    (dict(cuda_graph_impl="full_iteration"), "leave the full-iteration CUDA graph out"),
    (dict(cuda_graph_scope=["full_iteration"]), "leave the full-iteration CUDA graph out"),
    (dict(hybrid_context_parallel=True), "leave --hybrid-context-parallel out"),
    (dict(tensor_model_parallel_size=2), "give the tower's config the decoder's tensor_model_parallel_size"),
    ({"model.add_encoder": False}, "build LLaVAModel with add_encoder=pre_process"),
    ({"model.add_decoder": False}, "build LLaVAModel with add_encoder=pre_process, add_decoder=True"),
    ({"model.dynamic_resolution": True}, "leave dynamic resolution and video patches out"),
    ({"model.temporal_patch_dim": 2}, "leave dynamic resolution and video patches out"),
]
INNER = [
    (dict(recompute_granularity="full"), "set --recompute-granularity selective"),
    (dict(cuda_graph_impl="local"), "set --cuda-graph-impl none"),
]


@contextlib.contextmanager
def being_set(model, settings: dict):
    kept = []
    for name, value in settings.items():
        target = model if name.startswith("model.") else model.config
        name = name.removeprefix("model.")
        kept.append((target, name, getattr(target, name, None)))
        setattr(target, name, value)
    yield
    for target, name, value in kept:
        setattr(target, name, value)


def what_is_said(argv):
    from megatron.core.models.huggingface import HuggingFaceModule
    from megatron.core.utils import unwrap_model

    from rsa_megatron import RSAConfig, RSAPlugin

    (model,) = unwrap_model(layouts.Trainer([*argv, "--rsa-weight", "0"]).model)
    names = {name for settings, _ in (*SETTINGS, *INNER) for name in settings if not name.startswith("model.")}
    # A name that a version of Megatron lacks counts as off: one that is new here has to be noticed.
    assert names <= {field.name for field in fields(model.config)}
    for layers, cases in (("-1:-1", SETTINGS), ("-1:-1,-1:1", INNER)):
        plugin = RSAPlugin(RSAConfig(layers=layers))
        for settings, message in cases:
            with being_set(model, settings), pytest.raises(ValueError, match=message):
                plugin.attach(model)
    # As megatron-core 0.16 builds it for language_model_type hf://...: transformers' model in a wrapper.
    wrapped = HuggingFaceModule(model.config)
    with (
        being_set(model, {"model.language_model": wrapped}),
        pytest.raises(
            ValueError, match="its language model is a HuggingFaceModule without Megatron's decoder layers: build"
        ),
    ):
        RSAPlugin().attach(model)
    plugin = RSAPlugin(RSAConfig(scope="global-batch", normalize="mean-distance"))
    with pytest.raises(ValueError, match="leave it, or --rsa-scope global-batch, out"):
        plugin.attach(model)
    with pytest.raises(ValueError, match="RSA is for megatron.core's LLaVAModel: there is none in Linear"):
        RSAPlugin().attach(torch.nn.Linear(1, 1))
    for settings, _ in INNER:  # of the last layers alone they are no matter
        with being_set(model, settings):
            RSAPlugin().attach(model)
        del model.rsa_hooks
    # A wrapper that has a model within, as some of Megatron-Bridge's have.
    outer = torch.nn.Module()
    outer.llava_model = model
    assert RSAPlugin().attach([outer]) == [outer] and hasattr(model, "rsa_hooks")


def test_settings_that_rsa_cannot_follow(demo):
    processes.run(what_is_said, 1, flags(demo))


def flags(demo) -> list[str]:
    return ["--tokenizer-model", str(demo / "tokenizer"), "--data-path", str(demo / "data" / "captions")]


def with_wrong_tiles():
    batch = tiny.batch(0)
    return replace(batch, rsa=replace(batch.rsa, num_tiles=torch.tensor([1, 1, 1, 2])))


def test_tiles_that_are_not_the_images_are_named(demo):
    with pytest.raises(processes.Failed, match="the tower was given 4 tiles, and the batch's samples have 5"):
        layouts.run(layouts.SINGLE, [[with_wrong_tiles()]], [*flags(demo), "--rsa-weight", "1"])
