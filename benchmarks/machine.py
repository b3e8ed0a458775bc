"""The machine that a benchmark runs on: its name, its rate of matrix products, a process's memory; and the file of figures."""

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Those that benchmarks share."""
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--append", type=Path, help="JSONL file to add the figures to")
    return parser


def description(device: torch.device, threads: int) -> dict:
    """What stands beside every figure."""
    return dict(
        date=str(date.today()),
        device=torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        threads=threads,
        torch=torch.__version__,
    )


def append(path: Path | None, benchmark: str, machine: dict, figures: dict) -> None:
    """A line to the file, where one is named."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps({"benchmark": benchmark, **machine, **figures}) + "\n")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def gemm_rate(device: torch.device, size: int = 2048, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second of a plain matrix product, into memory that is there."""
    # Random numbers: a product of ones takes less power, and CPUs then run it faster.
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    product = torch.zeros_like(a)
    synchronize(device)
    start = time.perf_counter()
    torch.mm(a, b, out=product)
    synchronize(device)
    return 2 * size**3 / (time.perf_counter() - start)


def growth_at_peak(work: Callable[[], object], device: torch.device) -> int:
    """Bytes by which `work` raises, at its peak, what this process (or on a GPU, its tensors) holds."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is held now
    before = resident_bytes("VmRSS")
    work()
    return resident_bytes("VmHWM") - before


def resident_bytes(which: str) -> int:
    """Linux's figures of this process: VmRSS is what it holds, VmHWM the most it has held."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(which + ":"))


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()
