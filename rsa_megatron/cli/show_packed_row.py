"""Show one packed row as training sees it: what each of its positions holds, and of each sample its picture and its text."""

import sys
import textwrap
from dataclasses import dataclass
from itertools import groupby

import numpy
from PIL import Image, ImageDraw, ImageFont

from rsa_megatron.anyres import ImageLayout
from rsa_megatron.batch import LlavaBatch
from rsa_megatron.cli.show_sample import check_picture_name, is_prepared, save_picture
from rsa_megatron.cli.training_encoder import EncoderSettings
from rsa_megatron.data import conversation
from rsa_megatron.data.dataset_checks import check_data
from rsa_megatron.data.packed_task_encoder import PackingTaskEncoder
from rsa_megatron.data.raw_samples import packed_rows

# What a position holds, in Okabe and Ito's colours, which differ in lightness too; and its mark on a screen without colours.
_LOOKS = {
    "image": ("#0072B2", "#", "\033[44m"),
    "prompt": ("#C8C8C8", ".", "\033[100m"),
    "trained": ("#E69F00", "=", "\033[42m"),
    "copy": ("#CC79A7", "c", "\033[45m"),
    "padding": ("#FFFFFF", " ", ""),
}
_NAMES = {
    "image": "image",
    "prompt": "prompt",
    "trained": "trained text",
    "copy": "caption's copy",
    "padding": "padding",
}
_PLAIN = "\033[0m"
_COLUMNS = 96  # of the bar on the screen
# Pixels of the picture: its width, its margin, the bar's height, a card's width and its picture's, a line of text; and a card's text.
_WIDTH, _MARGIN, _BAR, _CARD, _PICTURE, _LINE = 1280, 20, 56, 206, 190, 17
_LINES, _CHARACTERS = 9, 26
_FONT = ImageFont.load_default(size=14)


@dataclass
class Sequence:
    """A sequence of a row: a sample, or the copy of its caption."""

    #: which sample, from 0
    sample: int
    #: what its positions hold in order, images spliced in
    kinds: list[str]


def show_packed(args) -> None:
    """Print row `args.packed` of training, and draw it."""
    check_picture_name(args.out)
    if args.packed < 0:
        raise ValueError(f"--packed {args.packed}: rows are counted from 0")
    if not is_prepared(args.path):
        raise ValueError(f"--packed: {args.path} is neither a folder of shards nor a mixture: pack or link it first")
    settings = EncoderSettings(args)
    row_length, has_rsa = args.seq_length or settings.recipe["seq_length"], settings.recipe.get("rsa_weight") != 0
    encoder = settings.make_packing_encoder(
        row_length,
        args.packing_max_tiles or settings.count_max_tiles(row_length),
        copies_captions=has_rsa and args.rsa_text_source == "caption",
    )
    check_data(str(args.path), ["train"], num_readers=1, micro_batch_size=1)
    batch = read_row(args, encoder)
    if not has_rsa:
        batch.rsa.eligible.zero_()
    sequences = list_sequences(batch, settings)
    print(f"row {args.packed} of {args.path}")
    print(f"(--seed {args.seed} --packing-buffer-size {args.packing_buffer_size}, one rank, no data workers)")
    print(format_row(batch, sequences, row_length, colour=sys.stdout.isatty()))
    save_picture(draw_row(batch, sequences, row_length), args.out)
    print(f"picture: {args.out}")


def read_row(args, encoder: PackingTaskEncoder) -> LlavaBatch:
    """Read row `args.packed`."""
    rows = packed_rows(
        args.path,
        encoder,
        seed=args.seed,
        shuffle_buffer_size=args.shuffle_buffer_size,
        packing_buffer_size=args.packing_buffer_size,
    )
    for number, row in enumerate(rows):
        if number == args.packed:
            return row
    raise ValueError(f"--packed {args.packed}: one pass over {args.path} has {number + 1} rows")


