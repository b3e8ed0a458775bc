"""What the RSA term costs one of many data-parallel ranks, on paper: operations, bytes and seconds from stated rates.

    python benchmarks/rsa_on_paper.py [--ranks 224 16384] [--gpu-tflops 40] [--gbytes-per-s 50]

A rank with n of N rows, of width W = D + E in both spaces together, computes its n rows of the two N x N kernels:

    distances       2 n N W,  less n^2 W:  n x n of them are among its own rows, where half mirrors the other half
    gradients       2 n N W:  each own row takes a product with all rows; the others' gradients are the others' work
    in all          4 n N W - n^2 W
    of R ranks      (4 - 1/R) N^2 W:  3 N^2 W of one rank, 4 N^2 W of many

so that a rank's operations fall as N^2 / R times (4 - 1/R) / 3. Beside the products it goes over the entries of its blocks
(n N - n^2 / 2 of them in each kernel: roots, quotients, sums), and over ALL N rows a few times, which does not fall with R.
Each rank receives (R - 1) n (W + 1) floats, one more a row for whether it is valid, and passes on as many in a ring.

The step beside it is one micro-batch of a 7B model, forward and backward, on one GPU: 7.5e9 parameters (LLaVA-OneVision-7B's
without its word embeddings, README.md) that all learn (with a frozen decoder, as in stage 1, the step is a third shorter, and RSA's part larger by half), 729 positions of an image and 100 of its caption, 40 % of the 989 TFLOP/s
that NVIDIA gives for an H100's bf16. With TP or PP there are as many times fewer ranks as the step is shorter: but for the
gather's hops and what starts a block, RSA's part of a step depends on the number of GPUs alone, not on layout or micro-batch.

Shapes: N rows in all, n a rank's own, W = D + E; R ranks, b samples each.
"""

import argparse
import math
from bisect import bisect_right
from dataclasses import asdict, dataclass
from pathlib import Path

import machine

WIDTHS = (1152, 3584)  # SigLIP-so400m and Qwen2-7B
RANKS = (224, 2048, 16384)
MICRO_BATCHES = (1, 8)
COLUMNS = (
    "R",
    "b",
    "N",
    "GFLOP a rank",
    "received, MB",
    "memory, MB",
    "products, ms",
    "entries, ms",
    "rows, ms",
    "launches, ms",
    "gather by tree, ms",
    "RSA, ms",
    "step, ms",
    "part of the step",
    "gather in a ring",
)

FLOAT_BYTES = 4
# Times that a rank reads or writes N x W floats outside its matrix products: valid rows picked (2, gather.py), mean (1),
# centred copy (2), lengths (1, distances.py).
ROW_PASSES = 6
# Of everyone's rows, held at once: as gathered, and centred.
COPIES_OF_ROWS = 2
# Rows and columns of a block on a GPU (loss.py).
BLOCK_ROWS = 1024
# Floats read or written for an entry of the two kernels, outside its products: some 40.
_BYTES_AN_ENTRY = 40 * FLOAT_BYTES
# Forward 2, backward 4, for a parameter and position (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
_STEP_FLOPS_A_SAMPLE = 6 * 7.5e9 * (729 + 100)
_STEP_FLOPS_PER_S = 0.4 * 989e12
_FREE, _MOST_RANKS = 0.01, 2**15


@dataclass(frozen=True)
class Rates:
    """A machine, in SI units."""

    #: floating-point operations a second of float32 products
    flops: float
    #: bytes read or written a second
    memory: float
    #: seconds for an entry of both kernels, outside the products
    entry: float
    #: bytes a second that a rank receives in a gather
    network: float
    #: seconds from one rank to the next
    hop: float
    #: seconds to start the operations of a block of both kernels; 0 where `entry` has them in it
    block: float = 0.0


def flops(num_own: int, num_pairs: int, width: int) -> int:
    """Floating-point operations of a rank's matrix products, forward and backward."""
    return 4 * num_own * num_pairs * width - num_own**2 * width


def num_entries(num_own: int, num_pairs: int) -> float:
    """Of each kernel, those that a rank computes."""
    return num_own * num_pairs - num_own**2 / 2


def gathered_bytes(num_own: int, num_ranks: int, width: int) -> int:
    """What a rank receives, and in a ring sends, in the forward pass. In the backward pass: 0."""
    return (num_ranks - 1) * num_own * (width + 1) * FLOAT_BYTES


def memory_bytes(num_own: int, num_pairs: int, width: int) -> int:
    """At the peak, without the blocks: everyone's rows, and of one's own the two vectors joined and their gradients."""
    return FLOAT_BYTES * width * (COPIES_OF_ROWS * num_pairs + 2 * num_own)


def work_seconds(num_own: int, num_pairs: int, width: int, rates: Rates) -> dict[str, float]:
    """A rank's own work, by part."""
    row_bytes = FLOAT_BYTES * num_pairs * width
    # With few own rows a product reads everyone's rows for little arithmetic: once for distances, once for gradients.
    products = max(flops(num_own, num_pairs, width) / rates.flops, 2 * row_bytes / rates.memory)
    return dict(
        products=products,
        entries=num_entries(num_own, num_pairs) * rates.entry,
        rows=ROW_PASSES * row_bytes / rates.memory,
        launches=num_blocks(num_own, num_pairs) * rates.block,
    )


