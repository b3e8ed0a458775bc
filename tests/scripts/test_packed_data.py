"""fill measures what training packs; show draws a packed row."""

import json
import re

import pytest
import torch
from megatron.energon import WorkerConfig
from PIL import Image

from rsa_megatron.cli import data as data_command
from rsa_megatron.cli import show_packed_row
from rsa_megatron.cli.training_encoder import EncoderSettings
from rsa_megatron.data.loaders import TrainLoader

SETTINGS = ("--model", "demo", "--stage", "1.5")


def run(command, path, demo, *flags) -> None:
    data_command.main([*map(str, [command, path, *SETTINGS, "--tokenizer", demo / "tokenizer", *flags])])


def parse(command, path, demo, *flags):
    return data_command.parse([*map(str, [command, path, *SETTINGS, "--tokenizer", demo / "tokenizer", *flags])])


@pytest.mark.parametrize("flags, copies", [((), False), (("--rsa-text-source", "caption"), True)])
def test_fill_measures_what_training_packs(demo, tmp_path, capsys, flags, copies):
    path, out = demo / "data" / "captions", tmp_path / "lengths.json"
    run("fill", path, demo, "--row-lengths", 1792, "--packing-buffer-size", 300, "--out", out, *flags)
    told = capsys.readouterr().out
    found = json.loads(out.read_text())
    # All 240 samples are in one buffer of one pass: its rows are the same, whatever the order.
    settings = EncoderSettings(parse("fill", path, demo))
    encoder = settings.make_packing_encoder(1792, settings.count_max_tiles(1792), copies_captions=copies)
    config = WorkerConfig(rank=0, world_size=1, num_workers=0, seed_offset=5)
    loader = TrainLoader(str(path), encoder, config, 1, 20, packing_buffer_size=300, one_epoch=400)
    rows = []
    while (row := next(loader)).num_samples:
        rows.append(row)
    lengths = [length for row in rows for length in lengths_of_samples(row)]
    assert sorted(found["positions"]) == sorted(lengths) and len(lengths) == 240
    assert sorted(found["tiles"]) == sorted(torch.cat([row.rsa.num_tiles for row in rows]).tolist())
    fill = sum(lengths) / (1792 * len(rows))
    (line,) = re.findall(r"^ +1792 .*", told, re.M)
    assert line.split()[:7] == ["1792", "75", "0", "0", f"{240 / len(rows):.2f}", str(len(rows)), f"{fill:.3f}"]
    # Unpacked a sample is shorter by its last token.
    assert line.split()[7] == f"{1 - (sum(lengths) - 240) / (240 * 1792):.1%}"
    assert "240 samples, one pass over the data" in told and max(map(len, told.splitlines()[1:-1])) <= 100


def lengths_of_samples(row) -> list[int]:
    lengths = row.sequence_lengths.tolist()
    if not row.rsa.captions_are_copies:
        return lengths
    assert row.rsa.eligible.all()
    return [sample + copy for sample, copy in zip(lengths[::2], lengths[1::2])]


def test_fill_mixes_by_weight_and_names_what_is_too_long(demo, tmp_path, capsys):
    out = tmp_path / "lengths.json"
    run("fill", demo / "data" / "stage1_5.yaml", demo, "--row-lengths", "60,200,1792", "--samples", 1500, "--out", out)
    told = capsys.readouterr().out
    found = json.loads(out.read_text())
    texts = found["tiles"].count(0)
    # Of 1500 draws at 0.2; the standard deviation is 15.
    assert len(found["positions"]) == 1500 and abs(texts - 300) < 60
    (at_60, at_200, at_1792) = (line.split() for line in re.findall(r"^ +(?:60|200|1792)  .*", told, re.M))
    # Texts of 83 positions are cut to 60, captions of more than 300 and pictures with a word do not fit.
    assert at_60[2:5] == [str(texts), str(1500 - texts), "1.00"]
    assert at_200[2] == "0" and float(at_1792[6]) > 0.95
    assert f"longer than 60, text cut: {texts}: texts-train-" in told
    assert (
        f"longer than 60, skipped: {1500 - texts}: " in told
        and f"longer than 200, skipped: {at_200[3]}: captions" in told
    )
    # A bar a range of lengths, all samples in them, the last line up to 100 %.
    bars = re.findall(r"^ +\d+ - +(?:\d+|\.\.\.) +(\d+) +([\d.]+)%", told, re.M)
    assert sum(int(count) for count, _ in bars) == 1500 and bars[-1][1] == "100.0" and len(bars) <= 18


