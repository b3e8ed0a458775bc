"""mutual-kNN against its definition on full matrices: time and memory, side by side in one run, and equal results.

    python benchmarks/mutual_knn.py [--threads 2] [--append results/benchmarks.jsonl]

The definition, as platonic-rep computes it: unit rows, all N x N cosines, -1e8 on the diagonal, every row sorted, its
first k; a neighbour that both spaces have is found through two N x N masks. Times are taken in turns, on the same
features, and given as the median of the runs; the ratio is of medians. Two kinds of features: independent normal
numbers, and "cone", as models' features lie: a large common mean, one dimension larger than all others, variances
that fall by a power law. Memory is the growth of a fresh process's resident size at its peak, one process each.

The limit is the machine's own matrix-multiply rate in float32, measured in the same run, and the 2 N^2 (D + E)
floating-point operations of all cosines. Ours computes half of them, and in bfloat16 where that is faster: it may be
above 1. Rows that differ are those for which the two disagree on any neighbour; the difference of cosines is the
largest, in float64, between a neighbour that one has and a neighbour that only the other has: rounding, if equal.
"""

import argparse
import statistics
import subprocess
import sys
import time

import machine
import torch
from machine import gemm_rate, synchronize

from rsa_megatron.alignment.metrics import mutual_knn
from rsa_megatron.alignment.nearest_neighbours import nearest_neighbours

WIDTHS = (1152, 3584)  # SigLIP-so400m and Qwen2-7B
SIZES = (1024, 4096, 8192)
K = 10


def sorted_neighbours(x_ND, k):
    u_ND = torch.nn.functional.normalize(x_ND, dim=-1)
    return (u_ND @ u_ND.T).fill_diagonal_(-1e8).argsort(dim=1, descending=True)[:, :k]


def full_matrix(a_ND, b_NE, k):
    masks = []
    for x in (a_ND, b_NE):
        mask_NN = torch.zeros(len(x), len(x), device=x.device)
        masks.append(mask_NN.scatter_(1, sorted_neighbours(x, k), 1.0))
    return ((masks[0] * masks[1]).sum(dim=1) / k).mean().item()


CONTENDERS = {"ours": mutual_knn, "full": full_matrix}
FEATURES = ("normal", "cone")
COLUMNS = (
    "features",
    "N",
    "ours, s",
    "full matrix, s",
    "times faster",
    "part of the GEMM limit",
    "memory, MB",
    "full matrix, MB",
    "rows that differ",
    "by a cosine of",
)


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.memory_of:
        return print(extra_memory(*args.memory_of, device))
    about = machine.description(device, args.threads)
    print(about)
    print(f"| {' | '.join(COLUMNS)} |")
    print("| --- " * len(COLUMNS) + "|")
    for size in args.sizes:
        for kind in FEATURES:
            figures = measure(kind, size, args, device)
            memory = [f"{figures['memory_bytes'][name] / 1e6:.0f}" for name in CONTENDERS]
            print(
                f"| {kind} | {size} | {figures['ours_s']:.3f} | {figures['full_s']:.3f} | {figures['ratio']:.2f} | "
                f"{figures['gemm_part']:.2f} | {' | '.join(memory)} | {figures['rows_that_differ']} | "
                f"{figures['difference']:.0e} |",
                flush=True,
            )
            machine.append(args.append, "mutual_knn", about, figures)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    machine.add_arguments(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--runs", type=int, default=5, help="of each contender, at each size")
    parser.add_argument(
        "--memory-of", nargs=3, help=argparse.SUPPRESS
    )  # contender, features and N, in a process of its own
    return parser.parse_args()


def measure(kind: str, size: int, args, device) -> dict:
    features = make_features(kind, size, device)
    times, scores = {name: [] for name in CONTENDERS}, {}
    gemm_rates = []
    for _ in range(args.runs + 1):  # the first of each warms up
        gemm_rates.append(gemm_rate(device))
        for name, function in CONTENDERS.items():
            run_s, scores[name] = timed(function, features)
            times[name].append(run_s)
    medians = {name: statistics.median(runs[1:]) for name, runs in times.items()}
    flops = 2 * size**2 * sum(WIDTHS)
    differences = [different_rows(x) for x in features]
    return dict(
        features=kind,
        N=size,
        widths=WIDTHS,
        k=K,
        ours_s=medians["ours"],
        full_s=medians["full"],
        spread_s={name: [min(runs[1:]), max(runs[1:])] for name, runs in times.items()},
        ratio=medians["full"] / medians["ours"],
        gemm_part=flops / medians["ours"] / statistics.median(gemm_rates[1:]),
        memory_bytes={name: memory_in_own_process(name, kind, size, args, device) for name in CONTENDERS},
        scores=scores,
        rows_that_differ=sum(count for count, _ in differences),
        difference=max(difference for _, difference in differences),
    )


def make_features(kind: str, size: int, device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = []
    for width in WIDTHS:
        x_ND = torch.randn(size, width, generator=generator)
        if kind == "cone":
            x_ND *= torch.arange(1, width + 1) ** -0.25
            x_ND += 0.5 * torch.randn(width, generator=generator)
            x_ND[:, 7] += 30
        features.append(x_ND.to(device))
    return features


def timed(function, features) -> tuple[float, float]:
    """Seconds and score."""
    synchronize(features[0].device)
    start = time.perf_counter()
    score = function(*features, K)
    synchronize(features[0].device)
    return time.perf_counter() - start, score


def different_rows(x_ND) -> tuple[int, float]:
    """Rows for which the two lists are not the same set, and by how much their neighbours' float64 cosines differ."""
    ours_Nk, full_Nk = nearest_neighbours(x_ND, K), sorted_neighbours(x_ND, K).sort(dim=1).values
    differ = (ours_Nk != full_Nk).any(dim=1).nonzero()[:, 0].tolist()
    largest = 0.0
    for i in differ:
        exchanged = torch.tensor(sorted(set(ours_Nk[i].tolist()) ^ set(full_Nk[i].tolist())), device=x_ND.device)
        cosines = torch.nn.functional.cosine_similarity(x_ND[i : i + 1].double(), x_ND[exchanged].double())
        largest = max(largest, (cosines.max() - cosines.min()).item())
    return len(differ), largest


def memory_in_own_process(name, kind, size, args, device) -> int:
    command = [
        sys.executable,
        __file__,
        "--threads",
        str(args.threads),
        "--device",
        str(device),
        "--memory-of",
        name,
        kind,
        str(size),
    ]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def extra_memory(name: str, kind: str, size: str, device: torch.device) -> int:
    """Bytes by which a call raises the peak over what is held before it, the features among that."""
    timed(CONTENDERS[name], make_features(kind, 64, device))  # what is loaded once is no part of it
    features = make_features(kind, int(size), device)
    return machine.growth_at_peak(lambda: timed(CONTENDERS[name], features), device)


if __name__ == "__main__":
    main()
