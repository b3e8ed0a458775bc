"""Model FLOPs utilisation in the training log: what the model's mathematics asked for, over what the devices could have done.

    mfu = model FLOPs of all ranks / (seconds * peak FLOP/s of all devices)

Model FLOPs are planning/flops.py's, of what each micro-batch really held: its tiles, and its rows up to their own lengths (of a
packed row, those of its sequences: attention takes the squares of these, not of the row's). So padding, recomputation, the RSA
loss, pipeline bubbles, waiting for data, for other ranks and for the optimizer all show as utilisation that is missing; evaluations and the writing of checkpoints, which Megatron's own "elapsed time per
iteration" leaves out, are left out. The peak is the device's rate of dense bf16 products without sparsity (with --fp8, too).
A CPU's cores are shared by its ranks and with others: it has none but what --peak-tflops says, and without that no mfu.

Megatron's report of a loss is (numerator, denominator), added up over micro-batches and data-parallel and context-parallel
ranks. Each micro-batch reports its FLOPs, and the time since the report before it: over an iteration these times add up
to the iteration's, whatever happened in it, and the clock is the host's, so that nothing waits for the device. The first
iteration after a start has no mfu: its last micro-batch's backward pass and the optimizer would not be in it.
"""

import functools
import math
import re
import time

import megatron.training.training
import torch
from megatron.core import mpu
from megatron.training import get_args, get_timers

from rsa_megatron import screen
from rsa_megatron.models.architectures import Architecture
from rsa_megatron.planning.flops import training_flops
from rsa_megatron.ranks import get_group, get_rank
from rsa_megatron.training import ON_CPU
from rsa_megatron.training.train_step import StepBatch

#: Dense bf16 and fp16 TFLOP/s of NVIDIA's data sheets, by words of the device's name; the entry of most words counts.
PEAK_TFLOPS = {
    "A10": 125,
    "A30": 165,
    "A40": 150,
    "A100": 312,
    "A800": 312,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "H100": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H800": 989,
    "H200": 989,
    "H200 NVL": 835,
    "GH200": 989,
    "B200": 2250,
    "GB200": 2500,
}

#: Megatron's timers of what is no training.
_NOT_TRAINING = ("eval-time", "save-checkpoint", "save-checkpoint-non-persistent")


def add_arguments(group) -> None:
    group.add_argument(
        "--peak-tflops",
        type=float,
        help="what mfu in the log is a fraction of: TFLOP/s of one device; default: its data sheet's for dense bf16, "
        "and where that is not known, or in fp32, those of a matrix product at the start; on the CPU there is no default, "
        "and no mfu",
    )


def check_arguments(args) -> None:
    if args.peak_tflops is not None and not args.peak_tflops > 0:
        raise ValueError(f"--peak-tflops {args.peak_tflops:g}: name a rate above 0, or leave the flag out")


def peak_flops(args) -> tuple[float | None, str]:
    """FLOP/s that one device could do, and where the figure is from; None where nobody knows."""
    if ON_CPU and not args.peak_tflops:
        return None, "a CPU's peak is not known; --peak-tflops names it"
    torch.cuda.set_device(args.local_rank)  # as Megatron will: else every rank of a node would measure on the first GPU
    name = torch.cuda.get_device_name()
    if args.peak_tflops:
        return args.peak_tflops * 1e12, "--peak-tflops"
    sheet = data_sheet_tflops(name)
    if sheet and (args.bf16 or args.fp16):
        return sheet * 1e12, f"{name}'s data sheet, dense bf16"
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    return measured_flops(dtype), f"measured here, a matrix product in {str(dtype).removeprefix('torch.')}"


def data_sheet_tflops(device_name: str) -> float | None:
    """Of a device by its name, as torch.cuda.get_device_name() has it; None where it is not in the table."""
    words = set(re.split(r"[ -]", device_name))
    found = [entry for entry in PEAK_TFLOPS if words.issuperset(entry.split())]
    return PEAK_TFLOPS[max(found, key=lambda entry: len(entry.split()))] if found else None


