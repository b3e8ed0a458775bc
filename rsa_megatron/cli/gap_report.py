"""`rsa-megatron realign report`: one page on a pair of encoders, what separates their clouds and what ReAlign leaves of it.

    OUT.jsonl          a line of kind "gap" with everything that is drawn; `rsa-megatron plot gap` draws it again
    OUT.png, OUT.svg   the page (rsa_megatron/plots/gap.py)

Operators are fitted on some of the rows. All figures but those called in_sample are of the rows held out, and of moved
texts as `transform` gives them, of unit length. Keys of the line:

    label, images, texts     names: of the encoder, and of the two sources (never a path of this machine)
    width, num_images, num_texts, fit_images, fit_texts      numbers of a row, of rows, and of those that are fitted on
    scale, image_trace, text_trace                           s, T_x and T_y of ReAlign
    steps      for no step, anchor, + trace and + centroid: the distance of the means of images and moved texts, in_sample
               and held_out, and floor = sqrt(T_x / n + T_y / m), what n and m held-out rows of one distribution would
               show. Rows that pair up share a part of this noise and may lie below; the noise of what was fitted on
               comes on top
    methods    the same distances for each method (sigma: of c3's noise), the spectrum of the moved texts, and of
               num_sampled rows a side: mixing (k_mixing; chance_of_mixing is one cloud's), cosines (counts in equal bins
               from -1 to 1), js against the images' in bits, phi, psi and overlap (k_overlap) with the texts as they were
    image      spectrum and cosines of the images
    frame      figures in the fixed frame (rsa_megatron.realign.decomposition.GapFigures) of the held-out pairs, and budget_after,
               the energies with the texts that ReAlign has moved, in the same frame; null without pairs: left_out gives the reason
    clouds     at most 300 points each of image, text and realigned, from the images' mean: along the mean difference, and
               along the first and second principal direction of both modalities across it
"""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from rsa_megatron import atomic
from rsa_megatron.cli.gap_splits import Splits, split_sources
from rsa_megatron.cli.realign_sources import add_source_arguments, open_sources, progress
from rsa_megatron.evaluation.embedding_files import Embeddings
from rsa_megatron.json_lines import Line
from rsa_megatron.plots import style
from rsa_megatron.plots.gap import draw_gap
from rsa_megatron.plots.gap_records import STEPS, parse_gap
from rsa_megatron.plots.gap_table import format_summary
from rsa_megatron.ranks import count_ranks
from rsa_megatron.realign.baselines import METHODS
from rsa_megatron.realign.decomposition import compute_gap_figures, compute_term_moments
from rsa_megatron.realign.frame import Frame
from rsa_megatron.realign.mixing import (
    chance_of_mixing,
    cosine_histogram,
    fidelity,
    js_divergence,
    mixing_rate,
)
from rsa_megatron.realign.moments import Moments, compute_moments
from rsa_megatron.realign.operator import EmbeddingOperator
from rsa_megatron.realign.realign import ReAlign, normalise_rows
from rsa_megatron.realign.spectra import SpectrumFigures, eigenvalues

K_MIXING, K_OVERLAP = 20, 10
MOST_POINTS = 300


def add_arguments(parser) -> None:
    """Add the flags of the two sources and of the report."""
    add_source_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="OUT.jsonl, OUT.png and OUT.svg are written")
    parser.add_argument("--label", help="what the page calls the pair of encoders; default: their sources")
    parser.add_argument(
        "--fit-fraction",
        type=float,
        default=0.5,
        help="share of the rows to fit operators on; the others are measured; default: %(default)s",
    )
    parser.add_argument(
        "--num-pairs",
        type=int,
        default=2000,
        help="rows per side for neighbours and cosines; default: %(default)s",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
        default=["none", "mean-shift", "c3", "realign"],
        help=f"of {', '.join(METHODS)}; none and realign are always included; default: none mean-shift c3 realign",
    )
    parser.add_argument(
        "--unpaired",
        action="store_true",
        help="images and texts are not pairs, even where keys or numbers of rows are equal",
    )
    frame = parser.add_mutually_exclusive_group()
    frame.add_argument(
        "--energy", type=float, default=0.99, help="share of the variance in the fixed frame; default: %(default)s"
    )
    frame.add_argument("--rank", type=int, help="rank of the fixed frame, instead of --energy")


