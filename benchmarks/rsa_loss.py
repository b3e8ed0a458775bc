"""The RSA loss, forward and backward, against what one would write otherwise: time, memory and error, side by side in one run.

    python benchmarks/rsa_loss.py [--threads 2] [--append results/benchmarks.jsonl]

The others: two torch.cdist; |x|^2 + |y|^2 - 2 x.y with one matrix product a kernel; and that with torch.compile; each with
autograd. Times are taken in turns, on the same inputs, and given as the median of the runs; ratios are of medians. On the
CPU, from N = 16384 on, each has one run, in a process of its own. Memory is the growth at its peak of a fresh process's
resident size, on a GPU of its tensors, gradients included, one process each.

The limit is the machine's own rate of float32 matrix products, measured in the same run: the symmetric algorithm needs
3 N^2 (D + E) floating-point operations for N pairs of widths D and E: N^2 (D + E) for half of the two distance
matrices, 2 N^2 (D + E) for the two products in the gradients. bf16 inputs are computed in float32, by all.

On a GPU with Triton, ours with fused blocks takes its turns, too, once for each precision. A second table has the figures,
also as parts of the limits that TF32 and bf16 products set on that GPU.

The error is the larger of the relative errors of the two gradients (and, up to N = 4096, of the value) against float64; above
N = 4096 of the gradients of 256 rows. Gradients of bf16 inputs are bf16, which errs by up to 2e-3.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time

import machine
import torch

from rsa_megatron import rsa_loss
from rsa_megatron.alignment import fused_blocks
from rsa_megatron.alignment.loss import rsa_loss_of_rows
from rsa_megatron.alignment.pairwise_kernel import float32_products

WIDTHS = ("1152:1536", "1152:3584")  # SigLIP-so400m with Qwen2-1.5B and with Qwen2-7B
SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_ONE_RUN = 16384  # on the CPU, from here on
_LEAST_FOR_MEMORY = 1024  # below it there is too little to tell
_MOST_BF16 = 4096
_ALL_ROWS_IN_FLOAT64 = 4096
# What the others hold at their peak, in N x N floats: more than that does not fit.
_MATRICES = 8
# Of the product that measures the limit: a GPU is through with 2048 before it has been started well.
_GEMM_SIZE = {"cpu": 2048, "cuda": 8192}


def two_cdist(v_ND, t_NE):
    v_ND, t_NE = v_ND.float(), t_NE.float()
    return (torch.cdist(v_ND, v_ND) - torch.cdist(t_NE, t_NE)).square().mean()


def products(v_ND, t_NE):
    return (_distances(v_ND.float()) - _distances(t_NE.float())).square().mean()


def _distances(x_ND):
    square_N = x_ND.square().sum(1)
    # (At 0 the square root has no derivative.)
    return (square_N[:, None] + square_N[None] - 2 * x_ND @ x_ND.T).clamp(min=1e-12).sqrt()


OTHERS = {"cdist": two_cdist, "products": products, "compiled": torch.compile(products, dynamic=True)}
FUSED = {f"fused {precision}": functools.partial(rsa_loss, fused=precision) for precision in fused_blocks.PRECISIONS}
CONTENDERS = {"ours": rsa_loss} | OTHERS | FUSED
COLUMNS = (
    "N",
    "widths",
    "inputs",
    "ours, s",
    *(f"times faster than {name}" for name in OTHERS),
    "part of the GEMM limit",
    "memory, MB",
    *(f"{name}, MB" for name in OTHERS),
    "error",
)
LIMITS = ("float32", "tf32", "bfloat16")
COLUMNS_FUSED = (
    "N",
    "widths",
    "inputs",
    "",
    "s",
    "times faster than ours",
    "times faster than cdist",
    *(f"part of the {limit} limit" for limit in LIMITS),
    "memory, MB",
    "error",
)


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.alone:
        return print(json.dumps(alone(*args.alone, device)))
    about = machine.description(device, args.threads)
    print(about)
    print_header(COLUMNS)
    rows_fused = []
    for num_pairs in args.sizes:
        for widths in args.widths:
            # (Cast once, the two types are one; with more pairs the cast is nothing.)
            both = num_pairs <= _MOST_BF16 and widths == args.widths[-1]
            for dtype in ("float32", "bfloat16") if both else ("float32",):
                figures = measure(num_pairs, widths, dtype, args, device)
                print(table_row(figures), flush=True)
                machine.append(args.append, "rsa_loss", about, figures)
                rows_fused += table_rows_fused(figures) if "errors" in figures else []
    if rows_fused:
        print_header(COLUMNS_FUSED)
        print("\n".join(rows_fused))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    machine.add_arguments(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--widths", nargs="+", default=WIDTHS, metavar="D:E")
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="for each contender at each size, about: 3 to 9 runs"
    )
    # Contender, N, widths and type, in a process of its own.
    parser.add_argument("--alone", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(num_pairs: int, widths: str, dtype: str, args, device) -> dict:
    inputs = make_inputs(num_pairs, widths, dtype, device)
    fused = [name for name in FUSED if fused_blocks.available(inputs[0][:0].float(), "euclidean", name.split()[1])]
    names = ["ours", *(OTHERS if fits(num_pairs, device) else ()), *fused]
    separate = {}
    if num_pairs >= _LEAST_FOR_MEMORY and dtype == "float32":
        separate = {name: in_own_process(name, num_pairs, widths, dtype, args, device) for name in names}
    if num_pairs >= _ONE_RUN and device.type == "cpu":
        rates = [gemm_rates(device) for _ in range(9)]
        times = {name: [one["seconds"]] for name, one in separate.items()}
    else:
        times, rates = in_turns(names, inputs, args.seconds, device)
    medians = {name: statistics.median(runs) for name, runs in times.items()}
    num_operations = 3 * num_pairs**2 * sum(x.shape[1] for x in inputs)
    limits = {name: num_operations / statistics.median(rate[name] for rate in rates) for name in rates[0]}  # seconds
    figures = dict(
        N=num_pairs,
        widths=[x.shape[1] for x in inputs],
        inputs=dtype,
        seconds=medians,
        spread_s={name: [min(runs), max(runs)] for name, runs in times.items()},
        ratio={name: medians[name] / medians["ours"] for name in names[1:]},
        gemm_part=limits["float32"] / medians["ours"],
        memory_bytes={name: one["bytes"] for name, one in separate.items()},
        error=relative_error(rsa_loss, inputs),
    )
    if fused:
        figures["gemm_parts"] = {name: {of: s / medians[name] for of, s in limits.items()} for name in ("ours", *fused)}
        figures["errors"] = {"ours": figures["error"]} | {
            name: relative_error(CONTENDERS[name], inputs) for name in fused
        }
    return figures


def in_turns(names: list[str], inputs, most_seconds: float, device) -> tuple[dict, list[dict]]:
    for name in names:
        seconds(CONTENDERS[name], inputs)  # what is loaded and compiled once
    gemm_rates(device)
    num_runs = max(3, min(9, int(most_seconds / seconds(CONTENDERS[names[-1]], inputs))))
    times, rates = {name: [] for name in names}, []
    for _ in range(num_runs):
        for name in names:
            rates.append(gemm_rates(device))  # in each place: of a few runs, one slow moment would be the limit
            times[name].append(seconds(CONTENDERS[name], inputs))
    return times, rates


def gemm_rates(device) -> dict[str, float]:
    """Floating-point operations a second, by LIMITS; on the CPU of float32 alone."""
    size, rates = _GEMM_SIZE[device.type], {}
    with float32_products():
        rates["float32"] = machine.gemm_rate(device, size)
    if device.type == "cuda":
        with float32_products("tf32"):
            rates["tf32"] = machine.gemm_rate(device, size)
        rates["bfloat16"] = machine.gemm_rate(device, size, torch.bfloat16)
    return rates


def fits(num_pairs: int, device) -> bool:
    if device.type == "cuda":
        return _MATRICES * 4 * num_pairs**2 < torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return _MATRICES * 4 * num_pairs**2 < 0.8 * available


def make_inputs(num_pairs: int, widths: str, dtype: str, device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(num_pairs, int(width), generator=generator) for width in widths.split(":"))
    return [x.to(device, getattr(torch, dtype)).requires_grad_() for x in rows]


def seconds(function, inputs) -> float:
    for x in inputs:
        x.grad = None
    machine.synchronize(inputs[0].device)
    start = time.perf_counter()
    function(*inputs).backward()
    machine.synchronize(inputs[0].device)
    return time.perf_counter() - start


def relative_error(function, inputs) -> float:
    """Of the first 256 rows, or where N is small of all and of the value, against float64."""
    whole = len(inputs[0]) <= _ALL_ROWS_IN_FLOAT64
    value = function(*inputs)
    gradients = torch.autograd.grad(value, inputs)
    doubles = [x.detach().double() for x in inputs]
    rows = [x[: None if whole else 256].clone().requires_grad_() for x in doubles]
    exact = rsa_loss_of_rows(*rows, *doubles, 0).loss
    pairs = list(zip(gradients, torch.autograd.grad(exact, rows))) + ([(value, exact)] if whole else [])
    return max(
        ((actual[: len(e)] if e.dim() else actual).double() - e).norm().item() / e.norm().item() for actual, e in pairs
    )


def in_own_process(name: str, num_pairs: int, widths: str, dtype: str, args, device) -> dict:
    command = [
        sys.executable,
        __file__,
        "--threads",
        str(args.threads),
        "--device",
        str(device),
        "--alone",
        name,
        str(num_pairs),
        widths,
        dtype,
    ]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def alone(name: str, num_pairs: str, widths: str, dtype: str, device: torch.device) -> dict:
    run = functools.partial(seconds, CONTENDERS[name])
    run(make_inputs(64, widths, dtype, device))  # what is loaded once is no part of it
    inputs, taken = make_inputs(int(num_pairs), widths, dtype, device), []
    num_bytes = machine.growth_at_peak(lambda: taken.append(run(inputs)), device)
    return {"seconds": taken[0], "bytes": num_bytes}


def print_header(columns: tuple[str, ...]):
    print(f"| {' | '.join(columns)} |\n" + "| --- " * len(columns) + "|")


def table_row(figures: dict) -> str:
    memory = [memory_of(figures, name) for name in ("ours", *OTHERS)]
    ratios = [f"{figures['ratio'][name]:.2f}" if name in figures["ratio"] else "–" for name in OTHERS]
    row = [
        *inputs_of(figures),
        f"{figures['seconds']['ours']:.4f}",
        *ratios,
        f"{figures['gemm_part']:.2f}",
        *memory,
        f"{figures['error']:.1e}",
    ]
    return f"| {' | '.join(row)} |"


def table_rows_fused(figures: dict) -> list[str]:
    times, rows = figures["seconds"], []
    for name, error in figures["errors"].items():
        ratios = [f"{times[other] / times[name]:.2f}" if other in times else "–" for other in ("ours", "cdist")]
        parts = figures["gemm_parts"][name]
        parts = [f"{parts[limit]:.2f}" if limit in parts else "–" for limit in LIMITS]
        row = [
            *inputs_of(figures),
            name,
            f"{times[name]:.5f}",
            *ratios,
            *parts,
            memory_of(figures, name),
            f"{error:.1e}",
        ]
        rows.append(f"| {' | '.join(row)} |")
    return rows


def inputs_of(figures: dict) -> list[str]:
    return [str(figures["N"]), "{} {}".format(*figures["widths"]), figures["inputs"]]


def memory_of(figures: dict, name: str) -> str:
    return f"{figures['memory_bytes'][name] / 1e6:.0f}" if name in figures["memory_bytes"] else "–"


if __name__ == "__main__":
    main()
