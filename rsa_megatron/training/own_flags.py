"""The training script's own flags."""

import argparse

from rsa_megatron.alignment.metrics import METRICS
from rsa_megatron.data.conversation import LABEL_STYLES, TEMPLATES
from rsa_megatron.data.tiles import ASPECT_RATIOS
from rsa_megatron.models.llava_onevision import PARTS
from rsa_megatron.training import console, embedding_arguments, learning_rates, metrics_file, mfu, packing_arguments


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the training script's own flags."""
    group = parser.add_argument_group("LLaVA with RSA")
    group.add_argument(
        "--model",
        default="demo",
        help="architecture, or a Hugging Face folder; sets the model's Megatron arguments; default: %(default)s",
    )
    group.add_argument(
        "--stage", default="1", help="training stage: revision, 1, 1.5 or 2; sets the run's Megatron arguments"
    )
    group.add_argument(
        "--trainable", nargs="+", choices=list(PARTS), help="modules that are trained; the others are frozen"
    )
    learning_rates.add_arguments(group)
    metrics_file.add_arguments(group)
    group.add_argument("--template", choices=TEMPLATES, help="how a conversation becomes tokens")
    group.add_argument(
        "--label-style",
        choices=LABEL_STYLES,
        default="llava",
        help="which tokens of the template qwen_1_5 are trained on: as in LLaVA, or only the answers",
    )
    group.add_argument(
        "--image-aspect-ratio",
        choices=ASPECT_RATIOS,
        help="square: an image is squashed into one tile; anyres: a base tile and a grid of tiles",
    )
    group.add_argument(
        "--image-grids",
        nargs="+",
        type=grid,
        metavar="ROWSxCOLUMNS",
        help="the grids of tiles that anyres may choose from, of equally good ones the first; default: the model's own",
    )
    embedding_arguments.add_arguments(group)
    group.add_argument(
        "--drop-last",
        action="store_true",
        help="in a single pass over the data, skip each reader's last samples that do not fill a micro-batch, "
        "and the last iterations for which not every rank has data",
    )
    group.add_argument(
        "--shuffle-buffer-size", type=int, default=1000, help="Energon's, in samples; default: %(default)s"
    )
    packing_arguments.add_arguments(group)
    group.add_argument(
        "--mutual-knn-samples",
        type=int,
        default=1000,
        help="validation pairs for mutual-knn at each evaluation; 0: none; default: %(default)s",
    )
    group.add_argument("--mutual-knn-k", type=int, default=10, help="neighbours; default: %(default)s")
    group.add_argument(
        "--eval-metrics",
        nargs="+",
        choices=list(METRICS),
        default=["mutual-knn"],
        help="scores of alignment at each evaluation, on the pairs and layers of --mutual-knn-samples and --mutual-knn-layers",
    )
    group.add_argument(
        "--mutual-knn-layers",
        type=layer_pairs,
        default=[(-1, -1)],
        metavar="VISION:TEXT,...",
        help="layers to compare, as --mutual-knn-layers=-1:-1,12:14; -1 is the last, 0 what goes into the first",
    )
    group.add_argument(
        "--restart-data", action="store_true", help="resume from a checkpoint with the data from its beginning"
    )
    mfu.add_arguments(group)
    console.add_arguments(group)
    group.add_argument("--dry-run", action="store_true", help="print what would run, and stop")


def grid(text: str) -> tuple[int, int]:
    """ "2x3" as (2, 3)."""
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise argparse.ArgumentTypeError(f"{text} is no grid of ROWSxCOLUMNS, such as 2x3")
    return int(rows), int(columns)


def layer_pairs(text: str) -> list[tuple[int, int]]:
    """ "-1:-1,12:14" as [(-1, -1), (12, 14)]."""
    try:
        pairs = [tuple(int(layer) for layer in pair.split(":")) for pair in text.split(",")]
    except ValueError:
        pairs = [()]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text} is no list of VISION:TEXT layers, such as -1:-1,12:14")
    return pairs
