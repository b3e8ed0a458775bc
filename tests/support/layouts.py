"""Runs Megatron's own train_step on the tiny model under a layout, and brings back what must not depend on it."""

import sys
from dataclasses import dataclass, field

import torch

from tests.support import processes, tiny


@dataclass(frozen=True)
class Layout:
    """How a run is split over processes, and the flags that say so."""

    name: str
    world_size: int
    data_parallel_size: int
    flags: tuple[str, ...] = ()


TP = ("--tensor-model-parallel-size", "2")
PP = ("--pipeline-model-parallel-size", "2")
VPP = (*PP, "--num-virtual-stages-per-pipeline-rank", "2")
SINGLE = Layout("one process", 1, 1)
LAYOUTS = (
    Layout("DP=2", 2, 2),
    Layout("TP=2", 2, 1, TP),
    Layout("PP=2", 2, 1, PP),
    Layout("TP=2 PP=2", 4, 1, TP + PP),
    Layout("DP=2 PP=2", 4, 2, PP),
    Layout("PP=2 VPP=2", 2, 1, VPP),
    Layout("TP=2 SP", 2, 1, (*TP, "--sequence-parallel")),
)


def layout_of(name: str) -> Layout:
    return next(layout for layout in LAYOUTS if layout.name == name)


@dataclass
class Run:
    """What a run gave."""

    #: per iteration, the figures of the log line
    losses: list[dict[str, float]]
    #: gradient of the first iteration and parameters after the last, whole tensors by their names in a checkpoint
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)


def run(layout: Layout, batches: list, flags: list[str], *, load=None, sabotage=None, timeout=180.0) -> Run:
    """Train on `batches`: batches[iteration][micro-batch] are the samples of all data-parallel ranks.

    Args:
        load: a checkpoint of initial weights; random ones where there is none.
        sabotage: a function called in each process before anything is built, to break something on purpose.
    """
    argv = [*layout.flags, *flags, *(["--pretrained-checkpoint", str(load)] if load else [])]
    ranks = processes.run(_train, layout.world_size, layout, batches, argv, sabotage, timeout=timeout)
    losses = next(rank["losses"] for rank in ranks if rank["losses"][0])
    return Run(losses, *(_assemble([rank[what] for rank in ranks]) for what in ("gradients", "parameters")))


def largest_difference(actual: dict, expected: dict) -> tuple[float, str]:
    """Over all tensors: the largest |a - e| as a part of the largest |e| of that tensor; and which tensor."""
    assert actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys())
    differences = {
        name: ((actual[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-30)).item()
        for name in expected
    }
    name = max(differences, key=differences.get)
    return differences[name], name


def _train(layout: Layout, batches: list, argv: list[str], sabotage) -> dict:
    trainer = Trainer(argv, sabotage)
    losses, gradients = [], None
    for iteration, micro_batches in enumerate(batches):
        rank, size = trainer.data_parallel_rank, layout.data_parallel_size
        losses.append(trainer.step([tiny.part(whole, rank, size) for whole in micro_batches], iteration))
        if gradients is None:
            gradients = trainer.shards(lambda p: p.main_grad if p.requires_grad else torch.zeros_like(p))
    return {"losses": losses, "gradients": gradients, "parameters": trainer.shards(lambda parameter: parameter.data)}


class Trainer:
    """What Megatron's pretrain() sets up, held so that single steps can be looked into."""

    def __init__(self, argv: list[str], sabotage=None):
        import pretrain_llava_rsa as script
        from megatron.core import mpu
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.enums import ModelType
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.utils import get_model_config
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.initialize import initialize_megatron
        from megatron.training.training import setup_model_and_optimizer

        tiny.register()
        if sabotage:
            sabotage()
        sys.argv = ["pretrain_llava_rsa.py", "--model", "tiny", *argv]
        rsa = script.RSAPlugin()
        self.args = script.parse(rsa)
        script.megatron_patches.repair()
        script.LearningRates(self.args).apply()
        initialize_megatron()
        self.model, self.optimizer, self.scheduler = setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            model_provider_func=rsa.wrap_model_provider(script.model_provider),
            checkpointing_context={},
            cfg_container=pretrain_cfg_container_from_args(self.args),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        self.forward_step = rsa.wrap_forward_step(script.forward_step)
        self.data_parallel_rank = mpu.get_data_parallel_rank()
        self.reads_data = mpu.get_tensor_model_parallel_rank() == 0
        self.config = get_model_config(self.model[0])
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        for chunk in self.model:
            chunk.train()

    def step(self, micro_batches: list, iteration: int) -> dict[str, float]:
        """One iteration of Megatron's training loop; the figures of its log line, on the last stage."""
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.training.training import train_step

        # Ranks of a distributed optimizer hold a part of each gradient, but in iterations whose gradients Megatron is
        # to save: let the first be one.
        self.args.curr_iteration = iteration
        self.args.save_wgrads_interval = 1 if self.args.use_distributed_optimizer and iteration == 0 else None
        iterator = [RerunDataIterator(iter(micro_batches)) if self.reads_data else None for _ in self.model]
        figures, *_ = train_step(
            self.forward_step,
            iterator if len(self.model) > 1 else iterator[0],
            self.model,
            self.optimizer,
            self.scheduler,
            self.config,
            get_forward_backward_func(),
            iteration=iteration,
        )
        return {name: value.item() for name, value in figures.items()}

    def shards(self, value_of) -> list[tuple]:
        """This rank's pieces of a value of each parameter: (name, shape of the whole, where the piece lies, piece).

        Megatron's own description of its sharded checkpoints says where; so this holds for any layout.
        """
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
        from megatron.core.utils import get_attr_wrapped_model

        pieces = []
        for chunk in self.model:
            llava = get_attr_wrapped_model(chunk, "image_token_index", return_model_obj=True)
            kept = {parameter: parameter.data for parameter in llava.parameters()}
            for parameter in kept:
                parameter.data = value_of(parameter).detach().clone()
            state = llava.sharded_state_dict()
            apply_factories(state)
            for tensor in nested_values(state):
                if isinstance(tensor, ShardedTensor) and tensor.data is not None:
                    shape, offset = tensor.global_shape, tensor.global_offset
                    data = tensor.data.clone().view([1] * (len(shape) - tensor.data.ndim) + list(tensor.data.shape))
                    pieces.append((tensor.key, shape, offset, data))
            for parameter, data in kept.items():
                parameter.data = data
        return pieces


def _assemble(pieces_of_ranks: list[list]) -> dict[str, torch.Tensor]:
    whole, filled = {}, {}
    for pieces in pieces_of_ranks:
        for name, shape, offset, data in pieces:
            target = whole.setdefault(name, torch.zeros(shape))
            done = filled.setdefault(name, torch.zeros(shape, dtype=torch.bool))
            where = tuple(slice(start, start + size) for start, size in zip(offset, data.shape))
            target[where], done[where] = data, True
    missing = [name for name, done in filled.items() if not done.all()]
    assert not missing, f"no rank holds all of {missing}"
    return whole