def measured_flops(dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on this process's GPU, the best of a few."""
    size = 8192
    a, b, product = torch.randn(3, size, size, device="cuda").to(dtype)
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.mm(a, b, out=product)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


class Utilisation:
    """The count of one run, and the clock beside it.

    Args:
        args: Megatron's, with --trainable and --peak-tflops.
        architecture: of the model that is trained.
    """

    def __init__(self, args, architecture: Architecture):
        self._architecture, self._trainable, self._world_size = architecture, args.trainable, args.world_size
        self._peak_flops, source = peak_flops(args)
        #: for the log, once
        self.description = (
            f"mfu: model FLOPs utilisation, relative to {self._peak_flops / 1e12:.4g} TFLOP/s per device, {source}"
            if self._peak_flops
            else f"mfu: none; {source}"
        )
        self._last_report: float | None = None
        self._first_iteration: int | None = None
        self._has_said_impossible = False
        # Of the micro-batches since Megatron asked last, and its answer then.
        self._flops, self._rows, self._last_answer = 0.0, 0, 0.0

    def apply(self) -> None:
        """Before pretrain(): --log-throughput and the progress log have this model's FLOPs.

        Megatron's formula is of a GPT without a tower, of rows without padding, all trained; training.py calls it by
        its name, and has no argument for another.
        """
        training = megatron.training.training
        training.num_floating_point_operations = self._flops_of_batch
        training.training_log = self._without_impossible_shares(training.training_log)

    def wrap_forward_step(self, forward_step):
        """train_step.forward_step, whose loss function also reports `mfu` while it trains."""

        @functools.wraps(forward_step)
        def with_report(data_iterator, model):
            if not model.training:
                return forward_step(data_iterator, model)
            if self._last_report is None:
                self._last_report, self._first_iteration = _seconds_of_training(), get_args().curr_iteration
            batches: list[StepBatch] = []
            output, loss_func = forward_step(data_iterator, model, seen=batches.append)
            if not batches:  # a stage between the first and the last
                return output, loss_func
            flops = self._count(batches[0])
            if not self._peak_flops:
                return output, loss_func
            return output, lambda output_tensor: self._with_mfu(loss_func(output_tensor), flops)

        return with_report

    def _count(self, batch: StepBatch) -> torch.Tensor:
        # On the device: reading the numbers would wait for it. Samples of a packed row attend to themselves alone.
        packed = batch.sequence_lengths
        lengths = (batch.row_lengths if packed is None else packed).double()
        is_embedding = batch.image_layouts[:, 5] > 0
        num_tiles = ((1 + batch.image_layouts[:, 2] * batch.image_layouts[:, 3]) * ~is_embedding).sum().double()
        flops = training_flops(
            self._architecture,
            self._trainable,
            num_tiles=num_tiles,
            num_positions=lengths.sum(),
            squared_lengths=lengths.square().sum(),
            num_image_tokens=num_tiles * self._architecture.vision.tokens_per_side**2 + is_embedding.sum(),
        )
        flops = sum(flops.values())
        self._flops += flops
        self._rows += len(batch.tokens)
        return flops

    def _with_mfu(self, outputs: tuple, flops: torch.Tensor) -> tuple:
        *loss, report = outputs
        now = _seconds_of_training()
        seconds, self._last_report = now - self._last_report, now
        # Every data-parallel rank speaks for as many devices, and each of context-parallel ones has its share of the rows.
        num_devices = self._world_size / mpu.get_data_parallel_world_size(with_context_parallel=True)
        flops = (flops / mpu.get_context_parallel_world_size()).float()
        share = torch.stack([flops, torch.full_like(flops, seconds * num_devices * self._peak_flops)])
        if get_args().curr_iteration == self._first_iteration:
            share = torch.zeros_like(share)  # 0 / 0: not known
        return (*loss, report | {"mfu": share})

    def _without_impossible_shares(self, training_log):
        """Megatron's training_log; an mfu that is not known, or above 1, is left out of all it writes."""

        @functools.wraps(training_log)
        def log(loss_dict, total_loss_dict, *args, **kwargs):
            mfu = float(loss_dict.get("mfu", 0.0))
            if not 0 <= mfu <= 1:
                loss_dict = {name: value for name, value in loss_dict.items() if name != "mfu"}
                # The mean of a line with such an iteration is none either: Megatron prints no number that is not >= 0.
                total_loss_dict["mfu"] = torch.full([1], math.nan, device=torch.cuda.current_device())
            if mfu > 1 and not self._has_said_impossible and get_rank() == get_args().world_size - 1:
                self._has_said_impossible = True
                screen.show(f"WARNING: mfu {mfu:.3g} is above 1, and left out: name the device's peak by --peak-tflops")
            return training_log(loss_dict, total_loss_dict, *args, **kwargs)

        return log

    def _flops_of_batch(self, args, batch_size: int, **lengths) -> float:
        """For Megatron's num_floating_point_operations: the mean of the rows of all ranks, times those of the batch.

        Megatron asks on every rank, each iteration and again as it logs, and saves the sum with the checkpoint as every
        rank's. Right after it asks it reads the loss scale from the device: this wait is that one. (Stages between the
        first and the last have counted nothing; ranks that share a row all count it, which leaves the mean as it is.)
        """
        device = torch.cuda.current_device()
        counted = [torch.as_tensor(count, dtype=torch.float64, device=device) for count in (self._flops, self._rows)]
        counted = torch.stack(counted)
        if get_group():
            torch.distributed.all_reduce(counted)
        flops, rows = counted.tolist()
        self._flops, self._rows = 0.0, 0
        if rows:
            self._last_answer = flops / rows * batch_size
        return self._last_answer


def _seconds_of_training() -> float:
    """A clock that stands still during evaluations and while checkpoints are written."""
    timers = get_timers()
    return time.perf_counter() - sum(timers(name, log_level=0).active_time() for name in _NOT_TRAINING)