def num_blocks(num_own: int, num_pairs: int) -> int:
    """Blocks of a rank in the middle of the others, as loss.py cuts them: of own pairs the upper half, then the rows before and after."""
    own, before = math.ceil(num_own / BLOCK_ROWS), (num_pairs - num_own) // 2
    after = num_pairs - num_own - before
    return own * (own + 1) // 2 + own * (math.ceil(before / BLOCK_ROWS) + math.ceil(after / BLOCK_ROWS))


def gather_seconds(num_own: int, num_ranks: int, width: int, rates: Rates, hops: str = "ring") -> float:
    """One all-gather: bytes, and the hops of a ring (R - 1) or of a tree (log2 R)."""
    num_hops = num_ranks - 1 if hops == "ring" else (num_ranks - 1).bit_length()
    return gathered_bytes(num_own, num_ranks, width) / rates.network + num_hops * rates.hop


def step_seconds(num_samples: int) -> float:
    """Forward and backward of a micro-batch of the 7B model: rough, without attention's products."""
    return num_samples * _STEP_FLOPS_A_SAMPLE / _STEP_FLOPS_PER_S


def on_paper(num_ranks: int, num_samples: int, rates: Rates) -> dict:
    """One rank's figures, a micro-batch."""
    width, num_pairs = sum(WIDTHS), num_samples * num_ranks
    parts = work_seconds(num_samples, num_pairs, width, rates)
    parts["gather"] = gather_seconds(num_samples, num_ranks, width, rates, "tree")
    in_a_ring = gather_seconds(num_samples, num_ranks, width, rates, "ring") - parts["gather"]
    total, step = sum(parts.values()), step_seconds(num_samples)
    return dict(
        ranks=num_ranks,
        samples=num_samples,
        N=num_pairs,
        flops=flops(num_samples, num_pairs, width),
        received_bytes=gathered_bytes(num_samples, num_ranks, width),
        memory_bytes=memory_bytes(num_samples, num_pairs, width),
        parts_s=parts,
        total_s=total,
        step_s=step,
        part_of_step=total / step,
        part_of_step_in_a_ring=(total + in_a_ring) / step,
    )


def main():
    args = parse()
    memory = args.memory_gbytes_per_s * 1e9
    rates = Rates(
        flops=args.gpu_tflops * 1e12,
        memory=memory,
        entry=_BYTES_AN_ENTRY / memory,
        network=args.gbytes_per_s * 1e9,
        hop=args.hop_microseconds * 1e-6,
        block=args.launches * args.launch_microseconds * 1e-6,
    )
    print(f"| {' | '.join(COLUMNS)} |\n" + "| --- " * len(COLUMNS) + "|")
    for num_ranks in args.ranks:
        for num_samples in args.micro_batches:
            figures = on_paper(num_ranks, num_samples, rates)
            print(table_row(figures), flush=True)
            machine.append(args.append, "rsa_on_paper", dict(rates=asdict(rates)), figures)
    for num_samples in args.micro_batches:
        most = {key: most_ranks(num_samples, rates, key) for key in ("part_of_step", "part_of_step_in_a_ring")}
        print(
            f"b = {num_samples}: at most {_FREE:.0%} of a step up to R = {most['part_of_step']} by tree, "
            f"{most['part_of_step_in_a_ring']} in a ring"
        )


def most_ranks(num_samples: int, rates: Rates, part: str) -> int:
    """The largest number of ranks at which RSA takes no more than _FREE of a step (each part grows with it); 0 for none."""
    return bisect_right(
        range(1, _MOST_RANKS), _FREE, key=lambda num_ranks: on_paper(num_ranks, num_samples, rates)[part]
    )


def table_row(figures: dict) -> str:
    cells = [str(figures[name]) for name in ("ranks", "samples", "N")] + [f"{figures['flops'] / 1e9:.3g}"]
    cells += [f"{figures[name] / 1e6:.1f}" for name in ("received_bytes", "memory_bytes")]
    cells += [f"{1e3 * seconds:.2f}" for seconds in (*figures["parts_s"].values(), figures["total_s"])]
    cells += [
        f"{1e3 * figures['step_s']:.0f}",
        f"{figures['part_of_step']:.2%}",
        f"{figures['part_of_step_in_a_ring']:.2%}",
    ]
    return f"| {' | '.join(cells)} |"


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="data-parallel ranks")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=MICRO_BATCHES, help="samples a rank")
    parser.add_argument(
        "--gpu-tflops", type=float, default=67 * 0.6, help="of float32 products: an H100's, 60 %% of them"
    )
    parser.add_argument("--memory-gbytes-per-s", type=float, default=3350 * 0.8, help="an H100's, 80 %% of them")
    parser.add_argument(
        "--gbytes-per-s",
        type=float,
        default=50.0,
        help="a network card of 400 Gb/s a rank; more where ranks of the group share a node, and so what enters it",
    )
    parser.add_argument("--hop-microseconds", type=float, default=5.0, help="from one rank to the next")
    parser.add_argument("--launches", type=int, default=35, help="operations that a block of 1024 x 1024 pairs takes")
    parser.add_argument(
        "--launch-microseconds", type=float, default=5.0, help="for each, with nothing queued before it"
    )
    parser.add_argument("--append", type=Path, help="JSONL file to add the figures to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
