"""Measure alignment: every layer of one backbone against every layer of another, on image-caption pairs.

    rsa-megatron measure --model HF --data DATA --out results/x.jsonl        both sides of one model
    torchrun --nproc-per-node N -m rsa_megatron measure --checkpoint DIR --data DATA --out ...    a Megatron checkpoint of
                                                   --save or hf-to-megatron, with any Megatron flags: in any TP x PP of N processes
    rsa-megatron measure --vision HF --language HF --data DATA --out ...     two separate models
    rsa-megatron measure --vision HF --vision HF --data DATA --out ...       the Vision-only baseline
    rsa-megatron measure --language HF --language HF --data DATA --out ...   the Language-only baseline
    rsa-megatron measure --random --out ...                                  the random baseline
    rsa-megatron measure --features FOLDER FOLDER --out ...                  features stored before

HF is a folder or a name on the hub: LLaVA-OneVision, InternVL3 and Qwen2.5-VL, for --vision also a separate tower
(SigLIP, CLIP, ViT, DINOv2), for --language any causal language model, or an encoder such as BERT. DATA: Energon shards
or a mixture of them, LLaVA's .json or .jsonl, COCO's captions .json, a .csv, .tsv or .parquet with captions, a folder of images
with a .txt each.

Image and caption go separately through tower and language model; the mean of the image's or caption's tokens is taken after
every layer. mutual-kNN is averaged over seeds, each with its own sample of --num-samples pairs. Beside each score stands that
of shuffled pairs, its chance; of the best pair of layers, the best of the same pairs.

Features are stored below --store and reused by any run on the same samples; a run that was killed resumes where it
stopped. --out gets one line per metric, which replaces an earlier one of the same label, data and settings. Of --checkpoint,
--verbose shows what Megatron prints.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from rsa_megatron import screen
from rsa_megatron.alignment.metrics import METRICS, MUTUAL_KNN, NEIGHBOUR_METRICS, describe_too_few
from rsa_megatron.cli.measure_results import format_table, make_line, read_lines, write_lines
from rsa_megatron.command_line import Parser, report_errors
from rsa_megatron.data.sources.open_pairs import open_pairs
from rsa_megatron.evaluation.extraction import Backbone
from rsa_megatron.evaluation.feature_store import STORE_DTYPES, FeatureStore
from rsa_megatron.evaluation.hf_backbones import TEXT_READINGS, VisionBackbone, make_text_backbone
from rsa_megatron.evaluation.hf_models import VISION_LANGUAGE, HFModel
from rsa_megatron.evaluation.layer_scores import compute_cone_figures, find_common_samples, score_layers
from rsa_megatron.evaluation.stored_features import draw_samples, extract_to_store
from rsa_megatron.models.folder_kinds import explain_checkpoint, explain_hf_folder
from rsa_megatron.ranks import exit_with_error, exit_with_own_error, get_rank

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STANDARD_NORMAL = "standard normal"
# Number of skipped pairs that are named.
_NAMED = 5


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.checkpoint:  # Megatron prints its arguments, and much else, on every rank
        screen.begin()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    import transformers  # takes a second, which --help is spared

    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    with report_errors(end=exit_with_own_error, interrupted="interrupted; the same command resumes from here"):
        try:
            measure(args)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"--batch-size {args.batch_size} is too large for the device: {str(error).splitlines()[0]}"
            ) from error


def parse(arguments: list[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="rsa-megatron measure", description=__doc__, formatter_class=style)
    words = sys.argv[1:] if arguments is None else arguments
    parser.passes_unknown_flags = any(word.partition("=")[0] == "--checkpoint" for word in words)  # to Megatron
    what = parser.add_argument_group("models")
    what.add_argument("--model", metavar="HF", help="a vision-language model: its tower against its language model")
    what.add_argument(
        "--checkpoint", metavar="DIR", type=Path, help="a Megatron checkpoint: its tower against its decoder"
    )
    what.add_argument(
        "--projected",
        action="store_true",
        help="of a checkpoint: measure images after the projector, one layer in the decoder's space, not the tower's layers",
    )
    what.add_argument(
        "--vision", metavar="HF", action="append", default=[], help="a tower, or that of a vision-language model"
    )
    what.add_argument(
        "--language",
        metavar="HF",
        action="append",
        default=[],
        help="a language model, or that of a vision-language model; captions are truncated to its maximum length",
    )
    what.add_argument(
        "--features", metavar="FOLDER", type=Path, nargs=2, help="two folders below --store: rows and columns"
    )
    what.add_argument("--random", action="store_true", help="two sets of standard normal vectors")
    what.add_argument(
        "--random-dims",
        type=int,
        nargs=2,
        metavar=("D", "E"),
        default=[1152, 3584],
        help="their widths; default: 1152 3584",
    )
    what.add_argument(
        "--text-reading",
        choices=TEXT_READINGS,
        default=TEXT_READINGS[0],
        help="default: %(default)s; multimodal: the caption after its image in one pass. It attends to the image and so "
        "shares its neighbours: 0.7 was measured where caption-alone gives 0.05",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, metavar="DATA", help="image-caption pairs: see above")
    data.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder that the paths of images are relative to; default: DATA's own",
    )
    data.add_argument(
        "--split", default="val", help="split of shards, and of tables with a column `split`; default: %(default)s"
    )
    data.add_argument(
        "--language-code",
        default="en",
        help="language to select in tables with a column `language`; default: %(default)s",
    )
    data.add_argument("--num-samples", type=int, default=1000, help="pairs per seed; default: %(default)s")
    data.add_argument(
        "--seeds",
        type=int,
        default=3,
        help="number of seeds (0, 1, ...), each with its own sample of pairs; default: %(default)s",
    )
    how = parser.add_argument_group("measurement")
    how.add_argument("--k", type=int, default=10, help="number of neighbours; default: %(default)s")
    how.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=[MUTUAL_KNN],
        metavar="NAME",
        help=f"one or more of {', '.join(METRICS)}; default: {MUTUAL_KNN}",
    )
    how.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if available"
    )
    how.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="dtype of weights and arithmetic; means are float32; default: %(default)s",
    )
    how.add_argument(
        "--batch-size", type=int, default=32, help="images or captions per forward pass; default: %(default)s"
    )
    how.add_argument("--num-workers", type=int, default=2, help="threads that open images; default: %(default)s")
    how.add_argument(
        "--store",
        type=Path,
        default=Path("features"),
        metavar="DIR",
        help="folder for stored features; default: %(default)s",
    )
    how.add_argument(
        "--store-dtype",
        choices=STORE_DTYPES,
        default="float32",
        help="dtype of stored features; float16 takes half the space; default: %(default)s",
    )
    names = parser.add_argument_group("output")
    names.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="one line per metric")
    names.add_argument("--label", help="name in tables and figures; default: the model's")
    names.add_argument("--data-name", help="name of the data in them; default: DATA's own")
    args, args.megatron_flags = parser.parse_known_args(arguments)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Check what argparse cannot; fail with one line."""
    sides = len(args.vision) + len(args.language)
    if args.megatron_flags and not args.checkpoint:  # words that are no flags
        exit_with_error(f"unrecognized arguments: {' '.join(args.megatron_flags)}")
    given = [name for name in ("model", "checkpoint", "features", "random") if getattr(args, name)] + [
        "vision and --language"
    ] * bool(sides)
    if args.projected and not args.checkpoint:
        exit_with_error("--projected needs a --checkpoint, whose projector it reads")
    if len(given) != 1:
        found = f", not --{' and --'.join(given)}" if given else ""
        exit_with_error(
            f"name what to measure: one of --model, --checkpoint, two of --vision and --language, --features, --random{found}"
        )
    if sides not in (0, 2):
        exit_with_error(f"--vision and --language must name two backbones in total, not {sides}")
    needs_data = bool(args.model or args.checkpoint or sides)
    if needs_data != bool(args.data):
        exit_with_error(
            "--data is needed: image-caption pairs"
            if needs_data
            else f"--data needs models; it cannot be used with --{given[0]}"
        )
    if args.text_reading != TEXT_READINGS[0] and not (args.model or args.language):
        exit_with_error(f"--text-reading {args.text_reading} needs --model or --language")
    for name in ("num_samples", "seeds", "k", "batch_size", "num_workers"):
        if getattr(args, name) < 1:
            exit_with_error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if min(args.random_dims) < 1:
        exit_with_error(f"--random-dims must be at least 1, not {min(args.random_dims)}")
    with_neighbours = [metric for metric in args.metrics if metric in NEIGHBOUR_METRICS]
    if args.k >= args.num_samples and with_neighbours and not args.features:
        exit_with_error(
            f"--k {args.k} needs more than {args.k} samples, for {', '.join(with_neighbours)}; --num-samples is {args.num_samples}"
        )
    for name in filter(None, [args.model, *args.vision, *args.language]):
        if fault := explain_checkpoint("", Path(name), measures=True):
            exit_with_error(fault)
    if args.checkpoint and not args.checkpoint.is_dir():
        exit_with_error(f"--checkpoint {args.checkpoint} is not a folder")
    remedy = f"--model {args.checkpoint} measures it"
    if args.checkpoint and (fault := explain_hf_folder("--checkpoint ", args.checkpoint, remedy)):
        exit_with_error(fault)
    if args.out.is_dir():
        exit_with_error(f"--out {args.out} is a folder; name a file")
    if get_rank():
        return
    try:
        check_device(args.device)
    except ValueError as error:
        exit_with_error(str(error))