def test_show_draws_a_packed_row(demo, tmp_path, capsys):
    path, out = demo / "data" / "stage1_5.yaml", tmp_path / "row.png"
    flags = (
        "--packed",
        2,
        "--seq-length",
        1792,
        "--packing-buffer-size",
        64,
        "--rsa-text-source",
        "caption",
        "--out",
        out,
    )
    run("show", path, demo, *flags)
    told = capsys.readouterr().out
    args = parse("show", path, demo, *flags)
    settings = EncoderSettings(args)
    row = show_packed_row.read_row(args, settings.make_packing_encoder(1792, 75, copies_captions=True))
    sequences = show_packed_row.list_sequences(row, settings)
    assert [len(sequence.kinds) for sequence in sequences] == row.sequence_lengths.tolist()
    kinds = [kind for sequence in sequences for kind in sequence.kinds]
    # Trained tokens are as many as targets, a caption's copy has a pad token more, and images are as long as their tiles make them.
    assert kinds.count("trained") == int(row.loss_mask.sum()) > 0
    pairs = row.rsa.eligible.nonzero().flatten() + 1
    copied, captions = len(pairs), int(torch.isin(row.rsa.caption_mask, pairs).sum())
    assert kinds.count("copy") == captions + copied and copied > 1
    text_positions = row.tokens.shape[1] - len(row.image_layouts)
    assert kinds.count("image") == len(kinds) - text_positions
    # The position at which a text is first trained follows one whose label it is.
    first = sequences[0].kinds.index("trained")
    assert sequences[0].kinds[first - 1] != "trained"
    assert (
        f"{len(kinds)} of 1792 positions in {len(row.keys)} samples and {copied} copies: fill {len(kinds) / 1792:.3f}"
        in told
    )
    for number, key in enumerate(row.keys):
        assert f"{number + 1:>3}  {key}  " in told
    # In the middle of each run of the bar stands its colour.
    drawn = Image.open(out)
    scale, start = (drawn.width - 40) / 1792, 0
    for kind, length in runs(kinds):
        if length * scale > 6:
            place = int(20 + (start + length / 2) * scale), 80
            assert drawn.getpixel(place) == Image.new("RGB", (1, 1), show_packed_row._LOOKS[kind][0]).getpixel(
                (0, 0)
            ), kind
        start += length
    bar = re.search(r"^\[(.{96})\]$", told, re.M)[1]
    assert bar[0] == "1" and {"#", "=", "c"} <= set(bar)


def runs(kinds: list[str]) -> list[tuple[str, int]]:
    found = []
    for kind in kinds:
        if found and found[-1][0] == kind:
            found[-1][1] += 1
        else:
            found.append([kind, 1])
    return found


@pytest.mark.parametrize(
    "command, path, flags, message",
    [
        ("show", "captions", ["--packed", "70"], "--packed 70: one pass over .*captions has [0-9]+ rows"),
        ("show", "captions", ["--packed", "-1"], "--packed -1: rows are counted from 0"),
        ("show", "nothing", ["--packed", "0"], "nothing is neither a folder of shards nor a mixture: pack or link it"),
        ("fill", "nothing", [], "nothing is neither a folder of shards nor a mixture: pack or link it first"),
        ("fill", "captions", ["--samples", "0"], "--samples 0 must be at least 1"),
        ("fill", "captions", ["--tokenizer", "/nowhere"], "--tokenizer /nowhere is not a folder"),
    ],
)
def test_what_cannot_be_is_one_line(demo, command, path, flags, message):
    flags = [*flags, "--packing-buffer-size", "240"]
    if command == "show":
        flags += ["--seq-length", "1792"]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        run(command, demo / "data" / path, demo, *flags)
