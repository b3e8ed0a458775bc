"""What rsa-megatron realign works on: two existing sets of embeddings, or those of an encoder for some data.

Under torchrun every rank opens the same two sets; what is not stored is embedded by the first rank, the others wait.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from rsa_megatron.cli.measure import DTYPES, check_device, print_skipped
from rsa_megatron.data.sources.captions_only import open_captions
from rsa_megatron.data.sources.open_pairs import open_pairs
from rsa_megatron.data.sources.pairs import Pairs, format_counts
from rsa_megatron.evaluation.dual_encoders import ImageEmbedder, TextEmbedder
from rsa_megatron.evaluation.embedding_files import Embeddings, open_embeddings, open_store
from rsa_megatron.evaluation.feature_store import STORE_DTYPES, FeatureStore
from rsa_megatron.evaluation.hf_models import HFModel
from rsa_megatron.evaluation.stored_features import SampleSet, draw_samples, extract_to_store
from rsa_megatron.models.folder_kinds import find_run
from rsa_megatron.ranks import get_rank, run_on_all_ranks, run_on_first_rank

EMBEDDERS = {"image": ImageEmbedder, "text": TextEmbedder}
Found = TypeVar("Found")


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `open_sources`."""
    given = parser.add_argument_group("existing embeddings")
    given.add_argument(
        "--images", metavar="SOURCE", help="FOLDER[:LAYER] of stored features, x.npy or x.safetensors[:TENSOR]"
    )
    given.add_argument("--texts", metavar="SOURCE", help="the same for texts; the two sets need not pair up")
    data = parser.add_argument_group("or an encoder and data")
    add_encoder_arguments(data)
    data.add_argument("--text-data", type=Path, metavar="DATA", help="data to take the texts from; default: --data")
    data.add_argument(
        "--split", default="train", help="split of shards, and of tables with a column `split`; default: %(default)s"
    )
    add_embedding_arguments(parser)


def add_encoder_arguments(group) -> None:
    """Add the flags that name an encoder and data."""
    group.add_argument("--encoder", metavar="HF", help="CLIP, SigLIP or SigLIP2: a folder, or a name on the hub")
    group.add_argument(
        "--data",
        type=Path,
        metavar="DATA",
        help="image-caption pairs: Energon shards, .json, .jsonl, .yaml, "
        ".parquet, or a folder of images with texts; for texts also LLaVA's records without images, "
        "or a .txt with one caption per line",
    )
    group.add_argument(
        "--image-folder",
        type=Path,
        metavar="DIR",
        help="folder that the paths of images are relative to; default: DATA's own",
    )
    group.add_argument(
        "--language-code",
        default="en",
        help="language to select in tables with a column `language`; default: %(default)s",
    )
    group.add_argument("--num-samples", type=int, help="samples per split; default: all")