def check_device(device: str) -> None:
    """Raise ValueError unless the device can be used."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error


def measure(args: argparse.Namespace) -> None:
    read_lines(args.out)  # what is wrong with it shows before the hours, not after
    rows, columns = open_stores(args)
    report_skipped(rows, columns)
    samples = find_common_samples(rows, columns)
    lines = []
    for metric in choose_metrics(args, min(len(of_rows) for of_rows, _ in samples)):
        scores = score_layers(
            rows, columns, metric, k=args.k, samples=samples, device=args.device, each=make_progress(metric)
        )
        gap = compute_cone_figures(rows, columns, scores, samples=samples, device=args.device)
        lines.append(make_line(rows, columns, scores, gap, k=args.k, label=args.label, data=args.data_name))
        write_lines(
            args.out, lines[-1:]
        )  # a metric that has no value for a layer ends the run, and takes no other with it
    screen.show(format_table(lines))


def choose_metrics(args: argparse.Namespace, num_samples: int) -> list[str]:
    """Choose those that so many samples allow, and print the others. Raises ValueError where none is left."""
    reasons = {metric: describe_too_few(metric, args.k, num_samples) for metric in args.metrics}
    left_out = [f"{metric}: {reason}" for metric, reason in reasons.items() if reason]
    if len(left_out) == len(reasons):
        has_neighbours = any(metric in NEIGHBOUR_METRICS for metric in reasons)
        raise ValueError(f"{'; '.join(left_out)}; take more pairs" + " or a smaller --k" * has_neighbours)
    for line in left_out:
        screen.show_aside(f"left out: {line}")
    return [metric for metric, reason in reasons.items() if not reason]


def make_progress(metric: str) -> Callable[[Sequence[str]], Sequence[str]]:
    """Make a progress bar over the rows' layers, in a terminal."""
    return lambda layers: tqdm(layers, desc=metric, unit="layer", leave=False) if sys.stderr.isatty() else layers


