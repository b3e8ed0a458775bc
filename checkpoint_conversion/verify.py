"""Compares a Hugging Face model and its Megatron checkpoint: every tensor, and what both compute of the same samples.

Tensors are compared bit for bit, through the table of names (tensor_comparison.py). Then both models run on the same samples, from
pixels to loss (forward_comparison.py): the largest differences are printed, and the first output that differs is named.
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

from checkpoint_conversion.hf_weights import check, drop_tied_head, open_folder
from checkpoint_conversion.megatron_to_hf import check_projector
from checkpoint_conversion.tensor_comparison import TensorComparison, compare_tensors
from checkpoint_conversion.torch_dist_load import MegatronCheckpoint, find_checkpoint
from checkpoint_conversion.weight_map import table
from rsa_megatron.models.agreement import check_checkpoint_files, check_files
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
        help="largest difference of outputs, as a fraction of the largest value; default 1e-4, in bfloat16 5e-2",
    )
    parser.add_argument(
        "--outputs-only",
        action="store_true",
        help="leave the tensors out, for a checkpoint that is meant to differ a little from the folder",
    )


def run(args: argparse.Namespace) -> int:
    """Print what was compared; return 1 if a tensor differs, or an output by more than the tolerance."""
    from transformers import AutoTokenizer

    from checkpoint_conversion import forward_comparison  # the other commands do without what it imports
    from rsa_megatron import megatron_on_cpu

    # Before minutes of transformers.
    run_folder, architecture = find_checkpoint(args.checkpoint, None).parent, read_architecture(args.hf)
    check_projector(run_folder, architecture.vision.hidden_size)
    check_files(args.hf)
    tokenizer = AutoTokenizer.from_pretrained(args.hf)
    check_checkpoint_files(run_folder / "hf", architecture, tokenizer, str(args.hf), str(args.hf))
    faults = []
    if not args.outputs_only:
        found = compare_folder(args.hf, args.checkpoint)
        print("\n".join(found.list_lines()), flush=True)
        if found.differences:
            faults.append(f"{found.describe_differences()} (--outputs-only leaves tensors out)")
    warnings.simplefilter("ignore")  # Megatron's, between the rows of the table
    logging.getLogger("megatron").setLevel(logging.ERROR)
    dtype = getattr(torch, args.dtype)
    samples = forward_comparison.make_samples(args.hf)
    expected = forward_comparison.run_hugging_face(args.hf, samples, dtype)
    gc.collect()
    megatron_on_cpu.enable()  # what it replaces in torch is not for transformers, which has had its turn
    with forward_comparison.one_process():
        actual = forward_comparison.run_megatron(args.hf, args.checkpoint, samples, dtype)
        names = [sample.name for sample in samples]
        faults += compare_outputs(names, expected, actual, args.tolerance or TOLERANCES[args.dtype])
    if faults:
        print(f"error: {'; and '.join(faults)}", file=sys.stderr)
    return 1 if faults else 0


def compare_folder(hf: Path, checkpoint: Path) -> TensorComparison:
    """Compare every tensor of a folder with a checkpoint's.

    Raises:
        ValueError: one of them is not of the model that the folder's config.json describes.
    """
    architecture = read_architecture(hf)
    rows, tensors = table(architecture), open_folder(hf)
    if architecture.decoder.tie_word_embeddings:
        drop_tied_head(tensors)
    check(tensors, rows, str(hf))
    return compare_tensors(rows, tensors, MegatronCheckpoint(find_checkpoint(checkpoint, None), rows))


def compare_outputs(names: list[str], expected: Iterable[dict], actual: Iterable[dict], tolerance: float) -> list[str]:
    """Print the table of differences, samples by outputs; return what is to be said if one is above the tolerance."""
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
        print(f"outputs: the same, to {tolerance:.0e} of the largest value")
        return []
    output, name, value = worst
    return [
        f"{output} differ by {value:.1e} of their largest value (sample {name!r}); it is the first output that differs by more "
        f"than --tolerance {tolerance:.0e}"
    ]


def compute_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a fraction of the largest value; inf if the shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