def run(args) -> None:
    """Measure, write the line and the page, print the tables.

    Raises:
        ValueError: what is wrong with the sources or the arguments; nothing is written.
    """
    check(args)
    text = json.dumps(measure(*open_sources(args), args), allow_nan=False)
    stem = args.out.with_suffix("") if args.out.suffix in (".jsonl", ".png", ".svg") else args.out
    path = Path(f"{stem}.jsonl")
    gap = parse_gap(Line(str(path), json.loads(text)))  # what is drawn is what is in the file
    with style.styled():
        paths = style.save(draw_gap(gap), stem)
    atomic.write_text(path, text + "\n")
    print(format_summary(gap))
    print(f"page: {', '.join(map(str, [path, *paths]))}")


@torch.no_grad()
def measure(images: Embeddings, texts: Embeddings, args) -> dict:
    """Compute the line."""
    if images.width < 3:
        raise ValueError(f"rows of {images.width} numbers: the page needs at least three directions")
    splits = split_sources(images, texts, args.fit_fraction, unpaired=args.unpaired)
    num_sampled = min(args.num_pairs, splits.held_images.num_rows, splits.held_texts.num_rows)
    if num_sampled <= K_OVERLAP:
        raise ValueError(
            f"{K_OVERLAP} neighbours need {K_OVERLAP + 1} held-out rows per side, and there are {num_sampled}: "
            "pass more rows, a smaller --fit-fraction or a larger --num-pairs"
        )
    fit = [splits.fit_images, splits.fit_texts]
    names = dict.fromkeys(["none", *args.methods, "realign"])
    operators = {name: METHODS[name].fit(*fit, progress=progress) for name in names}
    realign = operators["realign"]
    first_steps = [ReAlign.fit(*fit, steps=steps, progress=progress) for steps in (STEPS[1:2], STEPS[1:3])]
    steps = dict(zip(STEPS, (operators["none"], *first_steps, realign)))
    held = HeldOut(splits, num_sampled)
    distances = {
        operator: held.compute_distance(operator) for operator in dict.fromkeys([*steps.values(), *operators.values()])
    }
    return {
        "kind": "gap",
        "label": args.label or f"{name_source(images)} and {name_source(texts)}",
        "images": name_source(images),
        "texts": name_source(texts),
        "width": images.width,
        "num_images": images.num_rows,
        "num_texts": texts.num_rows,
        "fit_images": realign.num_images,
        "fit_texts": realign.num_texts,
        "num_sampled": num_sampled,
        "k_mixing": K_MIXING,
        "k_overlap": K_OVERLAP,
        "scale": realign.scale,
        "image_trace": realign.image_trace,
        "text_trace": realign.text_trace,
        "steps": [{"step": name} | distances[operator] for name, operator in steps.items()],
        "methods": [
            {"method": name, "sigma": getattr(operator, "sigma", None)}
            | distances[operator]
            | held.describe_texts(operator)
            for name, operator in operators.items()
        ],
        "chance_of_mixing": chance_of_mixing(num_sampled, num_sampled),
        "image": held.describe_images(),
        **compute_frame_figures(splits, realign, energy=args.energy, rank=args.rank),
        "clouds": held.compute_clouds(realign),
    }


def name_source(embeddings: Embeddings) -> str:
    """Name a source and its layer or tensor without this machine's folders: relative to the working folder, else the base name."""
    path, *what = re.split(r"(?=, (?:layer|tensor) )", embeddings.description, maxsplit=1)
    place, folder = Path(path).resolve(), Path.cwd().resolve()
    name = str(place.relative_to(folder)) if place.is_relative_to(folder) else place.name
    return "".join([name, *what])


def check(args) -> None:
    if count_ranks() > 1:
        raise ValueError("report runs as one process: run it without torchrun")
    if not 0 < args.fit_fraction < 1:
        raise ValueError(f"--fit-fraction {args.fit_fraction:g} must lie between 0 and 1, as some rows are held out")
    if args.num_pairs <= K_OVERLAP:
        raise ValueError(f"--num-pairs {args.num_pairs} must be above {K_OVERLAP}, the number of neighbours compared")