def report_skipped(rows: FeatureStore, columns: FeatureStore) -> None:
    reasons = {key: reason for store in (rows, columns) for key, reason in store.left_out.items()}
    print_skipped(reasons)
    if reasons:
        screen.show_aside(f"skipped: to retry these, remove {rows.folder} and {columns.folder}")


def print_skipped(reasons: dict[str, str]) -> None:
    """Print skipped samples with the reason; of many the first and how many more."""
    for key, reason in [*reasons.items()][:_NAMED]:
        screen.show_aside(f"skipped: {key}: {reason}")
    if len(reasons) > _NAMED:
        screen.show_aside(f"skipped: {len(reasons) - _NAMED} more")


def open_stores(args: argparse.Namespace) -> tuple["FeatureStore | StandardNormal", ...]:
    """Open the features of rows and columns, computed where they are not on disk."""
    if args.features:
        return FeatureStore.open(args.features[0]), FeatureStore.open(args.features[1])
    if args.random:
        return StandardNormal(args, 0), StandardNormal(args, 1)
    opened = open_backbones(args)
    if get_rank():
        with opened:
            raise AssertionError("the other ranks serve in there, and end")
    pairs = open_pairs(args.data, images=args.images, split=args.split, language=args.language_code)
    chosen = draw_samples(
        pairs,
        args.num_samples,
        list(range(args.seeds)),
        data=args.data.resolve().name,
        split=args.split,
        language=args.language_code,
        images=str(args.images and args.images.resolve()),
    )
    options = {"store_dtype": args.store_dtype, "batch_size": args.batch_size, "num_workers": args.num_workers}
    with opened as waiting:
        # Popped, the first model leaves its memory to the second.
        return tuple(extract_to_store(waiting.pop(0), chosen, args.store, **options) for _ in (0, 1))