def add_embedding_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that configure the encoder."""
    how = parser.add_argument_group("embedding")
    how.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if available"
    )
    how.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of weights and arithmetic; default: %(default)s"
    )
    how.add_argument(
        "--batch-size",
        type=int,
        default=32,
        help="images or captions per forward pass; default: %(default)s",
    )
    how.add_argument("--num-workers", type=int, default=2, help="threads that open images; default: %(default)s")
    how.add_argument(
        "--store",
        type=Path,
        default=Path("features"),
        metavar="DIR",
        help="folder for stored embeddings; default: %(default)s",
    )
    how.add_argument(
        "--store-dtype",
        choices=STORE_DTYPES,
        default="float32",
        help="dtype of stored embeddings; float16 takes half the space; default: %(default)s",
    )


def check_sources(args: argparse.Namespace) -> None:
    """Raise ValueError for conflicting flags."""
    there, embedded = bool(args.images or args.texts), bool(args.encoder or args.data or args.text_data)
    if there == embedded or there != bool(args.images and args.texts) or embedded != bool(args.encoder and args.data):
        raise ValueError("name two sets of embeddings, --images and --texts, or an --encoder and its --data")
    if there and args.num_samples is not None:
        raise ValueError("--num-samples needs --encoder; existing embeddings are read whole")
    check_numbers(args)


def check_numbers(args: argparse.Namespace) -> None:
    for name in ("num_samples", "batch_size", "num_workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    check_device(args.device)


def open_sources(args: argparse.Namespace) -> tuple[Embeddings, Embeddings]:
    """Open the images' and the texts' embeddings; an encoder's are stored first, below --store.

    Raises:
        ValueError: not found, or of different widths; on all ranks of torchrun alike.
    """
    check_sources(args)
    if args.encoder:
        folders = run_on_first_rank(lambda: [str(store.folder) for store in (embed_images(args), embed_texts(args))])
        images, texts = (open_store(FeatureStore.open(folder)) for folder in folders)
    else:
        images, texts = run_on_all_ranks(lambda: (open_embeddings(args.images), open_embeddings(args.texts)))
    check_sides(images, "vision", "--images")
    check_sides(texts, "text", "--texts")
    check_widths(images, texts)
    return images, texts


def check_sides(embeddings: Embeddings, side: str, flag: str) -> None:
    """Raise ValueError for features of the other side; a file's rows have no side."""
    found = embeddings.about.get("side", side)
    if found != side:
        raise ValueError(f"{flag} {embeddings.description}: these are of the side {found}; swap --images and --texts")


def check_widths(images: Embeddings, texts: Embeddings) -> None:
    """Raise ValueError unless both can lie in one space."""
    if images.width != texts.width:
        raise ValueError(
            f"{images.description} has {images.width} numbers a row and {texts.description} has {texts.width}: texts can be "
            "moved onto images only within one space; embed both with a dual encoder (--encoder: CLIP, SigLIP), or take "
            "both after a layer that projects them to one width"
        )


def embed_images(args: argparse.Namespace) -> FeatureStore:
    pairs = open_pairs(args.data, images=args.image_folder, split=args.split, language=args.language_code)
    return embed_samples("image", draw_split(args, args.data, pairs, args.split, images=args.image_folder), args)


def embed_texts(args: argparse.Namespace) -> FeatureStore:
    data = args.text_data or args.data
    pairs = open_captions(data, split=args.split, language=args.language_code)
    return embed_samples("text", draw_split(args, data, pairs, args.split), args)


def draw_split(args: argparse.Namespace, data: Path, pairs: Pairs, split: str, images: Path | None = None) -> SampleSet:
    """Draw --num-samples of the pairs, or all; print what was skipped."""
    source = {"language": args.language_code, "images": str(images and images.resolve())}
    chosen = draw_samples(pairs, args.num_samples, [0], data=f"{data.resolve().name}-{split}", **source)
    if pairs.left_out:
        print(f"skipped: of {data}, split {split}: {format_counts(pairs.left_out)}", file=sys.stderr)
    return chosen


def embed_samples(side: str, chosen: SampleSet, args: argparse.Namespace) -> FeatureStore:
    """Return the embeddings of some samples, computed where they are not on disk."""
    if find_run(Path(args.encoder)):
        raise ValueError(
            f"--encoder {args.encoder} is a Megatron checkpoint, whose images and captions have no embeddings in one space; "
            "name a CLIP, SigLIP or SigLIP2"
        )
    model = HFModel(args.encoder, device=torch.device(args.device), dtype=DTYPES[args.dtype])
    options = {"store_dtype": args.store_dtype, "batch_size": args.batch_size, "num_workers": args.num_workers}
    embedder = EMBEDDERS[side](model)
    store = extract_to_store(embedder, chosen, args.store, **options)
    print_skipped(store.left_out)
    return store


def progress(pieces: Iterable[Tensor], what: str) -> Iterable[Tensor]:
    """Yield the pieces, with a progress bar of rows on the first rank's terminal."""
    disable = get_rank() > 0 or None  # None: where there is no terminal
    with tqdm(
        total=getattr(pieces, "num_rows", None), desc=what, unit="row", unit_scale=True, leave=False, disable=disable
    ) as bar:
        for piece_ND in pieces:
            yield piece_ND
            bar.update(len(piece_ND))
