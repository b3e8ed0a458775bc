"""A run that goes on with another schedule than that of its checkpoint: which of the two counts.

Megatron's scheduler of learning rate and weight decay holds its values against those in the checkpoint, and fails where one differs;
--override-opt_param-scheduler takes the command line's, --use-checkpoint-opt_param-scheduler the checkpoint's. Here, before the model
is built: where only the run's length differs, what is meant is plain, and the command line's are taken; for anything else one of the
two flags is asked for.

The optimizer finds its parameter groups in a checkpoint by their rates. So it is made with the rates of the checkpoint, and given this
run's once it has loaded them (learning_rates.py); what groups there are cannot change.
"""

import argparse
import types
import warnings
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.training import training

from rsa_megatron.ranks import print_once
from rsa_megatron.screen import Explained
from rsa_megatron.training.checkpoint_faults import explain_unreadable
from rsa_megatron.training.learning_rates import peak_rates
from rsa_megatron.training.run_folder import read_tracker

_LENGTHS = {"lr_decay_steps", "wd_incr_steps"}
# What the flags of each value are. Steps are samples: iterations times the global batch size.
_FLAGS = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_warmup_steps": "samples of warm-up (--lr-warmup-fraction, --lr-warmup-iters, --lr-warmup-samples)",
    "lr_decay_steps": "samples of decay (--train-iters, --lr-decay-iters, --lr-decay-samples)",
    "lr_decay_style": "--lr-decay-style",
    "start_wd": "--weight-decay (--start-weight-decay)",
    "end_wd": "--end-weight-decay",
    "wd_incr_steps": "samples in all (--train-iters, --train-samples)",
    "wd_incr_style": "--weight-decay-incr-style",
    "vision_lr": "--vision-lr",
    "projector_lr": "--projector-lr",
}
_OF_SAMPLES = ("seq_length", "template", "label_style", "image_aspect_ratio", "image_grids")
_RATES = ("lr", "min_lr", "vision_lr", "projector_lr")


def settle_schedule(args) -> str | None:
    """Choose between the schedule of the command line and that of the checkpoint which the run resumes.

    Sets Megatron's flag for the first where it is taken. Sets `args.rates_in_checkpoint`: the rates by which the optimizer finds its
    parameter groups there; None where it is not loaded, or they are the run's.

    Returns:
        A message where the two differ.

    Raises:
        ValueError: they differ, and it is not plain which is meant; or the optimizer cannot go on.
    """
    args.rates_in_checkpoint = None
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        raise ValueError(
            "--override-opt_param-scheduler takes the schedule of the command line, --use-checkpoint-opt_param-scheduler that of "
            "the checkpoint: leave one out"
        )
    if args.skip_train:
        return None
    now = _make_schedule(args)
    state = _read_state(args)
    if state is None:
        return None
    _settle_optimizer(args, getattr(state["args"], "use_distributed_optimizer", args.use_distributed_optimizer))
    # Of a run of another script the rates of parts are not known: they are this run's, or its optimizer cannot be loaded.
    own = {name: getattr(args, name) for name in ("trainable", "vision_lr", "projector_lr")}
    then_args = argparse.Namespace(**own | vars(state["args"]))
    if set(then_args.trainable) != set(args.trainable):
        raise ValueError(
            f"--load {args.load}: --trainable was {' '.join(then_args.trainable)} there and is {' '.join(args.trainable)} here, and its "
            "optimizer cannot be loaded then; set it back, or add --no-load-optim (the weights go on; optimizer and schedule begin anew)"
        )
    _check_units(args, then_args)
    if other_samples := _explain_other_samples(args, then_args):
        print_once(other_samples)
    then = state["opt_param_scheduler"]
    then, now = ({**values, **vars(of)} for values, of in ((then, then_args), (now, args)))
    differences = {name: (then[name], now[name]) for name in _FLAGS if name in then and then[name] != now[name]}
    if not differences:
        return None
    if differences.get("end_wd") == differences.get("start_wd"):
        differences.pop("end_wd", None)  # --weight-decay is both
    said = _format_differences(differences)
    if args.use_checkpoint_opt_param_scheduler:
        for name in _RATES:
            setattr(args, name, getattr(then_args, name))
        return f"schedule: the checkpoint's (--use-checkpoint-opt_param-scheduler), not this run's: {said}"
    if args.override_opt_param_scheduler:
        _check_groups(args, then_args, said)
        args.rates_in_checkpoint = then_args
        return f"schedule: this run's (--override-opt_param-scheduler), not the checkpoint's: {said}"
    of_length = _find_lengths(differences, args, then_args)
    if differences.keys() - of_length:  # what follows from another length needs no decision
        asked = _format_differences({name: two for name, two in differences.items() if name not in of_length})
        raise ValueError(
            f"--load {args.load}: its schedule is another than this run's: {asked}; set them back, or take this run's with "
            "--override-opt_param-scheduler, or the checkpoint's with --use-checkpoint-opt_param-scheduler"
        )
    args.override_opt_param_scheduler = True
    if then_args.train_iters and then_args.train_iters != args.train_iters:
        said = f"iterations: {then_args.train_iters} there, {args.train_iters} here"
    return (
        f"schedule: this run's, not the checkpoint's: {said} (that is kept with --use-checkpoint-opt_param-scheduler)"
    )


