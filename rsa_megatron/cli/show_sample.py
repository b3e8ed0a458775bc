"""Show one sample as training sees it: its tokens with the targets marked, and its images cut into tiles."""

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import yaml
from PIL import Image
from torch import Tensor

from rsa_megatron import atomic
from rsa_megatron.anyres import ImageLayout
from rsa_megatron.cli.training_encoder import EncoderSettings, add_encoder_arguments, add_row_arguments
from rsa_megatron.data import conversation
from rsa_megatron.data.cookers import read_stored_record
from rsa_megatron.data.dataset_checks import check_data
from rsa_megatron.data.prepare import sample_checks
from rsa_megatron.data.raw_samples import stored_samples
from rsa_megatron.data.rsa_flag import read_rsa_flag
from rsa_megatron.data.sources.open_records import open_records
from rsa_megatron.data.sources.pairs import format_counts
from rsa_megatron.data.sources.record import Source, Unusable
from rsa_megatron.data.stored_parts import StoredSample
from rsa_megatron.data.tiles import IMAGE_PART, ImageTiler

if TYPE_CHECKING:  # only for annotations: importing it takes a second
    from transformers import PreTrainedTokenizerBase

_GAP = 6  # pixels between tiles
_GREEN, _UNDERLINE, _PLAIN = "\033[32m", "\033[4m", "\033[0m"


def add_show_arguments(parser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="a SOURCE, a folder of shards, or a mixture")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--index", type=int, default=0, help="which sample, from 0")
    which.add_argument("--packed", type=int, metavar="N", help="show packed row N of training, from 0")
    parser.add_argument(
        "--part", choices=["train", "val"], default="train", help="split of shards, a mixture or a table"
    )
    parser.add_argument(
        "--images", type=Path, help="folder that a SOURCE's paths of images are relative to; default: its own"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of sampling_strategy random, as for pack; of the order of a packed row's samples",
    )
    add_encoder_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("sample.png"), help="picture to write")
    row = parser.add_argument_group("a packed row")
    row.add_argument("--seq-length", type=int, help="of the row; default: the stage's")
    row.add_argument("--shuffle-buffer-size", type=int, default=1000, help="samples; default: %(default)s")
    add_row_arguments(row)


def show(args) -> None:
    check_picture_name(args.out)
    settings = EncoderSettings(args)
    tokenizer, recipe = settings.tokenizer, settings.recipe
    if args.index < 0:
        raise ValueError(f"--index {args.index}: samples are counted from 0")
    prepared = is_prepared(args.path)
    sample = read_stored_sample(args) if prepared else read_source_sample(args)
    reader = settings.make_image_reader(has_pixels=any(map(IMAGE_PART.fullmatch, sample.images)))
    parts = {name: part for name, part in sample.images.items() if reader.part.fullmatch(name)}
    if sample.images and not parts:
        raise ValueError(
            f"sample {args.index} has no embedding (.npy), which stage {args.stage} reads: see rsa-megatron realign transform"
        )
    if fault := settings.make_encoder(reader).explain_unusable(sample):
        raise ValueError(fault)
    record = read_stored_record(sample.record, len(parts))
    text = conversation.encode(
        tokenizer, record["conversations"], recipe["template"], label_style=recipe["label_style"]
    )
    images = reader.decode(parts)
    layouts = reader.layouts(images)
    num_image_tokens = sum(settings.count_image_tokens(layout) for layout in layouts)
    print(f"sample {args.index} of {args.path}: {sample.__key__}, id {record.get('id')}\n")
    print(mark_text(tokenizer, text, colour=sys.stdout.isatty()))
    num_positions = len(text.tokens) - len(images) + num_image_tokens
    print(
        f"\n«target» ‹caption›: {len(text.tokens)} tokens, of which {sum(text.is_target)} are targets and "
        f"{sum(text.is_caption)} the caption's; {num_positions} with the image tokens"
    )
    if num_positions > recipe["seq_length"]:
        print(f"longer than --seq-length {recipe['seq_length']} of stage {args.stage}: the text is truncated")
    takes_part = "yes" if prepared else "yes, if it is packed or linked with --rsa"
    if recipe.get("rsa_weight") == 0:
        takes_part = f"no, stage {args.stage} trains without it"
    print(f"RSA: {explain_no_rsa(sample, len(images), text) or takes_part}")
    for image, layout in zip(images, layouts):
        print(describe_image(image, layout))
    if images and isinstance(reader, ImageTiler):
        patch = settings.architecture.vision.patch_size
        print(f"tiles of {settings.tile} pixels, patches of {patch}: of {args.model}; --model names another")
        save_picture(draw_tiles(reader.tiles(images), layouts), args.out)
        print(f"tiles: {args.out}")


def check_picture_name(out: Path) -> None:
    if out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out {out} is not the name of a picture, such as sample.png")


