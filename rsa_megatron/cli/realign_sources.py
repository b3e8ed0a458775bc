"""What rsa-megatron realign works on: two sets of embeddings that are there, or those of an encoder for some data.

Under torchrun every rank opens the same two sets; what is not there is embedded by the first rank, the others wait.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from rsa_megatron.cli.measure import DTYPES, check_device, say_left_out
from rsa_megatron.data.sources.captions_only import open_captions
from rsa_megatron.data.sources.open_pairs import open_pairs
from rsa_megatron.data.sources.pairs import Pairs, format_counts
from rsa_megatron.evaluation.dual_encoders import ImageEmbedder, TextEmbedder
from rsa_megatron.evaluation.embedding_files import Embeddings, of_store, open_embeddings
from rsa_megatron.evaluation.feature_store import STORE_DTYPES, FeatureStore
from rsa_megatron.evaluation.hf_models import HFModel
from rsa_megatron.evaluation.stored_features import Drawn, draw, stored_features

EMBEDDERS = {"image": ImageEmbedder, "text": TextEmbedder}
Found = TypeVar("Found")


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags by which `sources` finds the images' and the texts' embeddings."""
    given = parser.add_argument_group("embeddings that are there")
    given.add_argument(
        "--images", metavar="SOURCE", help="FOLDER[:LAYER] of stored features, x.npy or x.safetensors[:TENSOR]"
    )
    given.add_argument("--texts", metavar="SOURCE", help="the same, of texts; the two sets need not pair up")
    data = parser.add_argument_group("or those of an encoder")
    add_encoder_arguments(data)
    data.add_argument(
        "--text-data", type=Path, metavar="DATA", help="texts of other data than the images; default: those of --data"
    )
    data.add_argument(
        "--split", default="train", help="part of shards, and of tables with a column `split`; default: %(default)s"
    )
    add_embedding_arguments(parser)


def add_encoder_arguments(group) -> None:
    """Flags that name an encoder and data."""
    group.add_argument("--encoder", metavar="HF", help="CLIP, SigLIP or SigLIP2: a folder, or a name on the hub")
    group.add_argument(
        "--data",
        type=Path,
        metavar="DATA",
        help="image-caption pairs: Energon shards, .json, .jsonl, .yaml, "
        ".parquet, or a folder of images with texts; for texts also LLaVA's records without images, "
        "or a .txt of a caption a line",
    )
    group.add_argument(
        "--image-folder",
        type=Path,
        metavar="DIR",
        help="folder that the paths of images are relative to; default: DATA's own",
    )
    group.add_argument("--language-code", default="en", help="of tables with a column `language`; default: %(default)s")
    group.add_argument("--num-samples", type=int, help="so many of each part of the data; default: all of it")


def add_embedding_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say how an encoder runs."""
    how = parser.add_argument_group("how it embeds")
    how.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda where there is one"
    )
    how.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and arithmetic; default: %(default)s"
    )
    how.add_argument(
        "--batch-size",
        type=int,
        default=32,
        help="images or captions that go through the encoder together; default: %(default)s",
    )
    how.add_argument("--num-workers", type=int, default=2, help="threads that open images; default: %(default)s")
    how.add_argument(
        "--store",
        type=Path,
        default=Path("features"),
        metavar="DIR",
        help="embeddings are kept below it; default: %(default)s",
    )
    how.add_argument(
        "--store-dtype",
        choices=STORE_DTYPES,
        default="float32",
        help="of the embeddings that are kept; float16 takes half the room; default: %(default)s",
    )


def check_sources(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not go together."""
    there, embedded = bool(args.images or args.texts), bool(args.encoder or args.data or args.text_data)
    if there == embedded or there != bool(args.images and args.texts) or embedded != bool(args.encoder and args.data):
        raise ValueError("name two sets of embeddings, --images and --texts, or an --encoder and its --data")
    if there and args.num_samples is not None:
        raise ValueError("--num-samples goes with --encoder; of embeddings that are there all are read")
    check_numbers(args)


