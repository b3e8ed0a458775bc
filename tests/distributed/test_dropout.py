"""With dropout on: parameters that ranks hold in common stay one and the same, and gradients are the loss's.

What is dropped differs from layout to layout, as in Megatron, so that layouts are not compared with one another. Each launch
trains on its layout's own data, read by our loaders on one tensor-parallel rank.
"""

import contextlib
from dataclasses import dataclass

import pytest
import torch

from tests.support import layouts, processes, tiny
from tests.support.layouts import layout_of
from tests.support.parity import flags

DROPOUT = ("--hidden-dropout", "0.3", "--attention-dropout", "0.3")
# A step of this length along the gradient of the text's embeddings. What is left out, the third derivative, costs 2.7e-4 at most,
# four times that of a step twice as long, and float32 1e-5. Gradients of numbers that another rank has dropped miss by 0.15.
STEP, TOLERANCE = 0.02, 1e-3


@dataclass
class Rank:
    """What a rank found, and the parameters that it ended with."""

    pipeline_rank: int
    tensor_rank: int
    parameters: dict[str, torch.Tensor]
    #: of which tensor-parallel ranks hold the whole
    replicated: set[str]
    same_gradients_when_recomputed: bool
    same_without_random_states: bool
    #: the loss's difference quotient along the gradient of the embeddings, as a part of the gradient's length
    slope: float | None


def train(argv: list[str], sabotage) -> Rank:
    from megatron.core import mpu
    from megatron.training import get_args

    trainer = layouts.Trainer(argv, sabotage)
    [model] = trainer.model
    point = Point(trainer)
    gradients = point.gradients()
    set_recompute(model, on=True)
    recomputed = point.gradients()
    with random_states_not_set():
        without = point.gradients()
    set_recompute(model, on=False)
    slope = point.slope(gradients) if mpu.get_pipeline_model_parallel_world_size() == 1 else None
    point.restore()
    for num_workers in (0, 1):
        get_args().num_workers = num_workers
        loader = read_train_split()
        for iteration in range(2):
            trainer.step(loader, iteration)
    return Rank(
        pipeline_rank=mpu.get_pipeline_model_parallel_rank(),
        tensor_rank=mpu.get_tensor_model_parallel_rank(),
        parameters={name: p.detach().clone() for name, p in model.named_parameters()},
        replicated={name for name, p in model.named_parameters() if not getattr(p, "tensor_model_parallel", False)},
        same_gradients_when_recomputed=are_equal(recomputed, gradients),
        same_without_random_states=are_equal(without, gradients),
        slope=slope,
    )


def read_train_split():
    from rsa_megatron.training.providers import datasets_provider

    loader, _, _ = datasets_provider(None)
    return loader and processes.kept(loader)


def are_equal(actual: dict, expected: dict) -> bool:
    assert any(gradient.any() for gradient in expected.values())
    return all(torch.equal(actual[name], expected[name]) for name in expected)


def set_recompute(model, *, on: bool):
    from megatron.core.transformer.transformer_block import TransformerBlock

    for block in model.modules():
        if isinstance(block, TransformerBlock):
            block.config.recompute_granularity = "full" if on else None
            block.config.recompute_method = "uniform" if on else None
            block.config.recompute_num_layers = 1 if on else None


@contextlib.contextmanager
def random_states_not_set():
    """Megatron recomputes with new numbers."""
    from megatron.core.tensor_parallel import random

    right, random._set_all_rng_states = random._set_all_rng_states, lambda *states: None
    try:
        yield
    finally:
        random._set_all_rng_states = right


class Point:
    """The model as it is now, and the random numbers that come next: a step from here can be taken again."""

    def __init__(self, trainer):
        from megatron.core.tensor_parallel.random import _get_all_rng_states

        self.trainer, self.states = trainer, _get_all_rng_states()
        self.parameters = {name: p.detach().clone() for name, p in trainer.model[0].named_parameters()}
        batch = tiny.batch(5)
        self.batches = [tiny.part(batch, trainer.data_parallel_rank, trainer.args.data_parallel_size)]

    def restore(self, shift: dict[str, torch.Tensor] | None = None):
        from megatron.core.tensor_parallel.random import _set_all_rng_states

        cpu, cuda, tracked = self.states
        _set_all_rng_states(cpu, cuda, dict(tracked))
        for name, parameter in self.trainer.model[0].named_parameters():
            parameter.data.copy_(self.parameters[name] + (shift or {}).get(name, 0))

    def gradients(self) -> dict[str, torch.Tensor]:
        self.restore()
        self.trainer.step(self.batches, 1)
        return {name: p.main_grad.clone() for name, p in self.trainer.model[0].named_parameters()}

    def loss(self, shift) -> float:
        self.restore(shift)
        figures = self.trainer.step(self.batches, 1)
        return figures["lm loss"] + self.trainer.args.rsa_weight * figures["rsa loss"]

    def slope(self, gradients) -> float:
        from megatron.core import mpu

        [name] = [name for name in gradients if name.endswith("word_embeddings.weight")]
        squares = gradients[name].double().square().sum()
        torch.distributed.all_reduce(squares, group=mpu.get_tensor_model_parallel_group())
        length = squares.sqrt().item()
        up, down = (self.loss({name: sign * STEP / length * gradients[name]}) for sign in (1, -1))
        return (up - down) / (2 * STEP * length)


def run(name: str, demo, folder, sabotage=None) -> list[Rank]:
    layout = layout_of(name)
    argv = [*flags(demo, 1, False, False, layout.data_parallel_size, folder), "--seq-length", "128", *DROPOUT]
    argv += ["--shuffle-buffer-size", "8", *layout.flags]
    return processes.run(train, layout.world_size, argv, sabotage)


def differing(ranks: list[Rank]) -> set[str]:
    """Parameters that are not the same on ranks that hold the same."""
    return {
        name
        for one in ranks
        for other in ranks
        for name in one.parameters
        if one.pipeline_rank == other.pipeline_rank
        and (one.tensor_rank == other.tensor_rank or name in one.replicated)
        and not torch.equal(one.parameters[name], other.parameters[name])
    }


@pytest.mark.parametrize("name", ["DP=2", "TP=2", "TP=2 SP", "TP=2 PP=2"])
def test_ranks_stay_together(demo, tmp_path, name):
    ranks = run(name, demo, tmp_path)
    assert not differing(ranks)
    assert all(rank.same_gradients_when_recomputed and not rank.same_without_random_states for rank in ranks)
    if "PP" not in name:
        assert [rank.slope for rank in ranks] == [pytest.approx(1, abs=TOLERANCE)] * len(ranks)


def reading_draws_from_dropouts_generator():
    from rsa_megatron.data import loaders

    loaders.keep_generators = contextlib.nullcontext


def test_a_seed_drawn_for_reading_would_be_seen(demo, tmp_path):
    ranks = run("TP=2", demo, tmp_path, reading_draws_from_dropouts_generator)
    assert len(differing(ranks)) > len(ranks[0].replicated) / 2  # 21 of 26


def each_rank_drops_embeddings_of_its_own():
    from rsa_megatron.models import llava_onevision

    llava_onevision.SharedDropout = torch.nn.Dropout


def test_embeddings_dropped_differently_would_be_seen(demo, tmp_path):
    ranks = run("TP=2 SP", demo, tmp_path, each_rank_drops_embeddings_of_its_own)
    assert abs(ranks[0].slope - 1) > 50 * TOLERANCE
