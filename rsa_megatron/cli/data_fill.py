"""How full packed rows of a data set or a mixture would be, at several lengths of a row; only headers of images are read."""

import argparse
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from rsa_megatron import atomic
from rsa_megatron.cli.data_summary import quantile
from rsa_megatron.cli.show_sample import is_prepared
from rsa_megatron.cli.training_encoder import EncoderSettings, add_encoder_arguments, add_row_arguments
from rsa_megatron.data.dataset_checks import check_data
from rsa_megatron.data.packed_task_encoder import BufferedSample, PackingTaskEncoder
from rsa_megatron.data.raw_samples import training_samples
from rsa_megatron.data.row_fill import measure_fill, measure_micro_batches

#: No sample is as long: measured with it, a sample has its whole length.
_NO_LIMIT = 1 << 40
_NAMED = 3  # samples that are named of those that do not fit
_BARS, _BAR_WIDTH = 16, 48


@dataclass
class Lengths:
    """Samples in the order in which training reads them, as they are in rows of a length."""

    row_length: int
    max_tiles: int
    #: of each sample: images spliced in, its last token and the copy of its caption too
    positions: list[int] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    #: those that are longer than the row, or than the model's positions: the text is cut, or what is left could not be trained on
    truncated: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def add(self, sample: BufferedSample) -> None:
        if sample.fault:
            self.skipped.append(sample.__key__)
            return
        if sample.is_truncated:
            self.truncated.append(sample.__key__)
        self.keys.append(sample.__key__)
        self.positions.append(sample.length + sample.copy_length)
        self.tiles.append(sample.num_tiles)