def open_backbones(args: argparse.Namespace) -> AbstractContextManager[list[Backbone]]:
    """Open the backbones of rows and columns."""
    if not args.checkpoint:
        return nullcontext(make_hugging_face_backbones(args))
    from rsa_megatron.training.checkpoint_backbone import (
        checkpoint_backbones,  # loads Megatron, which nothing else here needs
    )

    options = {"dtype": args.dtype, "batch_size": args.batch_size, "projected": args.projected}
    return checkpoint_backbones(args.checkpoint, args.megatron_flags, **options)


def make_hugging_face_backbones(args: argparse.Namespace) -> list[Backbone]:
    """Make the backbones; weights are read only if their features are not on disk."""

    def model(name: str) -> HFModel:
        return HFModel(name, device=torch.device(args.device), dtype=DTYPES[args.dtype])

    if args.model:
        both = model(args.model)
        if not both.is_vision_language:
            raise ValueError(
                f"--model {args.model}: model_type {both.model_type} is not supported; supported: "
                f"{', '.join(VISION_LANGUAGE)}; name separate models with --vision and --language"
            )
        return [VisionBackbone(both), make_text_backbone(both, args.text_reading)]
    towers = [VisionBackbone(model(name)) for name in args.vision]
    return towers + [make_text_backbone(model(name), args.text_reading) for name in args.language]


class StandardNormal:
    """The interface of a FeatureStore for random vectors: every seed its own N."""

    def __init__(self, args: argparse.Namespace, number: int):
        self.folder, self.layers, self.left_out = Path("--random"), [STANDARD_NORMAL], {}
        self._width, self._number, self._num_samples = args.random_dims[number], number, args.num_samples
        total = args.num_samples * args.seeds
        self.keys = [str(key) for key in range(total)]
        self.manifest = {
            "model": "Random",
            "revision": None,
            "side": ("vision", "text")[number],
            "pooling": f"none, {self._width} wide",
            "data": STANDARD_NORMAL,
            "num_samples": args.num_samples,
            "seeds": list(range(args.seeds)),
            "keys": self.keys,
            "samples": [list(range(start, start + args.num_samples)) for start in range(0, total, args.num_samples)],
        }

    def read_layer(self, name: str) -> Tensor:
        seeds = [torch.Generator().manual_seed(2 * seed + self._number) for seed in self.manifest["seeds"]]
        return torch.cat([torch.randn(self._num_samples, self._width, generator=generator) for generator in seeds])
