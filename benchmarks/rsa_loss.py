"""The RSA loss, forward and backward, against two torch.cdist and autograd: time and memory, side by side in one run.

    python benchmarks/rsa_loss.py [--threads 2] [--append results/benchmarks.jsonl]

Times are taken in turns, ours and theirs, on the same inputs, and given as the median of the runs; the ratio is of
medians. Memory is the growth of a fresh process's resident size at its peak, gradients included, one process each.
The limit is the machine's own matrix-multiply rate, measured in the same run: the symmetric algorithm needs
3 N^2 (D + E) floating-point operations for N pairs of widths D and E: N^2 (D + E) for half of the two distance
matrices, 2 N^2 (D + E) for the two products in the gradients.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from rsa_megatron import rsa_loss

WIDTHS = (1152, 3584)  # SigLIP-so400m and Qwen2-7B
SIZES = (512, 2048, 4096)
_LEAST_MEMORY = 32 * 2**20  # bytes; less than that may come out of what the process holds already


def two_cdist(v_ND, t_NE):
    return (torch.cdist(v_ND, v_ND) - torch.cdist(t_NE, t_NE)).square().mean()


CONTENDERS = {"ours": rsa_loss, "cdist": two_cdist}


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.append:
        args.append.parent.mkdir(parents=True, exist_ok=True)
    if args.memory_of:
        return print(extra_memory(*args.memory_of, device))
    machine = dict(
        date=str(date.today()),
        device=torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        threads=args.threads,
        torch=torch.__version__,
    )
    print(machine)
    print("| N | ours, s | 2 x cdist, s | times faster | part of the GEMM limit | memory, part of cdist's | error |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for num_pairs in args.sizes:
        figures = measure(num_pairs, args, device)
        print(
            f"| {num_pairs} | {figures['ours_s']:.4f} | {figures['cdist_s']:.4f} | {figures['ratio']:.2f} | "
            f"{figures['gemm_part']:.2f} | {part_in_words(figures['memory_part'])} | {figures['error']:.1e} |",
            flush=True,
        )
        if args.append:
            with open(args.append, "a") as file:
                file.write(json.dumps({"benchmark": "rsa_loss", **machine, **figures}) + "\n")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--runs", type=int, default=9, help="of each contender, at each size")
    parser.add_argument("--append", type=Path, help="JSONL file to add the figures to")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)  # contender and N, in a process of its own
    return parser.parse_args()


def measure(num_pairs: int, args, device) -> dict:
    inputs = make_inputs(num_pairs, device)
    times = {name: [] for name in CONTENDERS}
    gemm_rates = []
    for _ in range(args.runs + 1):  # the first of each warms up
        gemm_rates.append(gemm_rate(device))
        for name, function in CONTENDERS.items():
            times[name].append(seconds(function, inputs))
    medians = {name: statistics.median(runs[1:]) for name, runs in times.items()}
    flops = 3 * num_pairs**2 * sum(WIDTHS)
    memory = {name: memory_in_own_process(name, num_pairs, args, device) for name in CONTENDERS}
    return dict(
        N=num_pairs,
        widths=WIDTHS,
        ours_s=medians["ours"],
        cdist_s=medians["cdist"],
        spread_s={name: [min(runs[1:]), max(runs[1:])] for name, runs in times.items()},
        ratio=medians["cdist"] / medians["ours"],
        gemm_part=flops / medians["ours"] / statistics.median(gemm_rates[1:]),
        memory_bytes=memory,
        memory_part=memory["ours"] / memory["cdist"] if memory["cdist"] > _LEAST_MEMORY else None,
        error=relative_error(inputs),
    )


def part_in_words(part: float | None) -> str:
    return "too little to tell" if part is None else f"{part:.2f}"


def make_inputs(num_pairs, device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num_pairs, width, generator=generator).to(device).requires_grad_() for width in WIDTHS]


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function, inputs) -> float:
    for x in inputs:
        x.grad = None
    synchronize(inputs[0].device)
    start = time.perf_counter()
    function(*inputs).backward()
    synchronize(inputs[0].device)
    return time.perf_counter() - start


def gemm_rate(device, size=2048) -> float:
    """Floating-point operations a second of a plain fp32 matrix product."""
    # Random numbers: a product of ones takes less power, and CPUs then run it faster.
    a, b = torch.randn(2, size, size, device=device)
    synchronize(device)
    start = time.perf_counter()
    a @ b
    synchronize(device)
    return 2 * size**3 / (time.perf_counter() - start)


def relative_error(inputs) -> float:
    """Largest of the relative errors of value and gradients, against float64."""
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = rsa_loss(*exact_inputs)
    exact_gradients = torch.autograd.grad(exact, exact_inputs)
    value = rsa_loss(*inputs)
    gradients = torch.autograd.grad(value, inputs)
    pairs = [(value, exact), *zip(gradients, exact_gradients)]
    return max(((a.double() - e).norm() / e.norm()).item() for a, e in pairs)


def memory_in_own_process(name, num_pairs, args, device) -> int:
    command = [sys.executable, __file__, "--threads", str(args.threads), "--device", str(device),
               "--memory-of", name, str(num_pairs)]  # fmt: skip
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def extra_memory(name: str, num_pairs: str, device: torch.device) -> int:
    """Bytes by which one forward and backward raises the peak over what is held before it, the inputs among that."""
    seconds(CONTENDERS[name], make_inputs(8, device))  # what is loaded once is no part of it
    inputs = make_inputs(int(num_pairs), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds(CONTENDERS[name], inputs)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is held now
    before = resident_bytes("VmRSS")
    seconds(CONTENDERS[name], inputs)
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


if __name__ == "__main__":
    main()