def add_fill_arguments(parser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder of shards, or a mixture")
    add_encoder_arguments(parser)
    parser.add_argument(
        "--row-lengths",
        type=read_lengths,
        help="lengths of a row, positions, as 2048,4096; default: the stage's --seq-length, its half and its double",
    )
    add_row_arguments(parser)
    parser.add_argument(
        "--samples",
        type=int,
        default=10_000,
        help="number to read, drawn by the mixture's weights; of a data set at most one pass; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the order in which samples are read")
    parser.add_argument("--out", type=Path, help="JSON file for the samples' lengths, which `rsa-megatron plan` reads")


def read_lengths(text: str) -> list[int]:
    try:
        lengths = [int(length) for length in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of lengths such as 2048,4096,8192")
    return sorted(set(lengths))


def fill(args) -> None:
    """Run the command."""
    for name in ("samples", "packing_buffer_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if not is_prepared(args.path):
        raise ValueError(f"{args.path} is neither a folder of shards nor a mixture: pack or link it first")
    settings = EncoderSettings(args)
    own = settings.recipe["seq_length"]
    row_lengths = args.row_lengths or [own // 2, own, 2 * own]
    check_data(str(args.path), ["train"], num_readers=1, micro_batch_size=1)
    whole = Lengths(_NO_LIMIT, _NO_LIMIT)
    rows = [Lengths(length, args.packing_max_tiles or settings.count_max_tiles(length)) for length in row_lengths]
    unusable = read(args, settings, whole, rows)
    if not whole.positions:
        raise ValueError(f"{args.path}: of {sum(unusable.values())} samples none can be used: {next(iter(unusable))}")
    print(format_samples(args, whole, unusable))
    print(format_histogram(whole.positions))
    print(format_fills(rows, settings.recipe["micro_batch_size"], args.packing_buffer_size))
    if args.out:
        about = {"data": str(args.path), "model": args.model, "stage": args.stage}
        content = about | {"text_source": args.rsa_text_source, "positions": whole.positions, "tiles": whole.tiles}
        atomic.write_text(args.out, json.dumps(content) + "\n")
        print(f"lengths of {len(whole.positions)} samples: {args.out}")


def read(args, settings: EncoderSettings, whole: Lengths, rows: list[Lengths]) -> Counter:
    """Read samples: their whole lengths, and those in rows of each length; return why others cannot be used."""
    copies = args.rsa_text_source == "caption"

    def make(lengths: Lengths) -> PackingTaskEncoder:
        return settings.make_packing_encoder(
            lengths.row_length, lengths.max_tiles, copies_captions=copies, truncates=lengths is not whole
        )

    unusable, whole_encoder, encoders = Counter(), make(whole), [make(lengths) for lengths in rows]
    samples = training_samples(args.path, seed=args.seed)
    progress = tqdm(total=args.samples, desc=str(args.path), unit="sample", mininterval=1)
    for _, stored in zip(range(args.samples), samples):
        progress.update()
        sample = whole_encoder.preencode_sample(stored)
        if sample.fault:
            unusable[sample.fault] += 1
            continue
        whole.add(sample)
        for lengths, encoder in zip(rows, encoders):
            fits = whole.positions[-1] <= min(lengths.row_length, encoder.max_sequence_length + 1)
            lengths.add(sample if fits else encoder.preencode_sample(stored))
    progress.close()
    return unusable


def format_samples(args, whole: Lengths, unusable: Counter) -> str:
    """Format how many samples were read and how long they are."""
    counts, num_samples = Counter(whole.positions), len(whole.positions)
    middle, most, longest = (quantile(counts, share) for share in (0.5, 0.99, 1))
    is_pass = num_samples + sum(unusable.values()) < args.samples
    lines = [
        f"{args.path}, as stage {args.stage} of {args.model} reads it",
        f"{num_samples} samples, {'one pass over the data' if is_pass else 'the first of an order of training'}",
        f"positions, images spliced in: mean {sum(whole.positions) / num_samples:.0f}, half up to {middle}, 99% up to {most}, longest "
        f"{longest}",
        f"tiles: mean {sum(whole.tiles) / num_samples:.2f}, most {max(whole.tiles)}",
    ]
    if unusable:
        lines.append(f"{sum(unusable.values())} others cannot be used:")
        lines += [f"    {line}" for line in list(unusable)[:_NAMED]] + ["    ..."] * (len(unusable) > _NAMED)
    return "\n".join(lines)


def format_histogram(positions: list[int]) -> str:
    """Draw a bar for each range of lengths; the last holds what is longer than 99.5 % of all."""
    counts = Counter(positions)
    shortest, last = min(positions), quantile(counts, 0.995)
    step = round_up((last - shortest + 1) / _BARS)
    first = shortest // step * step
    in_bar = Counter(min(length, last) // step for length in positions)
    largest, up_to = max(in_bar.values()), 0
    lines = ["", f"{'positions':>17}{'samples':>10}{'up to here':>12}"]
    for number in range(first // step, last // step + 1):
        up_to += in_bar[number]
        low = number * step
        high = f"{low + step - 1:>8}" if low + step <= last else "     ..."
        bar = "#" * math.ceil(_BAR_WIDTH * in_bar[number] / largest)
        lines.append(f"{low:>7} -{high}{in_bar[number]:>10}{up_to / len(positions):>11.1%}  {bar}".rstrip())
    return "\n".join(lines)


def round_up(width: float) -> int:
    """Return the next of 1, 2, 5, 10, 20, ..."""
    decade = 10 ** math.floor(math.log10(max(width, 1)))
    return next(int(factor * decade) for factor in (1, 2, 5, 10) if factor * decade >= width)


def format_fills(rows: list[Lengths], micro_batch_size: int, buffer_size: int) -> str:
    """Format a line a row length: packed rows, and how much is padding where each sample has a row of its own."""
    lines = [
        "",
        f"packed from buffers of {buffer_size} samples; padding: of the same samples in a row each, padded to the row's",
        f"length (as under pipeline parallelism), or in micro-batches of {micro_batch_size} to the longest of each",
        f"{'row':>7}{'tiles':>7}{'text cut':>10}{'skipped':>9}{'samples a row':>15}{'rows':>8}{'fill':>7}"
        f"{'padding: to length':>21}{'to longest':>12}",
    ]
    for lengths in rows:
        start = f"{lengths.row_length:>7}{lengths.max_tiles:>7}{len(lengths.truncated):>10}{len(lengths.skipped):>9}"
        if not lengths.positions:
            lines.append(f"{start}    no sample fits")
            continue
        figures = measure_fill(
            lengths.positions,
            lengths.tiles,
            lengths.keys,
            row_length=lengths.row_length,
            max_tiles=lengths.max_tiles,
            buffer_size=buffer_size,
        )
        to_longest = 1 - measure_micro_batches(lengths.positions, micro_batch_size)
        lines.append(
            f"{start}{figures.samples_per_row:>15.2f}{figures.num_rows:>8}{figures.fill:>7.3f}"
            f"{1 - figures.fill_unpacked:>21.1%}{to_longest:>12.1%}"
        )
    for lengths in rows:
        for keys, what in ((lengths.truncated, "text cut"), (lengths.skipped, "skipped")):
            if keys:
                named = ", ".join(key[-24:] for key in keys[:_NAMED]) + ", ..." * (len(keys) > _NAMED)
                lines.append(f"longer than {lengths.row_length}, {what}: {len(keys)}: {named}")
    return "\n".join(lines)
