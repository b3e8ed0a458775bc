"""A data set with one of each unusable sample among good ones, as a user may bring it."""

import argparse
import io
import json
import struct
import zlib
from pathlib import Path

import prepare_demo
import webdataset

from rsa_megatron.data import scenes

#: key of the bad sample -> what the line about it must say
REASONS = {
    "truncated": "truncated",
    "not-an-image": "cannot identify image file",
    "empty-caption": "the caption is empty",
    "no-image": "its text has 1 <image> and the sample 0 image(s)",
    "two-images-told": "its text has 2 <image> and the sample 1 image(s)",
    "one-of-two-images": "its images are 1.png: it must have one, or 0.png, 1.jpg, ... without a gap",
    "too-long": "do not fit --seq-length 128, and what fits has nothing to learn: raise it",
    "no-json": "it has no .json",
    "broken-json": "its .json cannot be read",
    "no-conversation": 'its .json has no list "conversations"',
    "turn-of-text": 'a turn of "conversations" is no {',
    "speaker-of-two": "is from ['human', 'gpt']; it must be",
    "huge": "Image size (400000000 pixels) exceeds limit",
}


def write(folder: Path, num_good: int = 40) -> None:
    """Write the training part: each bad sample after two good ones; and a validation part of good ones."""
    folder.mkdir(parents=True)
    bad = list(REASONS)
    with webdataset.TarWriter(str(folder / "train-00000.tar")) as writer:
        for index in range(num_good):
            if index % 2 == 0 and index // 2 < len(bad):
                writer.write(_bad(bad[index // 2]))
            writer.write(_good(f"good-{index:03d}", index))
    with webdataset.TarWriter(str(folder / "val-00000.tar")) as writer:
        for index in range(16):
            writer.write(_good(f"good-val-{index:03d}", 1000 + index))
    prepare_demo.prepare(folder, "captions")


def _good(key: str, index: int) -> dict:
    args = argparse.Namespace(seed=0, image_size=56)
    return prepare_demo.stored_sample("captions", index, "train", args) | {"__key__": key}


def _bad(key: str) -> dict:
    sample = _good(key, 0)
    record = json.loads(sample["json"])
    if key == "truncated":
        sample["png"] = sample["png"][: len(sample["png"]) // 2]
    elif key == "not-an-image":
        sample["png"] = b"this is no picture"
    elif key == "empty-caption":
        record["conversations"][1]["value"] = " \n"
    elif key == "no-image":
        del sample["png"]
    elif key == "two-images-told":
        record["conversations"][0]["value"] = "<image><image>"
    elif key == "one-of-two-images":
        sample["1.png"] = sample.pop("png")
    elif key == "too-long":
        picture = sample.pop("png")
        sample |= {f"{index}.png": picture for index in range(40)}  # of 4 positions or more each
        record["conversations"][0]["value"] = "<image>" * 40
    elif key == "no-conversation":
        del record["conversations"]
    elif key == "turn-of-text":
        record["conversations"][1] = record["conversations"][1]["value"]
    elif key == "speaker-of-two":
        record["conversations"][1]["from"] = ["human", "gpt"]
    elif key == "huge":
        # A picture whose header says 20000 x 20000: the header begins at byte 12 and ends in its checksum.
        header = b"IHDR" + struct.pack(">II", 20000, 20000) + sample["png"][24:29]
        sample["png"] = sample["png"][:12] + header + struct.pack(">I", zlib.crc32(header)) + sample["png"][33:]
    sample["json"] = json.dumps(record).encode()
    if key == "broken-json":
        sample["json"] = sample["json"][:-20]
    if key == "no-json":
        del sample["json"]
    return sample


def picture(size: int = 56) -> bytes:
    """A good PNG."""
    out = io.BytesIO()
    scenes.render(scenes.make_scene(0, 0, validation=False), size, 0).save(out, "PNG")
    return out.getvalue()
