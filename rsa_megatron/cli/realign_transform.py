"""`rsa-megatron realign transform`: rows to rows, or data to Energon shards whose images are embeddings."""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from rsa_megatron import atomic
from rsa_megatron.cli.data import choose_held_out
from rsa_megatron.cli.realign_fit import encoder_of
from rsa_megatron.cli.realign_sources import (
    add_embedding_arguments,
    add_encoder_arguments,
    check_numbers,
    check_sides,
    drawn,
    num_ranks,
    progress,
    stored,
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
from rsa_megatron.evaluation.embedding_files import Embeddings, of_store, open_embeddings
from rsa_megatron.evaluation.feature_store import FeatureStore
from rsa_megatron.evaluation.stored_features import Drawn
from rsa_megatron.realign.baselines import load_operator
from rsa_megatron.realign.operator import EmbeddingOperator
from rsa_megatron.realign.realign import unit_rows

_DTYPES = {"float32": numpy.float32, "float16": numpy.float16, "float64": numpy.float64}


@dataclass(frozen=True)
class KeyedRows:
    """Embeddings to be looked up by key."""

    keys: list[str]
    #: one after the other
    sources: list[Embeddings]

    @classmethod
    def of(cls, stores: list[FeatureStore]) -> "KeyedRows":
        return cls([key for store in stores for key in store.keys], [of_store(store) for store in stores if store.keys])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="x.npy, or with --data a folder of shards")
    parser.add_argument(
        "--operator",
        type=Path,
        metavar="FOLDER",
        help="that `fit` has written; moves texts, needed for them; images stay as they are",
    )
    parser.add_argument(
        "--out-dtype", choices=_DTYPES, default="float32", help="of what is written; default: %(default)s"
    )
    there = parser.add_argument_group("embeddings that are there")
    there.add_argument(
        "--texts", metavar="SOURCE", help="FOLDER[:LAYER] of stored features, x.npy or x.safetensors[:TENSOR]"
    )
    there.add_argument("--images", metavar="SOURCE", help="the same, of images, for shards of --data")
    there.add_argument(
        "--keys", type=Path, metavar="FILE", help="an id a line for each row: a sample of --data takes that of its id"
    )
    data = parser.add_argument_group("or those of an encoder, and the data to write")
    add_encoder_arguments(data)
    data.add_argument(
        "--side", choices=("text", "image"), help="of the encoder: its embedding stands for the image of a sample"
    )
    data.add_argument(
        "--rsa",
        action="store_true",
        help="samples written take part in the RSA loss; not for shards, which say it themselves",
    )
    data.add_argument(
        "--val", help="held out of data that has no parts: a part below 1, or a number of samples; default: 0.01"
    )
    data.add_argument("--shard-size", type=int, default=1000, help="samples of a tar; default: %(default)s")
    add_embedding_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not go together, and for what cannot be written."""
    check(args)
    operator = load_operator(args.operator) if args.operator else None
    if args.data:
        write_shards(args, operator)
    else:
        write_rows(args, operator)


def check(args: argparse.Namespace) -> None:
    if num_ranks() > 1:
        raise ValueError("transform runs as one process; leave out torchrun")
    side = side_of(args)
    if args.encoder and not args.data:
        raise ValueError("--encoder needs --data: what it embeds, and what is written")
    if side == "image" and args.operator:
        raise ValueError("--operator moves texts alone; images stay as they are: leave it out with images")
    if side == "text" and not args.operator:
        raise ValueError("--operator is needed for texts; for texts as they are fit one with --method none")
    if side == "image" and not args.data:
        raise ValueError(
            "--images without --data: images stay as they are, there is nothing to write; name the --data of shards"
        )
    if args.keys and (args.encoder or not args.data):
        raise ValueError(
            "--keys goes with --texts or --images and --data: it says which sample of the data a row is of"
        )
    if not args.data and args.out.suffix != ".npy":
        raise ValueError(f"--out {args.out}: name an .npy for rows, or --data for shards")
    if args.shard_size < 1:
        raise ValueError(f"--shard-size must be at least 1, not {args.shard_size}")
    check_numbers(args)
    check_free(args.out)


def side_of(args: argparse.Namespace) -> str:
    """What is written: texts or images."""
    given = [name for name in ("encoder", "texts", "images") if getattr(args, name)]
    if len(given) != 1:
        found = f", not --{' and --'.join(given)}" if given else ""
        raise ValueError(f"name one of --encoder, --texts and --images{found}")
    if bool(args.encoder) != bool(args.side):
        raise ValueError("--encoder and --side go together: --side text or --side image says what is embedded")
    return args.side or given[0].removesuffix("s")


def write_rows(args: argparse.Namespace, operator: EmbeddingOperator) -> None:
    """Rows to rows, in an .npy that appears when it is whole."""
    texts = open_embeddings(args.texts)
    check_encoder(operator, texts)
    with atomic.new_file(args.out) as unfinished:
        _write_npy(unfinished, [texts], operator, _DTYPES[args.out_dtype])
    print(f"{args.out}: {texts.num_rows} rows of {texts.width}, {operator.method}")


def write_shards(args: argparse.Namespace, operator: EmbeddingOperator | None) -> None:
    """Data to shards; the rows lie in a file beside them until they are written."""
    chosen, left_out = draws(args), Counter()
    stores = [stored(args.side, of_part, args) for of_part in chosen.values()] if args.encoder else []
    rows = KeyedRows.of(stores) if stores else given(args)
    if operator:
        for texts in rows.sources:
            check_encoder(operator, texts)
    temporary = args.out.with_name(args.out.name + ".rows.unfinished")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        table = EmbeddingTable(rows.keys, _write_npy(temporary, rows.sources, operator, _DTYPES[args.out_dtype]))
        not_embedded = {key for store in stores for key in store.left_out}
        told = {
            part: _told(pairs, not_embedded, bool(args.keys), left_out)
            for part, pairs in in_parts(args, chosen).items()
        }
        rsa = is_rsa(args.data) if is_prepared(args.data) else args.rsa
        counts = write_embedding_shards(args.out, told, table, rsa=rsa, shard_size=args.shard_size)
    finally:
        temporary.unlink(missing_ok=True)
    what = f"texts, {operator.method}" if operator else "images"
    said = ", ".join(f"{count} samples for {part}" for part, count in counts.items())
    print(f"{args.out}: {said}; embeddings of {what}, {rows.sources[0].width} numbers each")
    if left_out:
        print(f"    left out: {format_counts(left_out)}")
    stage = "--stage revision" if operator else "--image-positions N"
    print(f"    train with {stage} --data-path {args.out} --image-embedding-width {rows.sources[0].width}")


def draws(args: argparse.Namespace) -> dict[str, Drawn]:
    """The samples of each part of shards; of other data all of them."""
    if is_prepared(args.data):
        if args.data.is_file():
            raise ValueError(
                f"--data {args.data} is a mixture: name each of its data sets in turn, and mix what is written"
            )
        if args.rsa or args.val:
            raise ValueError(
                f"--rsa and --val: {args.data} says itself which samples take part and are held out; leave them out"
            )
    parts = list_splits(args.data) if is_prepared(args.data) else ["train"]
    options = {"language": args.language_code}
    if side_of(args) == "text":
        return {part: drawn(args, args.data, open_captions(args.data, split=part, **options), part) for part in parts}
    options["images"] = folder = args.image_folder
    return {
        part: drawn(args, args.data, open_pairs(args.data, split=part, **options), part, images=folder)
        for part in parts
    }


def in_parts(args: argparse.Namespace, chosen: dict[str, Drawn]) -> dict[str, list[CaptionedImage]]:
    """What is written to each part; of data without parts, some are held out."""
    if is_prepared(args.data):
        return {part: of_part.pairs for part, of_part in chosen.items()}
    pairs = chosen["train"].pairs
    held_out = choose_held_out(len(pairs), args.val or "0.01", 0)
    parts = {"train": [pair for number, pair in enumerate(pairs) if number not in held_out]}
    return parts | ({"val": [pairs[number] for number in sorted(held_out)]} if held_out else {})


def given(args: argparse.Namespace) -> KeyedRows:
    """Embeddings that are there, by their own keys or those of --keys."""
    source = open_embeddings(args.texts or args.images)
    if args.keys:
        keys = args.keys.read_text(encoding="utf-8").splitlines()
    elif source.keys is None:
        raise ValueError(
            f"{source.description} does not say which sample a row is of: name a file of an id a line, --keys FILE"
        )
    else:
        keys = source.keys
    return KeyedRows(keys, [source])


def check_encoder(operator: EmbeddingOperator, texts: Embeddings) -> None:
    """Raises ValueError unless the operator was fitted on texts of this encoder, as far as both know."""
    check_sides(texts, "text", "--texts")
    fitted, found = operator.about.get("text_encoder"), encoder_of(texts)
    if fitted and found and fitted != found:
        raise ValueError(
            f"the operator was fitted on embeddings of {fitted}, and {texts.description} is of {found}: fit one on these"
        )
    if texts.width != len(operator.text_mean_D):
        raise ValueError(
            f"the operator moves rows of {len(operator.text_mean_D)} numbers, and {texts.description} has {texts.width}: "
            "name embeddings of the encoder that it was fitted on"
        )


def _told(
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
    """The rows of all sources, of unit length, moved where there is an operator, in one file; memory-mapped."""
    shape = sum(source.num_rows for source in sources), sources[0].width
    rows_ND, row = numpy.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape), 0
    for source in sources:
        for moved_ND in _unit_pieces(source, operator):
            rows_ND[row : row + len(moved_ND)] = moved_ND.numpy()
            row += len(moved_ND)
    rows_ND.flush()
    return rows_ND


def _unit_pieces(source: Embeddings, operator: EmbeddingOperator | None) -> Iterator[Tensor]:
    """Rows of unit length, moved where there is an operator, in float64."""
    for piece_nD in progress(source, f"{source.description}, moved" if operator else source.description):
        yield operator.transform(piece_nD, dtype=torch.float64) if operator else unit_rows(piece_nD)