def list_sequences(batch: LlavaBatch, settings: EncoderSettings) -> list[Sequence]:
    """List a packed row's sequences, with what each of their positions holds."""
    image_token = settings.tokenizer.convert_tokens_to_ids(conversation.IMAGE_TOKEN)
    layouts = iter(batch.image_layouts.tolist())
    # A token is trained where the loss mask of the one before it says so.
    is_trained = [False, *(weight > 0 for weight in batch.loss_mask[0].tolist())]
    tokens = iter(zip(batch.tokens[0].tolist(), is_trained))
    copied = batch.rsa.eligible.tolist() if batch.rsa.captions_are_copies else [0] * len(batch.keys)
    of_sequences = [(sample, copy) for sample, has_copy in enumerate(copied) for copy in range(1 + has_copy)]
    sequences = []
    for (sample, is_copy), length in zip(of_sequences, batch.sequence_lengths.tolist(), strict=True):
        kinds = []
        while len(kinds) < length:
            token, trained = next(tokens)
            if token == image_token and not is_copy:
                kinds += ["image"] * settings.count_image_tokens(ImageLayout(*next(layouts)))
            else:
                kinds.append("copy" if is_copy else "trained" if trained else "prompt")
        sequences.append(Sequence(sample, kinds))
    return sequences


def format_row(batch: LlavaBatch, sequences: list[Sequence], row_length: int, *, colour: bool) -> str:
    """Format the bar, and a line of counts and the beginning of its text a sample."""
    used = sum(len(sequence.kinds) for sequence in sequences)
    num_tiles = int(batch.rsa.num_tiles.sum())
    num_copies = sum("copy" in sequence.kinds for sequence in sequences)
    present = {kind for sequence in sequences for kind in sequence.kinds}
    copies = f" and {num_copies} copies" * bool(num_copies)
    lines = [
        f"{used} of {row_length} positions in {count_samples(batch)}{copies}: fill {used / row_length:.3f}; {num_tiles} tiles",
        format_bar(sequences, row_length, colour=colour),
        "  ".join(f"{mark_kind(kind, colour)} {_NAMES[kind]}" for kind in _LOOKS if kind in present)
        + "  a number: a sample begins",
    ]
    for number, key in enumerate(batch.keys):
        counts = count_kinds(sequences, number)
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        pair = ", RSA" * bool(batch.rsa.eligible[number])
        lines.append(f"{number + 1:>3}  {key[-40:]}  {sum(counts.values())} positions: {told}{pair}")
        turns = [textwrap.shorten(turn, 45, placeholder=" ...") for turn in list_turns(batch.records[number])[:2]]
        lines.append(f"     {' | '.join(turns)}")
    return "\n".join(lines)


