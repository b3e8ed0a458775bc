"""The machine that a benchmark runs on: its name, its rate of matrix products, a process's memory; and the file of figures."""

import argparse
import json
import platform
import time
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
    """Floating-point operations a second of a plain matrix product."""
    # Random numbers: a product of ones takes less power, and CPUs then run it faster.
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    synchronize(device)
    start = time.perf_counter()
    a @ b
    synchronize(device)
    return 2 * size**3 / (time.perf_counter() - start)


def resident_bytes(which: str) -> int:
    """Linux's figures of this process: VmRSS is what it holds, VmHWM the most it has held."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(which + ":"))


def forget_peak() -> None:
    """VmHWM begins anew at what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()