class HeldOut:
    """The held-out rows, and the figures of an operator's texts beside them."""

    def __init__(self, splits: Splits, num_sampled: int):
        self.splits = splits
        self.fit_mean_D = compute_moments(splits.fit_images, "images").mean_D
        self.images = compute_moments(splits.held_images, "images", with_scatter=True)
        self.images_nD, self.texts_nD = (rows.sample(num_sampled) for rows in (splits.held_images, splits.held_texts))
        self.image_cosines = cosine_histogram(self.images_nD)

    def compute_distance(self, operator: EmbeddingOperator) -> dict[str, float]:
        """Measure the distance between the means of images and moved texts, and the floor of sampling."""
        fitted = compute_moments(self.splits.fit_texts.move_with(operator), "moved texts")
        texts = compute_moments(self.splits.held_texts.move_with(operator), "moved texts")
        noise = self.images.trace() / self.images.num_rows + texts.trace() / texts.num_rows
        return {
            "in_sample": (self.fit_mean_D - fitted.mean_D).norm().item(),
            "held_out": (self.images.mean_D - texts.mean_D).norm().item(),
            "floor": noise**0.5,
        }

    def describe_images(self) -> dict:
        return {"spectrum": asdict(describe_spectrum(self.images)), "cosines": self.image_cosines.tolist()}

    def describe_texts(self, operator: EmbeddingOperator) -> dict:
        """Describe moved texts, and compare a sample of them with the images and with itself before."""
        texts = compute_moments(self.splits.held_texts.move_with(operator), "moved texts", with_scatter=True)
        moved_nD = operator.transform(self.texts_nD, dtype=torch.float64)
        cosines = cosine_histogram(moved_nD)
        preserved = fidelity(self.texts_nD, moved_nD, K_OVERLAP)
        return {
            "spectrum": asdict(describe_spectrum(texts)),
            "cosines": cosines.tolist(),
            "mixing": mixing_rate(self.images_nD, moved_nD, K_MIXING),
            "js": js_divergence(self.image_cosines, cosines),
            "phi": preserved.mean_cosine,
            "psi": None if math.isnan(preserved.cosine_correlation) else preserved.cosine_correlation,
            "overlap": preserved.neighbour_overlap,
        }

    def compute_clouds(self, operator: EmbeddingOperator) -> dict[str, list[list[float]]]:
        """Project points onto three directions, from the images' mean."""
        texts = compute_moments(self.splits.held_texts, "texts", with_scatter=True)
        directions_D3 = find_three_directions(
            self.images.mean_D - texts.mean_D, self.images.covariance_DD + texts.covariance_DD
        )
        images_pD, texts_pD = (x_nD[:: -(-len(x_nD) // MOST_POINTS)] for x_nD in (self.images_nD, self.texts_nD))
        clouds = {"image": images_pD, "text": texts_pD, "realigned": operator.transform(texts_pD, dtype=torch.float64)}
        return {
            name: ((normalise_rows(x_pD) - self.images.mean_D) @ directions_D3).mul(1e4).round().div(1e4).tolist()
            for name, x_pD in clouds.items()
        }


def find_three_directions(difference_D: Tensor, covariance_DD: Tensor) -> Tensor:
    """Find orthonormal columns, [D, 3]: the mean difference, and the first principal directions of what is across it."""
    first_D = torch.nn.functional.normalize(difference_D, dim=0)
    across_DD = torch.eye(len(first_D), dtype=first_D.dtype) - torch.outer(first_D, first_D)
    leading_D2 = torch.linalg.eigh(across_DD @ covariance_DD @ across_DD).eigenvectors[:, -2:].flip(1)
    # The sign of an eigenvector means nothing: the largest number is positive.
    largest_2 = leading_D2.gather(0, leading_D2.abs().argmax(0, keepdim=True))
    return torch.cat([first_D[:, None], leading_D2 * largest_2.sign()], dim=1)


def compute_frame_figures(splits: Splits, realign, *, energy: float, rank: int | None) -> dict:
    """Compute the frame's figures on the held-out pairs, before ReAlign and after."""
    nothing = {"frame": None, "budget_after": None}
    if splits.unpaired:
        return nothing | {"left_out": f"energies and spectra in the fixed frame need pairs: {splits.unpaired}"}
    images, texts = splits.paired_images, splits.paired_texts
    before = compute_gap_figures(images, texts, energy=energy, rank=rank)
    frame = Frame.of(images, texts, rank=before.rank)
    after = compute_term_moments(frame, images, texts.move_with(realign)).compute_budget()
    return {"frame": asdict(before), "budget_after": asdict(after), "left_out": None}


def describe_spectrum(found: Moments) -> SpectrumFigures:
    return SpectrumFigures.of(eigenvalues(found.covariance_DD))