def check_numbers(args: argparse.Namespace) -> None:
    for name in ("num_samples", "batch_size", "num_workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    check_device(args.device)


def sources(args: argparse.Namespace) -> tuple[Embeddings, Embeddings]:
    """The images' and the texts' embeddings; what an encoder gives is stored first, below --store.

    Raises:
        ValueError: they are not there, or of different widths; on all ranks of torchrun alike.
    """
    check_sources(args)
    if args.encoder:
        folders = on_first_rank(lambda: [str(store.folder) for store in (embed_images(args), embed_texts(args))])
        images, texts = (of_store(FeatureStore.open(folder)) for folder in folders)
    else:
        images, texts = on_all_ranks(lambda: (open_embeddings(args.images), open_embeddings(args.texts)))
    check_sides(images, "vision", "--images")
    check_sides(texts, "text", "--texts")
    check_widths(images, texts)
    return images, texts


def check_sides(embeddings: Embeddings, side: str, flag: str) -> None:
    """Raises ValueError for features that say they are of the other side; a file's rows say nothing."""
    found = embeddings.about.get("side", side)
    if found != side:
        raise ValueError(
            f"{flag} {embeddings.description}: these are of the side {found}; images and texts are the other way round"
        )


def check_widths(images: Embeddings, texts: Embeddings) -> None:
    """Raises ValueError unless both can lie in one space."""
    if images.width != texts.width:
        raise ValueError(
            f"{images.description} has {images.width} numbers a row and {texts.description} has {texts.width}: texts can be "
            "moved onto images within one space alone; embed both with a dual encoder (--encoder: CLIP, SigLIP), or take "
            "both after a layer that projects them to one width"
        )


def embed_images(args: argparse.Namespace) -> FeatureStore:
    pairs = open_pairs(args.data, images=args.image_folder, split=args.split, language=args.language_code)
    return stored("image", drawn(args, args.data, pairs, args.split, images=args.image_folder), args)


def embed_texts(args: argparse.Namespace) -> FeatureStore:
    data = args.text_data or args.data
    pairs = open_captions(data, split=args.split, language=args.language_code)
    return stored("text", drawn(args, data, pairs, args.split), args)


def drawn(args: argparse.Namespace, data: Path, pairs: Pairs, split: str, images: Path | None = None) -> Drawn:
    """--num-samples of the pairs, or all of them; what the data has besides is said."""
    source = {"language": args.language_code, "images": str(images and images.resolve())}
    chosen = draw(pairs, args.num_samples, [0], data=f"{data.resolve().name}-{split}", **source)
    if pairs.left_out:
        print(f"left out: of {data}, part {split}: {format_counts(pairs.left_out)}", file=sys.stderr)
    return chosen


def stored(side: str, chosen: Drawn, args: argparse.Namespace) -> FeatureStore:
    """The embeddings of some samples, computed where they are not on disk."""
    model = HFModel(args.encoder, device=torch.device(args.device), dtype=DTYPES[args.dtype])
    options = {"store_dtype": args.store_dtype, "batch_size": args.batch_size, "num_workers": args.num_workers}
    embedder = EMBEDDERS[side](model)
    store = stored_features(embedder, chosen, args.store, **options)
    say_left_out(store.left_out)
    if embedder.num_cut:
        print(
            f"{embedder.num_cut} of {len(chosen.pairs)} texts are longer than {args.encoder} reads; what it does not read is not in "
            "their embeddings, and texts that begin alike may have equal ones",
            file=sys.stderr,
        )
    return store


def progress(pieces: Iterable[Tensor], what: str) -> Iterable[Tensor]:
    """The pieces, with a bar of rows on the first rank's terminal."""
    disable = rank() > 0 or None  # None: where there is no terminal
    with tqdm(
        total=getattr(pieces, "num_rows", None), desc=what, unit="row", unit_scale=True, leave=False, disable=disable
    ) as bar:
        for piece_ND in pieces:
            yield piece_ND
            bar.update(len(piece_ND))


def group() -> torch.distributed.ProcessGroup | None:
    """Of all ranks of torchrun; None for one process."""
    return torch.distributed.group.WORLD if torch.distributed.is_initialized() else None


def rank() -> int:
    return torch.distributed.get_rank() if group() else 0


def num_ranks() -> int:
    return torch.distributed.get_world_size() if group() else 1


def on_first_rank(function: Callable[[], Found]) -> Found:
    """What the first rank's call gives, on all ranks; or its ValueError."""
    found = [None, None]
    if rank() == 0:
        try:
            found = [function(), None]
        except (ValueError, OSError) as error:
            found = [None, str(error)]
    if group():
        torch.distributed.broadcast_object_list(found, src=0)
    if found[1]:
        raise ValueError(found[1])
    return found[0]


def on_all_ranks(function: Callable[[], Found]) -> Found:
    """What the call gives on each rank; or the ValueError of any of them on all: none waits for one that has ended."""
    found, fault = None, None
    try:
        found = function()
    except (ValueError, OSError) as error:
        fault = str(error)
    faults = [fault]
    if group():
        faults = [None] * num_ranks()
        torch.distributed.all_gather_object(faults, fault)
    if any(faults):
        raise ValueError(next(fault for fault in faults if fault))
    return found
