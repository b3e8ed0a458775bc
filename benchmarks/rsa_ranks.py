"""The RSA term on 1, 2 and 4 data-parallel ranks over gloo: work, bytes and memory of a rank, beside a model on paper.

    python benchmarks/rsa_ranks.py [--sizes 2048 4096] [--append results/benchmarks.jsonl]

N rows in all, N / R on each of R ranks: gather_rows, rsa_loss_of_rows, backward. All numbers of ranks take turns in one
launch, on the same rows. Each rank has one thread, and shares the machine's cores where there are fewer of them; so work is
CPU time of that thread, which does not run while it waits: median of the runs, of the slowest rank. Wall time, gather and
waiting included, is given where each rank has a core.

Bytes are not computed but counted, by Linux, in each process's TCP connections, and collectives as they are dispatched:
forward and backward pass apart. Memory is the growth of the resident size at its peak, over the rank's own rows. The error
is that of the ranks' losses added up, or of the first rank's gradients, against one process.

The model is rsa_on_paper.py's. Its constants come from the same run: the rates of a 2048 x 2048 product and of copying
rows, in CPU time; gloo's bytes a second and time of a hop, from gathers of 16 MB and of 4 bytes a rank; and the time of
a kernel's entry outside the products, fitted to ONE point, one rank at the largest N. The others are predictions.
"""

import argparse
import os
import statistics
from dataclasses import asdict
from pathlib import Path

import machine
import ranks_over_gloo
import torch
from rsa_on_paper import (
    WIDTHS,
    Rates,
    flops,
    gather_seconds,
    gathered_bytes,
    memory_bytes,
    num_entries,
    work_seconds,
)

SIZES = (2048, 4096)
RANKS = (1, 2, 4)
TIMES = (
    "N",
    "R",
    "work, s",
    "of one rank's",
    "(4 - 1/R) / 3R",
    "part of the GEMM limit",
    "model, s",
    "its error",
    "wall, s",
    "model, s",
    "error",
)
BYTES = (
    "N",
    "R",
    "sent, MB",
    "received, MB",
    "formula, MB",
    "collectives forward",
    "backward",
    "bytes backward",
    "memory, MB",
    "formula, MB",
)


def main():
    args = parse()
    torch.set_num_threads(1)
    about = machine.description(torch.device("cpu"), threads=1)
    print(about)
    processes = ranks_over_gloo.measure(args.sizes, WIDTHS, RANKS, args.runs)
    points = [point(processes, num_pairs, num_ranks) for num_pairs in args.sizes for num_ranks in RANKS]
    rates = rates_of(processes, points)
    print(
        f"products {rates.flops / 1e9:.1f} GFLOP/s, rows {rates.memory / 1e9:.2f} GB/s, "
        f"an entry {rates.entry * 1e9:.2f} ns, gloo {rates.network / 1e9:.2f} GB/s and {rates.hop * 1e6:.0f} us a hop"
    )
    for figures in points:
        figures |= beside_the_model(figures, rates)
        machine.append(args.append, "rsa_ranks", about, figures | dict(rates=asdict(rates)))
    print_table(TIMES, map(time_cells, points))
    print_table(BYTES, map(byte_cells, points))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help=f"N, multiples of {max(RANKS)}")
    parser.add_argument("--runs", type=int, default=5, help="of each number of ranks, at each size")
    parser.add_argument("--append", type=Path, help="JSONL file to add the figures to")
    args = parser.parse_args()
    for size in args.sizes:
        if size < max(RANKS) or size % max(RANKS):
            parser.error(f"--sizes {size}: give multiples of {max(RANKS)}, so that all ranks have as many rows")
    return args