def save_picture(picture: Image.Image, out: Path) -> None:
    with atomic.new_file(out) as unfinished:
        picture.save(unfinished, format=Image.registered_extensions()[out.suffix.lower()])


def is_prepared(path: Path) -> bool:
    """Return whether Energon can read it: an indexed folder, or a mixture."""
    if path.is_dir():
        return (path / ".nv-meta").is_dir()
    if path.suffix.lower() not in (".yaml", ".yml"):
        return False
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return isinstance(content, dict) and "__class__" in content


def read_stored_sample(args) -> StoredSample:
    check_data(str(args.path), [args.part], num_readers=1, micro_batch_size=1)
    num_samples = 0
    for sample in stored_samples(args.path, args.part):
        if num_samples == args.index:
            return sample
        num_samples += 1
    raise ValueError(f"--index {args.index}: {args.path} has {num_samples} samples in its split {args.part}")


def read_source_sample(args) -> StoredSample:
    """Read a record of a SOURCE as pack would store it with --rsa."""
    source = open_records(args.path, images=args.images, seed=args.seed, split=args.part)
    say_left_out(source)
    if args.index >= len(source):
        raise ValueError(f"--index {args.index}: {args.path} has {len(source)} samples")
    record = next(source.records(args.index))
    try:
        sample = sample_checks.check(record, (args.images or source.image_root).resolve())
    except Unusable as fault:
        raise ValueError(f"sample {args.index} ({record.place}) cannot be used: {fault}") from fault
    parts = sample.in_shard()
    return StoredSample(
        __key__=record.place, __restore_key__=(), __subflavors__={"rsa": True}, record=parts.pop("json"), images=parts
    )


def say_left_out(source: Source) -> None:
    """Say which files and rows of a source are not read, and why."""
    if left_out := getattr(source, "left_out", None):
        print(f"skipped: {format_counts(left_out)}", file=sys.stderr)


def mark_text(tokenizer: "PreTrainedTokenizerBase", text: conversation.EncodedText, *, colour: bool) -> str:
    """Decode the tokens, with targets between « and », the caption between ‹ and ›."""
    out = ""
    runs = itertools.groupby(zip(text.tokens, text.is_target, text.is_caption), key=lambda token: token[1])
    for is_target, run in runs:
        out += (_GREEN * colour + "«") if is_target else ""
        for is_caption, tokens in itertools.groupby(run, key=lambda token: token[2]):
            piece = tokenizer.decode([token for token, _, _ in tokens], clean_up_tokenization_spaces=False)
            # A line end that is a target would not be seen.
            piece = piece.replace("\n", "↵\n") if is_target else piece
            if is_caption:
                piece = f"{_UNDERLINE * colour}‹{piece}›{(_PLAIN + _GREEN * is_target) * colour}"
            out += piece
        out += ("»" + _PLAIN * colour) if is_target else ""
    return out


def explain_no_rsa(sample: StoredSample, num_images: int, text: conversation.EncodedText) -> str | None:
    """Explain why it is not in the RSA loss; None if it is."""
    if not read_rsa_flag(sample.__subflavors__, default=False):
        return "no, its dataset has no subflavor rsa: true"
    if num_images != 1:
        return f"no, it has {num_images} images, not one"
    return None if any(text.is_caption) else "no, it has no caption"


def describe_image(image: Image.Image | Tensor, layout: ImageLayout) -> str:
    if layout.positions:
        return f"image as an embedding: {len(image)} numbers, of length {image.norm():.4g}, in {layout.positions} position(s)"
    grid = (
        f" and a grid of {layout.grid_rows} x {layout.grid_columns} (rows x columns)" if layout.grid_rows else " only"
    )
    return f"image of {image.width} x {image.height} pixels: a base tile{grid}"


def draw_tiles(tiles: Tensor, layouts: list[ImageLayout]) -> Image.Image:
    """Draw each image's base tile and, right of it, its grid; images one below the other."""
    pixels = ((tiles.float() * 0.5 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    step = pixels.shape[1] + _GAP
    rows = [max(1, layout.grid_rows) for layout in layouts]
    width = max(1 + layout.grid_columns for layout in layouts)
    canvas = numpy.full((sum(rows) * step + _GAP, width * step + _GAP, 3), 255, dtype=numpy.uint8)
    top, index = 0, 0
    for layout, num_rows in zip(layouts, rows):
        grid = [(row, 1 + column) for row in range(layout.grid_rows) for column in range(layout.grid_columns)]
        for row, column in [(0, 0), *grid]:
            y, x = (top + row) * step + _GAP, column * step + _GAP
            canvas[y : y + pixels.shape[1], x : x + pixels.shape[2]] = pixels[index]
            index += 1
        top += num_rows
    return Image.fromarray(canvas)
