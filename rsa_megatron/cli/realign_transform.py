"""`rsa-megatron realign transform`: rows to rows, or data to Energon shards whose images are embeddings."""

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from rsa_megatron import atomic
from rsa_megatron.cli.data import choose_held_out
from rsa_megatron.cli.realign_fit import format_encoder
from rsa_megatron.cli.realign_sources import (
    add_embedding_arguments,
    add_encoder_arguments,
    check_numbers,
    check_sides,
    draw_split,
    embed_samples,
    progress,
)
from rsa_megatron.data.prepare.embedding_shards import (
    EmbeddingInfo,
    EmbeddingTable,
    check_free,
    make_embedding_info,
    write_embedding_shards,
)
from rsa_megatron.data.sources.captions_only import open_captions
from rsa_megatron.data.sources.open_pairs import is_prepared, open_pairs
from rsa_megatron.data.sources.pairs import CaptionedImage, format_counts
from rsa_megatron.data.sources.record import Unusable
from rsa_megatron.data.sources.shards import is_rsa, list_splits
from rsa_megatron.evaluation.embedding_files import Embeddings, open_embeddings, open_store
from rsa_megatron.evaluation.feature_store import FeatureStore
from rsa_megatron.evaluation.stored_features import SampleSet
from rsa_megatron.ranks import count_ranks
from rsa_megatron.realign.baselines import load_operator
from rsa_megatron.realign.operator import EmbeddingOperator
from rsa_megatron.realign.realign import normalise_rows

_DTYPES = {"float32": numpy.float32, "float16": numpy.float16, "float64": numpy.float64}