def point(processes: list[dict], num_pairs: int, num_ranks: int) -> dict:
    """What the ranks of a group have measured, put together."""
    sizes = [process["measured"][str(num_pairs)]["groups"] for process in processes]
    ranks, alone = [size[str(num_ranks)] for size in sizes[:num_ranks]], sizes[0]["1"]
    loss_error = abs(sum(rank["loss"] for rank in ranks) / alone["loss"] - 1)
    work, wall = (max(rank[name] for rank in ranks) for name in ("work_s", "wall_s"))
    return dict(
        N=num_pairs,
        ranks=num_ranks,
        widths=WIDTHS,
        work_s=work,
        ratio=work / alone["work_s"],
        wall_s=wall if num_ranks <= os.cpu_count() else None,
        runs_s=[rank["runs_s"] for rank in ranks],
        sent_received_bytes=[max(rank["forward"][i] for rank in ranks) for i in range(2)],
        collectives_forward=ranks[0]["forward_collectives"],
        collectives_backward=sum((rank["backward_collectives"] for rank in ranks), []),
        backward_bytes=max(max(rank["backward"]) for rank in ranks),
        memory_bytes=max(rank["memory"] for rank in ranks),
        error=max(loss_error, ranks[0]["gradient_error"]),
    )


def rates_of(processes: list[dict], points: list[dict]) -> Rates:
    """This machine's, the time of an entry fitted to one rank at the largest N."""
    measured = [size["flops_memory"] for size in processes[0]["measured"].values()]
    flops_per_s, memory = (statistics.median(values) for values in zip(*measured))
    network, hop = processes[0]["network"]
    rates = Rates(flops=flops_per_s, memory=memory, entry=0.0, network=network, hop=hop)
    fitted = max((p for p in points if p["ranks"] == 1), key=lambda p: p["N"])
    shape = fitted["N"], fitted["N"], sum(WIDTHS)
    rest = fitted["work_s"] - sum(work_seconds(*shape, rates).values())
    return Rates(**asdict(rates) | dict(entry=max(rest, 0.0) / num_entries(*shape[:2])))


def beside_the_model(figures: dict, rates: Rates) -> dict:
    num_pairs, num_ranks, width = figures["N"], figures["ranks"], sum(WIDTHS)
    num_own = num_pairs // num_ranks
    work = sum(work_seconds(num_own, num_pairs, width, rates).values())
    num_operations = flops(num_own, num_pairs, width)
    return dict(
        flops=num_operations,
        gemm_part=num_operations / figures["work_s"] / rates.flops,
        model_work_s=work,
        model_error=work / figures["work_s"] - 1,
        model_wall_s=work + gather_seconds(num_own, num_ranks, width, rates),
        model_bytes=gathered_bytes(num_own, num_ranks, width),
        model_memory_bytes=memory_bytes(num_own, num_pairs, width),
    )


def time_cells(figures: dict) -> list:
    num_ranks, wall = figures["ranks"], figures["wall_s"]
    cells = [f"{figures['work_s']:.3f}", f"{figures['ratio']:.3f}", f"{(4 - 1 / num_ranks) / 3 / num_ranks:.3f}"]
    cells += [f"{figures['gemm_part']:.2f}", f"{figures['model_work_s']:.3f}", f"{figures['model_error']:+.0%}"]
    cells += [f"{wall:.3f}", f"{figures['model_wall_s']:.3f}"] if wall else ["", ""]
    return [figures["N"], num_ranks, *cells, f"{figures['error']:.1e}"]


def byte_cells(figures: dict) -> list:
    cells = [f"{count / 1e6:.2f}" for count in (*figures["sent_received_bytes"], figures["model_bytes"])]
    cells += [len(figures[f"collectives_{way}"]) for way in ("forward", "backward")] + [figures["backward_bytes"]]
    cells += [f"{figures[name] / 1e6:.0f}" for name in ("memory_bytes", "model_memory_bytes")]
    return [figures["N"], figures["ranks"], *cells]


def print_table(columns: tuple, rows):
    print(f"\n| {' | '.join(columns)} |\n" + "| --- " * len(columns) + "|")
    for cells in rows:
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
