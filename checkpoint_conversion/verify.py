"""Runs a Hugging Face model and its Megatron checkpoint on the same samples, and compares them output by output.

What is compared is the whole way from pixels to loss (forward_comparison.py). Prints the largest differences, and names the first
output that differs.
"""

import argparse
import gc
import logging
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_conversion.megatron_to_hf import check_projector
from checkpoint_conversion.torch_dist_load import find_checkpoint
from rsa_megatron.models.hf_config import read_architecture

# In the order in which they are computed: the first that differs is where to look.
OUTPUTS = ("pixels", "vision features", "projected tokens", "last hidden state", "logits", "loss")

# A hundred layers' roundings: of 6e-8 each in float32, 4e-3 in bfloat16; they add up like steps of a random walk.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf", type=Path, required=True, help="folder in Hugging Face format")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="Megatron checkpoint, as --save or hf-to-megatron wrote it"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of both models")
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest difference, as a fraction of the largest value; default 1e-4, in bfloat16 5e-2",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; return 1 if an output differs by more than the tolerance."""
    from checkpoint_conversion import forward_comparison  # the other commands do without what it imports
    from rsa_megatron import megatron_on_cpu

    # Before minutes of transformers.
    check_projector(find_checkpoint(args.checkpoint, None).parent, read_architecture(args.hf).vision.hidden_size)
    warnings.simplefilter("ignore")  # Megatron's, between the rows of the table
    logging.getLogger("megatron").setLevel(logging.ERROR)
    dtype = getattr(torch, args.dtype)
    samples = forward_comparison.make_samples(args.hf)
    expected = forward_comparison.run_hugging_face(args.hf, samples, dtype)
    gc.collect()
    megatron_on_cpu.enable()  # what it replaces in torch is not for transformers, which has had its turn
    with forward_comparison.one_process():
        actual = forward_comparison.run_megatron(args.hf, args.checkpoint, samples, dtype)
        return report([sample.name for sample in samples], expected, actual, args.tolerance or TOLERANCES[args.dtype])


def report(names: list[str], expected: Iterable[dict], actual: Iterable[dict], tolerance: float) -> int:
    """Print the table of differences, samples by outputs; return 1 if one is above the tolerance."""
    print(f"{'sample':<16}" + "".join(f"{output:>20}" for output in OUTPUTS))
    worst = None
    for name, theirs, ours in zip(names, expected, actual):
        differences = {
            output: compute_difference(ours[output], theirs[output]) for output in OUTPUTS if output in theirs
        }
        figures = (f"{differences[output]:.1e}" if output in differences else "-" for output in OUTPUTS)
        print(f"{name:<16}" + "".join(f"{figure:>20}" for figure in figures), flush=True)
        for output, value in differences.items():
            # (also nan)
            if not value <= tolerance and (worst is None or OUTPUTS.index(output) < OUTPUTS.index(worst[0])):
                worst = output, name, value
    if worst is None:
        print(f"the same, to {tolerance:.0e} of the largest value")
        return 0
    output, name, value = worst
    print(
        f"error: {output} differ by {value:.1e} of their largest value (sample {name!r}); it is the first output that "
        f"differs by more than --tolerance {tolerance:.0e}",
        file=sys.stderr,
    )
    return 1


def compute_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a fraction of the largest value; inf if the shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
