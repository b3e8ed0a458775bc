"""`rsa-megatron realign fit`: from two sets of embeddings to an operator on disk, with figures of its effect."""

import argparse
import dataclasses
import math
from pathlib import Path

import torch

from rsa_megatron.cli.gap_splits import Rows
from rsa_megatron.cli.realign_sources import (
    add_source_arguments,
    open_sources,
    progress,
)
from rsa_megatron.data.prepare.embedding_shards import check_free
from rsa_megatron.evaluation.embedding_files import Embeddings
from rsa_megatron.ranks import count_ranks, get_group, get_rank, run_on_first_rank
from rsa_megatron.realign.baselines import METHODS
from rsa_megatron.realign.moments import compute_moments
from rsa_megatron.realign.operator import EmbeddingOperator
from rsa_megatron.realign.realign import NO_SPREAD, STEPS, ReAlign

# Options of a single method.
_OF_METHOD = {"sigma": "c3", "steps": "realign"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write the operator to")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="realign",
        help="the paper's operator, realign (the default), or a baseline",
    )
    parser.add_argument(
        "--sigma", type=float, help="for c3: standard deviation of the noise in each coordinate; default: 0.04"
    )
    parser.add_argument(
        "--steps", nargs="+", choices=STEPS, help="for realign: the steps to take, in this order; default: all"
    )
    add_source_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Fit, save, print. Raises ValueError for what cannot be fitted on."""
    options = read_method_options(args)
    run_on_first_rank(lambda: check_free(args.out))
    images, texts = open_sources(args)
    shares = [embeddings.take_share(get_rank(), count_ranks()) for embeddings in (images, texts)]
    operator = METHODS[args.method].fit(
        *shares, group=get_group(), progress=progress, about=describe_sources(images, texts), **options
    )
    gaps = measure_gaps(operator, shares[1])
    run_on_first_rank(lambda: operator.save(args.out))
    if get_rank() == 0:
        print(format_report(operator, gaps, images, texts))
        print(f"{args.out}: written")


def read_method_options(args: argparse.Namespace) -> dict:
    """Return the method's own options that were passed."""
    options = {name: getattr(args, name) for name in _OF_METHOD if getattr(args, name) is not None}
    for name in options:
        if args.method != _OF_METHOD[name]:
            raise ValueError(f"--{name} is an option of --method {_OF_METHOD[name]}; omit it with {args.method}")
    return options


def describe_sources(images: Embeddings, texts: Embeddings) -> dict[str, str]:
    """Describe the sets that an operator was fitted on, for its manifest."""
    found = {"images": images.description, "texts": texts.description}
    encoders = {"image_encoder": format_encoder(images), "text_encoder": format_encoder(texts)}
    return found | {name: encoder for name, encoder in encoders.items() if encoder}


def format_encoder(embeddings: Embeddings) -> str | None:
    """Format model, revision and layer that gave the rows; None where the source does not know."""
    parts = [embeddings.about.get(name) for name in ("model", "revision", "layer")]
    return " ".join(parts) if all(parts) else None


def measure_gaps(operator: EmbeddingOperator, texts: Embeddings) -> dict[str, float]:
    """Measure |mean - mu_x| of the fitted texts: as they are, and after each step and its projection.

    Args:
        texts: this rank's; all ranks call it.
    """
    gaps = {"as they are": (operator.text_mean_D - operator.image_mean_D).norm().item()}
    if isinstance(operator, ReAlign):
        for taken in range(1, len(operator.steps)):
            steps = operator.steps[:taken]
            # Each with its own constants: without the trace step the scale is 1.
            before = dataclasses.replace(operator, steps=steps, scale=operator.scale if "trace" in steps else 1.0)
            gaps[f"after {' and '.join(steps)}"] = _measure_gap(before, texts)
    if operator.method != "none":
        gaps[f"after {operator.method}"] = _measure_gap(operator, texts)
    return gaps


def _measure_gap(operator: EmbeddingOperator, texts: Embeddings) -> float:
    moved = Rows(texts, torch.ones(texts.num_rows, dtype=torch.bool), operator)
    mean_D = compute_moments(moved, "moved texts", group=get_group(), progress=progress).mean_D
    return (mean_D - operator.image_mean_D).norm().item()


def format_report(operator: EmbeddingOperator, gaps: dict[str, float], images: Embeddings, texts: Embeddings) -> str:
    """Format counts, traces, scale and gaps."""
    n = min(operator.num_images, operator.num_texts)
    floor = math.sqrt((operator.image_trace + operator.text_trace) / n)
    lines = [
        f"images: {operator.num_images} of {images.description}; trace of the covariance {operator.image_trace:.6f}",
        f"texts:  {operator.num_texts} of {texts.description}; trace of the covariance {operator.text_trace:.6f}",
        f"method {operator.method}; {format_scale(operator)}",
        "distance between the means of images and texts, on the rows used for fitting:",
        *(f"    {name:32} {gap:.6g}" for name, gap in gaps.items()),
        f"for {n} other images and texts expect about sqrt((Tx + Ty) / n) = {floor:.6g} by chance",
    ]
    return "\n".join(lines)


def format_scale(operator: EmbeddingOperator) -> str:
    """Format s, also of a method without it: near 1, the trace step would do nothing."""
    is_realign = isinstance(operator, ReAlign)
    if operator.text_trace <= NO_SPREAD:
        return "all texts are equal" + (f", s = {operator.scale:.6g} comes only from epsilon" if is_realign else "")
    if is_realign:
        return f"s = {operator.scale:.6f}"
    return f"s = {math.sqrt(operator.image_trace / operator.text_trace):.6f} from the traces, not used"
