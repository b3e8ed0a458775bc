"""Faults of megatron-core 0.19 as it is installed from PyPI, patched from outside, each only where it matters.

They end a run on GPUs as on the CPU, or --help, or make a resumed run another, and no argument of Megatron's gets round them alone.
"""

import argparse
from pathlib import Path

import megatron.core.datasets.utils
import torch
from megatron.core import mpu
from megatron.core.optimizer import distrib_optimizer
from megatron.training import checkpointing, get_args


def repair() -> None:
    """Patch those of training; before pretrain()."""
    _skip_helper_build_without_makefile()
    _let_distributed_torch_adam_load()
    _keep_random_states_of_every_rank()


def repair_help(parser: argparse.ArgumentParser) -> None:
    """Make --help print: the help of one of Megatron's flags has a bare % in it, which argparse takes for a format."""
    for action in parser._actions:
        try:
            _ = (action.help or "") % vars(action)
        except (ValueError, TypeError):
            action.help = action.help.replace("%", "%%")


def _skip_helper_build_without_makefile() -> None:
    """pretrain() runs `make` for a helper of Megatron's text data sets, and ends the process where make fails.

    The wheel holds the helper built already, but not the Makefile.
    """
    utils = megatron.core.datasets.utils
    if not Path(utils.__file__).with_name("Makefile").exists():
        utils.compile_helpers = lambda: None


def _let_distributed_torch_adam_load() -> None:
    """With torch's Adam the step count is part of each parameter's state, which loading a checkpoint gets wrong.

    The distributed optimizer (1) asks for the count before there is any state, or where a stage has nothing that
    learns: an assertion fails; (2) expects it among the tensors that each parameter is given, which leave it out: a
    KeyError; (3) gives all parameters one and the same count tensor, which each then advances: the bias correction
    jumps ahead; (4) writes into parameters that record gradients. Transformer Engine's and apex's Adam keep the count
    elsewhere.
    """
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer_class = distrib_optimizer.DistributedOptimizer
    state_dict, load_state_dict = optimizer_class.state_dict, optimizer_class.load_state_dict
    set_states = optimizer_class._set_main_param_and_optimizer_states

    def state_dict_with_state(self):
        if not self.optimizer.state:
            # Megatron's own way to make the state is a step on zero gradients; a rate of 0 keeps the weights.
            rates = [group["lr"] for group in self.optimizer.param_groups]
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0
            self._init_optimizer_states_with_dummy_values()
            for group, rate in zip(self.optimizer.param_groups, rates):
                group["lr"] = rate
        if not self.optimizer.state:
            # Nothing on this stage learns: there is no parameter to hold the count.
            self.optimizer.state["no parameter"] = {"step": torch.tensor(0.0)}
        return state_dict(self)

    @torch.no_grad()
    def set_states_but_step(self, model_param, tensors):
        return set_states(self, model_param, {**tensors, "step": None})  # what is no tensor is passed over

    def load_state_dict_with_steps_apart(self, state):
        load_state_dict(self, state)
        for parameter_state in self.optimizer.state.values():
            parameter_state["step"] = parameter_state["step"].clone()

    optimizer_class.state_dict = state_dict_with_state
    optimizer_class._set_main_param_and_optimizer_states = set_states_but_step
    optimizer_class.load_state_dict = load_state_dict_with_steps_apart


def _keep_random_states_of_every_rank() -> None:
    """With dropout, checkpoints have the random states of each data-parallel rank, not of the first for all.

    Megatron's ranks draw alike, as all their rows have one length. Ours are as long as their longest sample, so that each rank has
    drawn another number of times, and would go on otherwise. --data-parallel-random-init would save each rank's too,
    but is another run from its first weights on, and must be the same in every stage.
    """
    get_rng_state, load = checkpointing.get_rng_state, checkpointing._load_base_checkpoint

    def get_rng_state_of_every_rank(*arguments, **options):
        args = get_args()
        is_set = args.data_parallel_random_init
        args.data_parallel_random_init = is_set or args.hidden_dropout > 0 or args.attention_dropout > 0
        try:
            return get_rng_state(*arguments, **options)
        finally:
            args.data_parallel_random_init = is_set

    def load_with_own_state(*arguments, **options):
        state, *rest = load(*arguments, **options)
        states = (state or {}).get("rng_state")
        # Of another number of ranks: of the first, as Megatron does.
        if (
            isinstance(states, list)
            and len(states) > 1
            and not get_args().data_parallel_random_init
            and len(states) == mpu.get_data_parallel_world_size()
        ):
            state["rng_state"] = [states[mpu.get_data_parallel_rank()]]
        return state, *rest

    checkpointing.get_rng_state = get_rng_state_of_every_rank
    checkpointing._load_base_checkpoint = load_with_own_state
