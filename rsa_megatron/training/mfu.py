"""Model FLOPs utilisation in the training log: what the model's mathematics asked for, over what the devices could have done.

    mfu = model FLOPs of all ranks / (seconds * peak FLOP/s of all devices)

Model FLOPs are planning/flops.py's, of what each micro-batch really held: its tiles, and its rows up to their own lengths. So
padding, recomputation, the RSA loss, pipeline bubbles, waiting for data, for other ranks and for the optimizer all show
as utilisation that is missing; evaluations and the writing of checkpoints, which Megatron's own "elapsed time per
iteration" leaves out, are left out. The peak is the device's rate of dense bf16 products without sparsity (with --fp8, too).

Megatron's report of a loss is (numerator, denominator), added up over micro-batches and data-parallel and context-parallel
ranks. Each micro-batch reports its FLOPs, and the time since the report before it: over an iteration these times add up
to the iteration's, whatever happened in it, and the clock is the host's, so that nothing waits for the device. (Only of the
first iteration after a start the last micro-batch's backward pass and the optimizer are not in it: its mfu is too high.)
"""

import functools
import re
import time

import megatron.training.training
import torch
from megatron.core import mpu
from megatron.training import get_timers

from rsa_megatron.models.architectures import Architecture
from rsa_megatron.planning.flops import training_flops
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
        "and where that is not known, or in fp32, those of a matrix product at the start",
    )


def check_arguments(args) -> None:
    if args.peak_tflops is not None and not args.peak_tflops > 0:
        raise ValueError(f"--peak-tflops {args.peak_tflops:g}: name a rate above 0, or leave the flag out")


def peak_flops(args) -> tuple[float, str]:
    """FLOP/s that one device could do, and where the figure is from."""
    torch.cuda.set_device(args.local_rank)  # as Megatron will: else every rank of a node would measure on the first GPU
    name = torch.cuda.get_device_name()
    if args.peak_tflops:
        return args.peak_tflops * 1e12, "--peak-tflops"
    sheet = data_sheet_tflops(name)
    if sheet and (args.bf16 or args.fp16):
        return sheet * 1e12, f"{name}'s data sheet, dense bf16"
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    named = str(dtype).removeprefix("torch.")
    return measured_flops(dtype), f"measured here, a matrix product in {named} ({torch.get_num_threads()} CPU threads)"


def data_sheet_tflops(device_name: str) -> float | None:
    """Of a device by its name, as torch.cuda.get_device_name() has it; None where it is not in the table."""
    words = set(re.split(r"[ -]", device_name))
    found = [entry for entry in PEAK_TFLOPS if words.issuperset(entry.split())]
    return PEAK_TFLOPS[max(found, key=lambda entry: len(entry.split()))] if found else None


def measured_flops(dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on this process's device, the best of a few."""
    device = torch.cuda.current_device()
    on_gpu = torch.device(device).type == "cuda"
    size = 8192 if on_gpu else 1024
    a, b, product = torch.randn(3, size, size, device=device).to(
        dtype
    )  # memory that is there: new memory costs a CPU a third
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
        )
        self._last_report: float | None = None
        self._flops_so_far, self._samples_so_far = 0.0, 0

    def apply(self) -> None:
        """Before pretrain(): --log-throughput and the progress log have this model's FLOPs.

        Megatron's formula is of a GPT without a tower, of rows without padding, all trained; training.py calls it by
        its name, and has no argument for another.
        """
        megatron.training.training.num_floating_point_operations = self._flops_of_batch

    def wrap_forward_step(self, forward_step):
        """train_step.forward_step, whose loss function also reports `mfu` while it trains."""

        @functools.wraps(forward_step)
        def with_report(data_iterator, model):
            if not model.training:
                return forward_step(data_iterator, model)
            if self._last_report is None:
                self._last_report = _seconds_of_training()
            batches: list[StepBatch] = []
            output, loss_func = forward_step(data_iterator, model, seen=batches.append)
            if not batches:  # a stage between the first and the last
                return output, loss_func
            flops = self._count(batches[0])
            return output, lambda output_tensor: self._with_mfu(loss_func(output_tensor), flops)

        return with_report

    def _count(self, batch: StepBatch) -> torch.Tensor:
        # On the device: reading the numbers would wait for it.
        lengths = batch.row_lengths.double()
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
        self._flops_so_far += flops
        self._samples_so_far += len(batch.tokens)
        return flops

    def _with_mfu(self, outputs: tuple, flops: torch.Tensor) -> tuple:
        *loss, report = outputs
        now = _seconds_of_training()
        seconds, self._last_report = now - self._last_report, now
        # Every data-parallel rank speaks for as many devices, and each of context-parallel ones has its share of the rows.
        num_devices = self._world_size / mpu.get_data_parallel_world_size(with_context_parallel=True)
        flops = (flops / mpu.get_context_parallel_world_size()).float()
        return (
            *loss,
            report | {"mfu": torch.stack([flops, torch.full_like(flops, seconds * num_devices * self._peak_flops)])},
        )

    def _flops_of_batch(self, args, batch_size: int, **lengths) -> float:
        """For Megatron's num_floating_point_operations: the mean of this rank's samples so far, times those of the batch.

        Megatron asks each iteration, right before it reads the loss scale from the device: this wait is that one.
        """
        if not self._samples_so_far:  # a stage between the first and the last, which writes none of it
            return 0.0
        return float(self._flops_so_far) / self._samples_so_far * batch_size


def _seconds_of_training() -> float:
    """A clock that stands still during evaluations and while checkpoints are written."""
    timers = get_timers()
    return time.perf_counter() - sum(timers(name, log_level=0).active_time() for name in _NOT_TRAINING)
