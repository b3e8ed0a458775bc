"""Faults of megatron-core 0.19 as it is installed from PyPI, patched from outside, each only where it matters.

They end a run on GPUs as on the CPU, or --help, or make a resumed run another, and no argument of Megatron's gets round them alone.
"""

import argparse
import functools
import logging
from pathlib import Path

import megatron.core.datasets.utils
import torch
from megatron.core import mpu, rerun_state_machine
from megatron.core.optimizer import distrib_optimizer
from megatron.training import checkpointing, get_args, training

from rsa_megatron.ranks import exit_with_own_error, gather_objects, print_error_once


def repair() -> None:
    """Patch those of training; before pretrain()."""
    _skip_helper_build_without_makefile()
    _let_distributed_torch_adam_load()
    _keep_random_states_of_every_rank()


def repair_log() -> None:
    """Patch what the training loop prints; before pretrain(), and after Megatron's arguments are there."""
    _end_with_a_line_at_a_rejected_result()
    _begin_intervals_of_the_log_anew()


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


def _end_with_a_line_at_a_rejected_result() -> None:
    """A loss or gradient that is not finite ends a run in lines about the hardware and another iteration, and then in a traceback.

    Megatron runs the iteration again, tells all ranks, saves a checkpoint to --save, also where there is none, and ends. Here
    all ranks end without that. With --rerun-mode disabled the rank that has found it ends at once.
    """
    state_machine = rerun_state_machine.RerunStateMachine
    validate_result, decide_exit = state_machine.validate_result, state_machine.should_checkpoint_and_exit
    if not get_args().save:  # what it says is how to go on from that checkpoint
        logging.getLogger(rerun_state_machine.__name__).setLevel(logging.CRITICAL)

    def format_line(message: str) -> str:
        return f"iteration {get_args().curr_iteration + 1}: {message}"

    @functools.wraps(validate_result)
    def validate_or_end(self, result, rejection_func, message, *args, **kwargs):
        if not get_args().save:
            self.first_iteration_complete = True  # Megatron lets the first pass, as it could not save that
        try:
            validate_result(self, result, rejection_func, message, *args, **kwargs)
        except RuntimeError as error:
            if "Unexpected result" not in str(
                error
            ):  # it is not Megatron's verdict: reading the loss has met a fault of CUDA's or NCCL's
                raise
            exit_with_own_error(format_line(message))

    @functools.wraps(decide_exit)
    def decide_and_say(self):
        should_save, should_exit, status = decide_exit(self)
        if should_exit:
            call = self.failed_validation_call
            found = gather_objects(call and call.caller.message)
            # Of a loss the samples are known; gradients of other ranks are then no numbers either.
            found = sorted((m for m in found if m), key=lambda message: "samples of the batch" not in message)
            print_error_once(format_line(found[0] if found else "a result was rejected"))
        if should_save and not get_args().save:
            should_save, status = False, rerun_state_machine.EXIT_CODE_FAILED_ON_RESULT_VALIDATION
        return should_save, should_exit, status

    state_machine.validate_result, state_machine.should_checkpoint_and_exit = validate_or_end, decide_and_say


def _begin_intervals_of_the_log_anew() -> None:
    """The first iteration after a start has a line of its own, and the next line counts it once more.

    Where it ends an interval anyway, as with --log-interval 1, that next line would be the mean of the two.
    """
    training_log = training.training_log

    @functools.wraps(training_log)
    def log(loss_dict, total_loss_dict, learning_rate, iteration, *args, is_first_iteration: bool = False, **kwargs):
        is_first_iteration = is_first_iteration and iteration % get_args().log_interval != 0
        return training_log(
            loss_dict, total_loss_dict, learning_rate, iteration, *args, is_first_iteration=is_first_iteration, **kwargs
        )

    training.training_log = log


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
