"""realign.py as a user runs it, on rows, a small CLIP and shards."""

import dataclasses
import io
import json
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from rsa_megatron.cli import data as data_command
from rsa_megatron.cli import realign
from rsa_megatron.cli.show_sample import stored_samples
from tests.support import tiny_backbones

NUM_PAIRS, NUM_HELD_OUT = 30, 6


# Sums of some hundred numbers of size 1 in float64, in another order (T16).
SAME = dict(atol=1e-12, rtol=1e-12)


def write_shards(folder: Path) -> Path:
    """Pairs, and texts of no image."""
    told = []
    for number, image in enumerate(tiny_backbones.pictures(NUM_PAIRS)):
        image.save(folder / f"{number}.png")
        words = tiny_backbones.CAPTIONS[number % 6].split()
        answer = " ".join(words[number % 3 :] + ["boat"] * (number % 4) + [f"{number}"])
        is_pair = number % 5 != 0
        turns = [{"from": "human", "value": "<image>\nWhat?" if is_pair else "What?"}, {"from": "gpt", "value": answer}]
        told.append({"id": f"id.{number}", "conversations": turns} | ({"image": f"{number}.png"} if is_pair else {}))
    (folder / "d.json").write_text(json.dumps(told))
    flags = ["--rsa", f"--val={NUM_HELD_OUT}", "--shard-size=9"]
    data_command.main(["pack", str(folder / "d.json"), "--out", str(folder / "shards"), *flags])
    return folder / "shards"


def rows(count, width=7, seed=0, shift=0.0) -> torch.Tensor:
    x_ND = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    x_ND[:, 0] += shift
    return x_ND


def write_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """images.npy and texts.safetensors, of different numbers of rows, and with a gap between them."""
    images_ND, texts_ND = rows(50, seed=1, shift=2.0), rows(37, seed=2, shift=-1.0)
    numpy.save("images.npy", images_ND.numpy())
    save_file({"texts": texts_ND}, "texts.safetensors")
    return images_ND, texts_ND


GIVEN = ("--images", "images.npy", "--texts", "texts.safetensors")


def run(*flags) -> None:
    realign.main([*map(str, flags)])


def error(capsys, *flags) -> str:
    """What is wrong, in one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*flags)
    assert end.value.code == 2
    told = ("skipped: ", "samples, ", "texts are longer than")
    lines = [line for line in capsys.readouterr().err.splitlines() if not any(words in line for words in told)]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def assert_same_operator(actual, expected) -> None:
    for field in dataclasses.fields(expected):
        one, other = getattr(actual, field.name), getattr(expected, field.name)
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(one, other, **SAME)
        elif isinstance(other, float):
            assert one == pytest.approx(other, rel=1e-12)
        elif field.name != "about":
            assert one == other


def _opened(data: bytes):
    from PIL import Image

    return Image.open(io.BytesIO(data))


def read_back(folder) -> dict[str, dict[str, tuple]]:
    """part -> id -> (turns, embedding)"""
    found = {}
    for part in ("train", "val"):
        samples = [(json.loads(sample.record), sample.images["npy"]) for sample in stored_samples(folder, part)]
        rows_D = [torch.from_numpy(numpy.load(io.BytesIO(data))) for _, data in samples]
        found[part] = {content["id"]: (content["conversations"], row_D) for (content, _), row_D in zip(samples, rows_D)}
    return found