def format_bar(sequences: list[Sequence], row_length: int, *, colour: bool) -> str:
    """Draw the row in one line: of each column what most of its positions hold; samples begin with their number."""
    kinds = [kind for sequence in sequences for kind in sequence.kinds]
    kinds += ["padding"] * (row_length - len(kinds))
    edges = [round(column * row_length / _COLUMNS) for column in range(_COLUMNS + 1)]
    columns = [kinds[first:last] or [kinds[first]] for first, last in zip(edges, edges[1:])]
    looks = [max(_LOOKS, key=column.count) for column in columns]
    marks = [" " if colour else _LOOKS[look][1] for look in looks]
    start = 0
    for number, sequence in enumerate(sequences):
        column = min(start * _COLUMNS // row_length, _COLUMNS - 1)
        if not number or sequence.sample != sequences[number - 1].sample:
            for place, digit in enumerate(str(sequence.sample + 1)):
                if column + place < _COLUMNS:
                    marks[column + place] = digit
        start += len(sequence.kinds)
    if not colour:
        return f"[{''.join(marks)}]"
    runs = groupby(zip(looks, marks), key=lambda column: column[0])
    return "[" + "".join(_LOOKS[look][2] + "".join(mark for _, mark in run) + _PLAIN for look, run in runs) + "]"


def count_samples(batch: LlavaBatch) -> str:
    return f"{len(batch.keys)} sample{'s' * (len(batch.keys) > 1)}"


def mark_kind(kind: str, colour: bool) -> str:
    return f"{_LOOKS[kind][2]}  {_PLAIN}" if colour else _LOOKS[kind][1]


def count_kinds(sequences: list[Sequence], sample: int) -> dict[str, int]:
    """Count a sample's positions by what they hold."""
    kinds = [kind for sequence in sequences if sequence.sample == sample for kind in sequence.kinds]
    return {_NAMES[kind]: kinds.count(kind) for kind in _LOOKS if kind in kinds}


def list_turns(record: dict) -> list[str]:
    """List the texts of a record's turns, each in one line, without images."""
    values = (str(turn["value"]) for turn in record["conversations"])
    return [" ".join(value.replace(conversation.IMAGE_TOKEN, "").split()) for value in values]


def draw_row(batch: LlavaBatch, sequences: list[Sequence], row_length: int) -> Image.Image:
    """Draw the bar with its samples' numbers, what the colours mean, and a card a sample."""
    across = (_WIDTH - 2 * _MARGIN) // _CARD
    down = -(-len(batch.keys) // across)
    card_height = _PICTURE + (_LINES + 1) * _LINE
    top = _MARGIN + 2 * _LINE + _BAR + 3 * _LINE
    canvas = Image.new("RGB", (_WIDTH, top + down * card_height + _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    used = sum(len(sequence.kinds) for sequence in sequences)
    write(
        draw,
        _MARGIN,
        _MARGIN - 6,
        f"{count_samples(batch)} in {used} of {row_length} positions, fill {used / row_length:.3f}",
    )
    draw_bar(draw, sequences, row_length, _MARGIN + 2 * _LINE)
    draw_legend(draw, _MARGIN + 2 * _LINE + _BAR + _LINE)
    tiles = batch.rsa.num_tiles.tolist()
    for number in range(len(batch.keys)):
        left, upper = _MARGIN + number % across * _CARD, top + number // across * card_height
        first = sum(tiles[:number])
        picture = batch.images[first] if tiles[number] and batch.images.dim() == 4 else None
        draw_card(canvas, draw, left, upper, number, picture, batch, sequences)
    return canvas


def draw_bar(draw: ImageDraw.ImageDraw, sequences: list[Sequence], row_length: int, top: int) -> None:
    scale = (_WIDTH - 2 * _MARGIN) / row_length
    start = 0
    for number, sequence in enumerate(sequences):
        left = _MARGIN + start * scale
        for kind, run in groupby(sequence.kinds):
            end = start + len(list(run))
            draw.rectangle((_MARGIN + start * scale, top, _MARGIN + end * scale, top + _BAR), fill=_LOOKS[kind][0])
            start = end
        if "copy" not in sequence.kinds:
            draw.line((left, top - 6, left, top + _BAR + 6), fill="black", width=2)
            name = str(sequence.sample + 1)
            if len(sequence.kinds) * scale > draw.textlength(name, font=_FONT) + 6:
                write(draw, left + 4, top - _LINE, name)
    draw.rectangle((_MARGIN, top, _WIDTH - _MARGIN, top + _BAR), outline="black")
    used = _MARGIN + start * scale
    for x in range(int(used) + 6, _WIDTH - _MARGIN, 6):  # hatched, as white alone might be the page
        draw.line((x, top + _BAR, min(x + 14, _WIDTH - _MARGIN), top), fill="#888888")


def draw_legend(draw: ImageDraw.ImageDraw, top: int) -> None:
    left = _MARGIN
    for kind, (colour, *_) in _LOOKS.items():
        draw.rectangle((left, top, left + 18, top + 13), fill=colour, outline="black")
        write(draw, left + 25, top - 2, _NAMES[kind])
        left += 45 + int(draw.textlength(_NAMES[kind], font=_FONT))


def draw_card(canvas, draw, left: int, top: int, number: int, picture, batch: LlavaBatch, sequences) -> None:
    """Draw a sample's picture, its counts, and how its text begins."""
    frame = (left, top, left + _PICTURE, top + _PICTURE)
    if picture is None:
        draw.rectangle(frame, outline="#888888")
        write(draw, left + 8, top + _PICTURE // 2 - 8, "no picture")
    else:
        pixels = ((picture.float() * 0.5 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        canvas.paste(Image.fromarray(numpy.ascontiguousarray(pixels)).resize((_PICTURE, _PICTURE)), (left, top))
    counts = count_kinds(sequences, number)
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    about = [f"{number + 1}: {sum(counts.values())} positions{', RSA' * bool(batch.rsa.eligible[number])}"]
    about += textwrap.wrap(told, _CHARACTERS)
    question, *answers = list_turns(batch.records[number])
    text = textwrap.wrap(question, _CHARACTERS, max_lines=2, placeholder=" ...")
    room = _LINES - len(about) - len(text)
    text += textwrap.wrap(" ".join(answers), _CHARACTERS, max_lines=room, placeholder=" ...")
    for place, line in enumerate(about + text):
        colour = "black" if place < len(about) else "#555555"
        write(draw, left, top + _PICTURE + 4 + place * _LINE, line, colour)


def write(draw: ImageDraw.ImageDraw, left: float, top: float, text: str, colour: str = "black") -> None:
    draw.text((left, top), text, font=_FONT, fill=colour)