def _check_units(args, then) -> None:
    """Raise ValueError where the schedule counted samples and is now to count packed rows, or the other way round."""
    sizes = {"there": getattr(then, "packing_buffer_size", 0), "here": args.packing_buffer_size}
    if len({size > 0 for size in sizes.values()}) == 1:
        return
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    counts = ", ".join(f"{'packed rows' if size else 'samples'} {where}" for where, size in sizes.items())
    raise ValueError(
        f"--load {args.load}: its schedule counts {counts} (--packing-buffer-size {sizes['there']} there, {sizes['here']} here): go on "
        f"with --packing-buffer-size {sizes['there']} --global-batch-size {then.global_batch_size}, or begin anew with --no-load-optim "
        "--restart-data (the weights go on)"
    )


def _settle_optimizer(args, was_distributed: bool) -> None:
    """Go on with the kind of optimizer that the checkpoint has: neither kind loads the other's state."""
    if was_distributed == args.use_distributed_optimizer or args.no_load_optim:
        return
    if was_distributed:
        raise ValueError(
            f"--load {args.load}: its optimizer is a distributed one, and this run's is not: add --use-distributed-optimizer, or "
            "--no-load-optim (the weights go on; optimizer and schedule begin anew)"
        )
    if args.overlap_param_gather:
        raise ValueError(
            f"--load {args.load}: its optimizer is not a distributed one, which --overlap-param-gather needs: leave it out, or add "
            "--no-load-optim (the weights go on; optimizer and schedule begin anew)"
        )
    args.use_distributed_optimizer = False  # a recipe has turned it on, and no flag of Megatron's turns it off
    print_once(f"--load {args.load}: its optimizer is not a distributed one; neither is this run's")


def _read_state(args) -> dict | None:
    """Return what the checkpoint that the run goes on from has beside tensors; None where its schedule is not loaded."""
    if args.finetune or args.no_load_optim:
        return None
    reached = read_tracker(args.load)
    if not (reached or "").isdecimal():
        return None
    folder = Path(args.load, f"iter_{args.ckpt_step or int(reached):07d}")
    if not dist_checkpointing.check_is_distributed_checkpoint(folder):
        return None
    with warnings.catch_warnings(
        action="ignore"
    ):  # that this process reads alone: the ranks do not know each other yet
        try:
            state = dist_checkpointing.load_common_state_dict(folder)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # as torch's CheckpointException is
            raise Explained(explain_unreadable(args, error)) from error
    return state if {"args", "opt_param_scheduler"} <= state.keys() else None


def _make_schedule(args) -> dict:
    """Return the values of this run's scheduler, by Megatron's own arithmetic, which writes to the arguments on the way."""
    before = dict(vars(args))
    try:
        return training.get_optimizer_param_scheduler(types.SimpleNamespace(param_groups=[])).state_dict()
    finally:
        vars(args).clear()
        vars(args).update(before)


def _find_lengths(differences: dict, args, then) -> set[str]:
    """Find which differences follow from how many iterations, or samples, the run is to have."""
    follows = _LENGTHS & differences.keys()
    if follows and args.lr_warmup_fraction is not None and args.lr_warmup_fraction == then.lr_warmup_fraction:
        follows = follows | {"lr_warmup_steps"}
    return follows


def _format_differences(differences: dict[str, tuple]) -> str:
    def form(value) -> str:
        return f"{value:.10g}" if isinstance(value, float) else str(value)  # 28.799999999999997 is 28.8

    return "; ".join(f"{_FLAGS[name]}: {form(a)} there, {form(b)} here" for name, (a, b) in differences.items())


def _explain_other_samples(args, then) -> str | None:
    """Return a line where the same data gives other samples than before: a run may go on so, but not unseen."""
    names = [name for name in _OF_SAMPLES if hasattr(then, name) and getattr(then, name) != getattr(args, name)]
    if args.packing_buffer_size and "seq_length" in names:
        names.remove("seq_length")  # a packed row's: loader_state.py refuses another, as rows would be others
    if not names:
        return None
    said = "; ".join(
        f"--{name.replace('_', '-')}: {getattr(then, name)} there, {getattr(args, name)} here" for name in names
    )
    cut = "longer samples are cut elsewhere" if names == ["seq_length"] else "samples are encoded in another way"
    return f"--load {args.load}: {said}; from here on {cut} than before"


def _check_groups(args, then, said: str) -> None:
    """Raise ValueError where the trained parts are divided into other groups of equal rates than in the checkpoint."""

    def divide(of) -> list[tuple[str, ...]]:
        rates = {"the rest": of.lr} | peak_rates(of)
        return sorted({tuple(part for part in rates if rates[part] == rate) for rate in rates.values()})

    if divide(args) != divide(then):
        raise ValueError(
            f"--load {args.load}: {said}: the parts that learn at the same rate are others than in the checkpoint, whose optimizer "
            "cannot be loaded then; set the rates back, or add --no-load-optim (the weights go on; optimizer and schedule begin anew)"
        )
