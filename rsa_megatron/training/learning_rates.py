"""A learning rate for each part of the model: --vision-lr and --projector-lr beside Megatron's --lr.

Megatron's optimizer knows any number of rates (ParamKey and ParamGroupOverride say which parameters have another), but
its pretrain() has no argument for them: it takes what `get_megatron_optimizer_config` makes of the command line, which
"can be added to as needed by the user". Here the optimizer is made with ours added. Warm-up and decay have the same shape
for all parts: lr_part(step) / lr(step) is the same at every step.
"""

import dataclasses
import functools
import math

import megatron.training.training
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from rsa_megatron.models.architectures import Architecture
from rsa_megatron.models.llava_onevision import PARTS


def add_arguments(group) -> None:
    group.add_argument("--vision-lr", type=float, help="peak learning rate of the vision tower; default: --lr")
    group.add_argument(
        "--projector-lr", type=float, help="peak learning rate of projector and image_newline; default: --lr"
    )


def check_arguments(args) -> None:
    for part in ("vision", "projector"):
        flag, rate = f"--{part}-lr", getattr(args, f"{part}_lr")
        if rate is None:
            continue
        if not rate >= 0:
            raise ValueError(f"{flag} {rate}: a learning rate is 0 or more")
        if args.lr_warmup_init and rate != args.lr:
            raise ValueError(
                f"{flag} needs a warm-up from 0: all rates would start at --lr-warmup-init; leave that out"
            )
        if args.lr == 0 and args.min_lr > 0:
            raise ValueError(f"{flag} with --lr 0 needs --min-lr 0: the other rates decay in proportion to --lr")


def peak_rates(args) -> dict[str, float]:
    """Return the peak rate of each module that is trained."""
    rates = {"vision": args.vision_lr, "projector": args.projector_lr}
    return {part: args.lr if rates.get(part) is None else rates[part] for part in PARTS if part in args.trainable}


def rates_of(part: str, args) -> tuple[float, float]:
    """Return the peak and the least rate of a module that is trained, or with "" those of --lr."""
    rate = peak_rates(args).get(part, args.lr)
    return (rate, args.min_lr) if rate == args.lr else (rate, args.min_lr * rate / args.lr if args.lr else 0.0)


def format_table(args, architecture: Architecture) -> str:
    """Return modules, their parameters and the peak rate of each, as a table."""
    rates = peak_rates(args)
    lines = [f"{'part':<12}{'parameters':>16}  {'peak learning rate':<18}  of which"]
    totals = {}
    for part, pieces in architecture.parameter_counts().items():
        totals[part] = sum(pieces.values())
        rate = "frozen" if part not in rates else f"{rates[part]:g}"
        lines.append(
            f"{part:<12}{totals[part]:>16,}  {rate:<18}  " + ", ".join(f"{k} {v:,}" for k, v in pieces.items())
        )
    trained = sum(totals[part] for part in rates)
    return "\n".join([*lines, f"{'all':<12}{sum(totals.values()):>16,}  {trained:,} are trained"])


def explain_warmup(args, resumed: int | None) -> list[str]:
    """Return a line on what a log would have look like a fault: with a warm-up from 0 the first iteration has rate 0.

    Args:
        resumed: the iteration that the run goes on from; where the schedule goes on too, it has begun before.
    """
    if resumed and not args.no_load_optim:
        return []
    length, warmup = (
        (args.lr_decay_iters or args.train_iters, args.lr_warmup_iters)
        if args.train_iters
        else (args.lr_decay_samples or args.train_samples, args.lr_warmup_samples)
    )
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * (length or 0)
    if args.skip_train or not warmup or args.lr_warmup_init:
        return []
    count, unit = math.ceil(warmup), "iteration" if args.train_iters else "sample"
    return [
        f"warm-up of {count} {unit}{'s' * (count > 1)}: the rates begin at 0, and iteration {(resumed or 0) + 1} changes no weight"
    ]


class LearningRates:
    """The rates of one run, from its arguments to its optimizer and its log."""

    def __init__(self, args):
        self._args = args
        self._optimizer = None

    def apply(self) -> None:
        """Before pretrain(): its optimizer gets a parameter group for each rate."""
        make_optimizer = megatron.training.training.get_megatron_optimizer

        @functools.wraps(make_optimizer)
        def with_rates(config, model_chunks, *, config_overrides, **options):
            rates = self._args.rates_in_checkpoint or self._args
            if rates is not self._args:
                config = dataclasses.replace(config, lr=rates.lr, min_lr=rates.min_lr)
            overrides = {**config_overrides, **self._overrides(rates)}
            self._optimizer = make_optimizer(config, model_chunks, config_overrides=overrides, **options)
            return self._optimizer

        megatron.training.training.get_megatron_optimizer = with_rates
        if self._args.rates_in_checkpoint:
            self._change_rates_after_loading()

    def _change_rates_after_loading(self) -> None:
        """A checkpoint's scheduler is loaded after its optimizer: then each parameter group gets this run's rates."""
        make_scheduler = megatron.training.training.get_optimizer_param_scheduler
        then, now = self._args.rates_in_checkpoint, self._args
        to_now = {rates_of(part, then): rates_of(part, now) for part in ("", *peak_rates(now))}

        @functools.wraps(make_scheduler)
        def make(optimizer):
            scheduler = make_scheduler(optimizer)
            load = scheduler.load_state_dict

            def load_and_change(state: dict) -> None:
                load(state)
                for group in optimizer.param_groups:
                    group["max_lr"], group["min_lr"] = to_now[group["max_lr"], group["min_lr"]]
                scheduler.step(0)

            scheduler.load_state_dict = load_and_change
            return scheduler

        megatron.training.training.get_optimizer_param_scheduler = make

    def _overrides(self, rates) -> dict[ParamKey, ParamGroupOverride]:
        return {
            # Names begin with the wrappers' "module.".
            ParamKey(name=tuple(f"*{prefix}*" for prefix in PARTS[part])): ParamGroupOverride(
                **dict(zip(("max_lr", "min_lr"), rates_of(part, rates)))
            )
            for part, rate in peak_rates(rates).items()
            # Equal rates are one group: Megatron tells groups of a checkpoint apart by their rates.
            if rate != rates.lr
        }

    def wrap_forward_step(self, forward_step):
        """A forward step whose loss function also reports the rates of vision and projector in this step.

        (Megatron's `learning rate` is that of the rest: --lr's. It prints the next step's.)
        """

        @functools.wraps(forward_step)
        def with_report(data_iterator, model, *args, **kwargs):
            output, loss_func = forward_step(data_iterator, model, *args, **kwargs)
            if loss_func is None or not model.training:
                return output, loss_func
            return output, lambda output_tensor: self._with_rates(loss_func(output_tensor))

        return with_report

    def _with_rates(self, outputs: tuple) -> tuple:
        *loss, report = outputs
        current = {group["max_lr"]: float(group["lr"]) for group in self._optimizer.param_groups}
        rates = {
            part: current[rate] for part, rate in peak_rates(self._args).items() if part in ("vision", "projector")
        }
        # Pairs like the losses', whose numerators and denominators are added up over ranks and micro-batches.
        return (*loss, report | {f"{part} lr": loss[0].new_tensor([rate, 1.0]).float() for part, rate in rates.items()})