@dataclass(frozen=True)
class KeyedRows:
    """Embeddings to be looked up by key."""

    keys: list[str]
    #: one after the other
    sources: list[Embeddings]

    @classmethod
    def of(cls, stores: list[FeatureStore]) -> "KeyedRows":
        return cls(
            [key for store in stores for key in store.keys], [open_store(store) for store in stores if store.keys]
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="x.npy, or with --data a folder of shards")
    parser.add_argument(
        "--operator",
        type=Path,
        metavar="FOLDER",
        help="written by `fit`; required for texts, not used for images",
    )
    parser.add_argument(
        "--out-dtype", choices=_DTYPES, default="float32", help="dtype of the output; default: %(default)s"
    )
    there = parser.add_argument_group("existing embeddings")
    there.add_argument(
        "--texts", metavar="SOURCE", help="FOLDER[:LAYER] of stored features, x.npy or x.safetensors[:TENSOR]"
    )
    there.add_argument("--images", metavar="SOURCE", help="the same for images, for shards of --data")
    there.add_argument(
        "--keys", type=Path, metavar="FILE", help="one id per line and row; a sample of --data takes the row of its id"
    )
    data = parser.add_argument_group("or an encoder, and the data to write")
    add_encoder_arguments(data)
    data.add_argument(
        "--side", choices=("text", "image"), help="which embedding of the encoder replaces a sample's image"
    )
    data.add_argument(
        "--rsa",
        action="store_true",
        help="written samples enter the RSA loss; not for shards, which specify it themselves",
    )
    data.add_argument(
        "--val",
        help="validation split of data without splits: a fraction below 1, or a number of samples; default: 0.01",
    )
    data.add_argument("--shard-size", type=int, default=1000, help="samples per tar; default: %(default)s")
    add_embedding_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Write rows or shards. Raises ValueError for conflicting flags, and for what cannot be written."""
    check(args)
    operator = load_operator(args.operator) if args.operator else None
    if args.data:
        write_shards(args, operator)
    else:
        write_rows(args, operator)


def check(args: argparse.Namespace) -> None:
    if count_ranks() > 1:
        raise ValueError("transform runs as one process: run it without torchrun")
    side = get_side(args)
    if args.encoder and not args.data:
        raise ValueError("--encoder needs --data: what it embeds, and what is written")
    if side == "image" and args.operator:
        raise ValueError("--operator moves only texts; images are unchanged: omit it with images")
    if side == "text" and not args.operator:
        raise ValueError("--operator is needed for texts; to leave texts unchanged fit one with --method none")
    if side == "image" and not args.data:
        raise ValueError(
            "--images without --data: images are unchanged, so there is nothing to write; name the --data of shards"
        )
    if args.keys and (args.encoder or not args.data):
        raise ValueError("--keys needs --texts or --images and --data: it maps rows to samples of the data")
    if not args.data and args.out.suffix != ".npy":
        raise ValueError(f"--out {args.out}: name an .npy for rows, or --data for shards")
    if args.shard_size < 1:
        raise ValueError(f"--shard-size must be at least 1, not {args.shard_size}")
    check_numbers(args)
    check_free(args.out)


def get_side(args: argparse.Namespace) -> str:
    """Return what is written: text or image."""
    given = [name for name in ("encoder", "texts", "images") if getattr(args, name)]
    if len(given) != 1:
        found = f", not --{' and --'.join(given)}" if given else ""
        raise ValueError(f"name one of --encoder, --texts and --images{found}")
    if bool(args.encoder) != bool(args.side):
        raise ValueError("--encoder needs --side text or --side image, and --side needs --encoder")
    return args.side or given[0].removesuffix("s")


def write_rows(args: argparse.Namespace, operator: EmbeddingOperator) -> None:
    """Move rows into an .npy that appears when it is complete."""
    texts = open_embeddings(args.texts)
    check_encoder(operator, texts)
    with atomic.new_file(args.out) as unfinished:
        _write_npy(unfinished, [texts], operator, _DTYPES[args.out_dtype])
    print(f"{args.out}: {texts.num_rows} rows of {texts.width}, {operator.method}")


def write_shards(args: argparse.Namespace, operator: EmbeddingOperator | None) -> None:
    """Write data to shards; the rows are in a file beside them meanwhile."""
    chosen, left_out = draw_splits(args), Counter()
    stores = [embed_samples(args.side, samples, args) for samples in chosen.values()] if args.encoder else []
    rows = KeyedRows.of(stores) if stores else open_given_rows(args)
    if operator:
        for texts in rows.sources:
            check_encoder(operator, texts)
    temporary = args.out.with_name(args.out.name + ".rows.unfinished")
    atomic.make_folder(args.out.parent)
    try:
        with atomic.explain_full_disk(args.out):
            moved_ND = _write_npy(temporary, rows.sources, operator, _DTYPES[args.out_dtype])
        table = EmbeddingTable(rows.keys, moved_ND)
        not_embedded = {key for store in stores for key in store.left_out}
        described = {
            part: _describe_pairs(pairs, not_embedded, bool(args.keys), left_out)
            for part, pairs in assign_splits(args, chosen).items()
        }
        rsa = is_rsa(args.data) if is_prepared(args.data) else args.rsa
        counts = write_embedding_shards(args.out, described, table, rsa=rsa, shard_size=args.shard_size)
    finally:
        temporary.unlink(missing_ok=True)
    what = f"texts, {operator.method}" if operator else "images"
    summary = ", ".join(f"{count} samples for {part}" for part, count in counts.items())
    print(f"{args.out}: {summary}; embeddings of {what}, {rows.sources[0].width} numbers each")
    if left_out:
        print(f"    skipped: {format_counts(left_out)}")
    stage = "--stage revision" if operator else "--image-positions N"
    print(f"    train with {stage} --data-path {args.out} --image-embedding-width {rows.sources[0].width}")


def draw_splits(args: argparse.Namespace) -> dict[str, SampleSet]:
    """Draw the samples of each split of shards; of other data all of them."""
    if is_prepared(args.data):
        if args.data.is_file():
            raise ValueError(
                f"--data {args.data} is a mixture: name each of its data sets in turn, and mix what is written"
            )
        if args.rsa or args.val:
            raise ValueError(
                f"--rsa and --val: {args.data} itself specifies its RSA samples and validation split; omit them"
            )
    parts = list_splits(args.data) if is_prepared(args.data) else ["train"]
    options = {"language": args.language_code}
    if get_side(args) == "text":
        return {
            part: draw_split(args, args.data, open_captions(args.data, split=part, **options), part) for part in parts
        }
    options["images"] = folder = args.image_folder
    return {
        part: draw_split(args, args.data, open_pairs(args.data, split=part, **options), part, images=folder)
        for part in parts
    }


def assign_splits(args: argparse.Namespace, chosen: dict[str, SampleSet]) -> dict[str, list[CaptionedImage]]:
    """Assign samples to splits; of data without splits, some are held out."""
    if is_prepared(args.data):
        return {part: samples.pairs for part, samples in chosen.items()}
    pairs = chosen["train"].pairs
    held_out = choose_held_out(len(pairs), args.val or "0.01", 0)
    parts = {"train": [pair for number, pair in enumerate(pairs) if number not in held_out]}
    return parts | ({"val": [pairs[number] for number in sorted(held_out)]} if held_out else {})


def open_given_rows(args: argparse.Namespace) -> KeyedRows:
    """Open existing embeddings, by their own keys or those of --keys."""
    source = open_embeddings(args.texts or args.images)
    if args.keys:
        keys = read_keys(args.keys)
    elif source.keys is None:
        raise ValueError(f"{source.description} does not map its rows to samples: pass --keys FILE, one id per line")
    else:
        keys = source.keys
    return KeyedRows(keys, [source])


def read_keys(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--keys {path} is not a text file: {error}") from error


def check_encoder(operator: EmbeddingOperator, texts: Embeddings) -> None:
    """Raise ValueError unless the operator was fitted on texts of this encoder, as far as both know."""
    check_sides(texts, "text", "--texts")
    fitted, found = operator.about.get("text_encoder"), format_encoder(texts)
    if fitted and found and fitted != found:
        raise ValueError(
            f"the operator was fitted on embeddings of {fitted}, and {texts.description} is of {found}: fit one on these"
        )
    if texts.width != len(operator.text_mean_D):
        raise ValueError(
            f"the operator moves rows of {len(operator.text_mean_D)} numbers, and {texts.description} has {texts.width}: "
            "name embeddings of the encoder that it was fitted on"
        )


def _describe_pairs(
    pairs: list[CaptionedImage], not_embedded: set[str], by_id: bool, left_out: Counter
) -> Iterator[EmbeddingInfo]:
    for pair in pairs:
        if pair.key in not_embedded:
            left_out["that could not be embedded"] += 1
            continue
        try:
            yield make_embedding_info(pair.key, pair.record, pair.caption, by_id=by_id)
        except Unusable as fault:
            left_out[fault.kind] += 1


def _write_npy(path: Path, sources: list[Embeddings], operator: EmbeddingOperator | None, dtype: type) -> numpy.ndarray:
    """Write the unit rows of all sources, moved if there is an operator, to one memory-mapped file."""
    shape = sum(source.num_rows for source in sources), sources[0].width
    rows_ND, row = numpy.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape), 0
    _reserve_room(path)
    for source in sources:
        for moved_ND in _iterate_unit_pieces(source, operator):
            rows_ND[row : row + len(moved_ND)] = moved_ND.numpy()
            row += len(moved_ND)
    rows_ND.flush()
    return rows_ND


def _reserve_room(path: Path) -> None:
    """Raise OSError where the disk has no room for a file: writing to its mapped pages would end the process by SIGBUS."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _iterate_unit_pieces(source: Embeddings, operator: EmbeddingOperator | None) -> Iterator[Tensor]:
    """Yield unit rows in float64, moved if there is an operator."""
    for piece_nD in progress(source, f"{source.description}, moved" if operator else source.description):
        yield operator.transform(piece_nD, dtype=torch.float64) if operator else normalise_rows(piece_nD)
