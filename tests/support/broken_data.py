"""A data set with one of each unusable sample among good ones, some of these odd, as a user may bring it."""

import io
import json
import struct
import zlib
from pathlib import Path

import webdataset
from PIL import Image

from rsa_megatron.data.synthetic import data_sets, scenes

#: key of the bad sample -> what the line about it must say
REASONS = {
    "truncated": "truncated",
    "not-an-image": "cannot identify image file",
    "empty-caption": "the caption is empty",
    "no-image": "its text has 1 <image> and the sample 0 image(s)",
    "two-images-told": "its text has 2 <image> and the sample 1 image(s)",
    "one-of-two-images": "its images are 1.png: it must have one, or 0.png, 1.jpg, ... without a gap",
    "too-long": "do not fit --seq-length 128, and what fits has no training target: raise it",
    "no-json": "it has no .json",
    "broken-json": "its .json cannot be read",
    "no-conversation": "it has no conversations, messages or caption; its fields are",
    "turn-of-text": "turn 1 of its conversation is the text",
    "speaker-of-two": "is from ['human', 'gpt']; it must be",
    "huge": "Image size (400000000 pixels) exceeds limit",
    "zero-bytes": "cannot identify image file, 0 bytes",
    "svg": "cannot identify image file",
    "float-tiff": "32",
    "not-utf-8": "its .json cannot be read",
    "nested-json": "its .json cannot be read",
    "list-of-texts": "it is a list, not an object with conversations",
    "null-conversations": "it has no conversations, messages or caption; its fields are",
    "no-turns": "it has no conversations, messages or caption; its fields are",
    "no-answer": "one of them from gpt",
    "number-for-text": "the value of turn 1 is a int; it must be a text or a list of parts",
    "unknown-role": "is from 'robot'; it must be",
    "text-for-turns": "its conversation is the text 'a red boat'; it must be a list of turns",
}

#: good samples whose picture or text is an odd one: each is to be used
ODD = (
    "grey",
    "bilevel",
    "cmyk",
    "alpha",
    "palette",
    "sixteen-bit",
    "animated",
    "rotated",
    "strip",
    "one-pixel",
    "unicode",
    "bom",
    "long-text",
    "same-key-twice-in-json",
)


def write(folder: Path, num_good: int = 40) -> None:
    """Write the training part: each bad sample before a good one; and a validation part of good ones."""
    folder.mkdir(parents=True)
    bad = list(REASONS)
    with webdataset.TarWriter(str(folder / "train-00000.tar")) as writer:
        for index in range(num_good):
            if index < len(bad):
                writer.write(_bad(bad[index]))
            odd = ODD[index] if index < len(ODD) else None
            writer.write(_odd(odd) if odd else _good(f"good-{index:03d}", index))
    with webdataset.TarWriter(str(folder / "val-00000.tar")) as writer:
        for index in range(16):
            writer.write(_good(f"good-val-{index:03d}", 1000 + index))
    data_sets.index_data_set(folder, "captions")


def _good(key: str, index: int) -> dict:
    sizes = data_sets.Sizes(seed=0, image_size=56)
    return data_sets.make_sample("captions", index, "train", sizes) | {"__key__": key}


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
    elif key == "zero-bytes":
        sample["png"] = b""
    elif key == "svg":
        sample["png"] = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
    elif key == "float-tiff":
        sample["png"] = _file(Image.new("F", (20, 20)), "TIFF")
    elif key == "null-conversations":
        record["conversations"] = None
    elif key == "no-turns":
        record["conversations"] = []
    elif key == "no-answer":
        del record["conversations"][1]
    elif key == "number-for-text":
        record["conversations"][1]["value"] = 7
    elif key == "unknown-role":
        record["conversations"][1]["from"] = "robot"
    elif key == "text-for-turns":
        record["conversations"] = "a red boat"
    sample["json"] = json.dumps(["a red boat"] if key == "list-of-texts" else record).encode()
    if key == "not-utf-8":
        sample["json"] = sample["json"].replace(b"gpt", b"\xff\xfe")
    if key == "nested-json":
        sample["json"] = b"[" * 100_000
    if key == "broken-json":
        sample["json"] = sample["json"][:-20]
    if key == "no-json":
        del sample["json"]
    return sample


def _odd(key: str) -> dict:
    sample = _good(f"good-{key}", 0)
    image, record = Image.open(io.BytesIO(sample["png"])), json.loads(sample["json"])
    modes = {"grey": "L", "bilevel": "1", "palette": "P", "alpha": "RGBA", "cmyk": "CMYK"}
    if key in modes:
        sample["png"] = _file(image.convert(modes[key]), "TIFF" if key == "cmyk" else "PNG")
    elif key == "sixteen-bit":
        sample["png"] = _file(Image.new("I;16", (30, 20), 40_000), "PNG")
    elif key == "animated":
        sample["gif"] = _file(image, "GIF", save_all=True, append_images=[image.rotate(90), image.rotate(180)])
        del sample["png"]
    elif key == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        sample["jpg"] = _file(image, "JPEG", exif=exif)
        del sample["png"]
    elif key in ("strip", "one-pixel"):
        sample["png"] = _file(image.resize((1, 4000 if key == "strip" else 1)), "PNG")
    elif key == "unicode":
        record["conversations"][1]["value"] = "Ein rotes Boot \U0001f6a4 \u8239 \u0301\u200b\u202e"
    elif key == "long-text":
        record["conversations"][1]["value"] *= 20
    sample["json"] = json.dumps(record).encode()
    if key == "bom":
        sample["json"] = b"\xef\xbb\xbf" + sample["json"]
    if key == "same-key-twice-in-json":
        sample["json"] = sample["json"].replace(b"{", b'{"conversations": 7, ', 1)
    return sample


def _file(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def picture(size: int = 56) -> bytes:
    """A good PNG."""
    out = io.BytesIO()
    scenes.render(scenes.make_scene(0, 0, validation=False), size, 0).save(out, "PNG")
    return out.getvalue()
