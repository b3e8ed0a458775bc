"""Samples per second of the task encoder on AnyRes images against transformers' processor, on one core.

    python benchmarks/task_encoder.py [--runs 15] [--append results/benchmarks.jsonl]

Both begin with a JPEG file's bytes and the same conversation and end with tensors: ours is
LlavaTaskEncoder.encode_sample, which also marks trained tokens; theirs is Pillow's decoder and LlavaOnevisionProcessor
with the image processor that works on Pillow's images. Tiles of 384 pixels, grids of up to 6 x 6. Before anything is
timed, both must give the same pixels, bit for bit, and the same tokens.
Times are the process's CPU seconds, in turns, and medians of the runs. Two parts of ours are timed alone: decoding, and
decoding with the two resizings, which is all that Pillow does. As the pixels are to be the same, that is the limit.
The pictures are blurred noise, at quality 90 of about as many bits a pixel as a photograph.
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core

import numpy
import PIL
import torch
import transformers
from machine import cpu_name
from PIL import Image
from transformers import LlavaOnevisionImageProcessorPil, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

from rsa_megatron.data.synthetic import scenes
from rsa_megatron.data.synthetic.tokenizer import train_tokenizer
from rsa_megatron.data.task_encoder import LlavaTaskEncoder, StoredSample
from rsa_megatron.data.tiles import decode_images, fit_on_black
from rsa_megatron.models.architectures import get_architecture

ARCHITECTURE = get_architecture("llava-ov-0.5b")
TILE, PINPOINTS = ARCHITECTURE.vision.image_size, ARCHITECTURE.grid_pinpoints
SIZES = ("336x336", "500x375", "640x480", "1024x768", "1280x720", "1000x1500")
CONTENDERS = ("ours", "transformers", "decode", "pillow")


def main():
    args = parse()
    torch.set_num_threads(1)
    machine = dict(
        date=str(date.today()),
        device=cpu_name(),
        threads=1,
        torch=torch.__version__,
        pillow=PIL.__version__,
        transformers=transformers.__version__,
    )
    print(machine)
    print("| image | tiles | ours, ms | transformers, ms | times faster | of ours: decoding | decoding and resizing |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    encoder, processor = make_contenders()
    images = [measure(size, encoder, processor, args.runs) for size in args.sizes]
    total = {name: sum(image["seconds"][name] for image in images) for name in CONTENDERS}
    num_tiles = sum(image["num_tiles"] for image in images)
    print(table_row("all", num_tiles, total))
    per_second = {name: len(images) / total[name] for name in ("ours", "transformers")}
    print(", ".join(f"{name}: {rate:.1f} samples/s" for name, rate in per_second.items()))
    if args.append:
        args.append.parent.mkdir(parents=True, exist_ok=True)
        figures = dict(ratio=total["transformers"] / total["ours"], samples_per_s=per_second, images=images)
        with open(args.append, "a") as file:
            file.write(json.dumps({"benchmark": "task_encoder", **machine, **figures}) + "\n")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="of the images, WIDTHxHEIGHT")
    parser.add_argument("--runs", type=int, default=15, help="of each contender, on each image")
    parser.add_argument("--append", type=Path, help="JSONL file to add the figures to")
    return parser.parse_args()


def make_contenders() -> tuple[LlavaTaskEncoder, LlavaOnevisionProcessor]:
    texts = [scenes.write_caption(scenes.make_scene(0, i, validation=False), seed=0) for i in range(200)]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(texts, Path(folder))
    encoder = LlavaTaskEncoder(
        tokenizer,
        image_size=TILE,
        patch_size=ARCHITECTURE.vision.patch_size,
        max_sequence_length=32768,
        template="qwen_1_5",
        image_aspect_ratio="anyres",
        grid_pinpoints=PINPOINTS,
        max_tiles=ARCHITECTURE.max_tiles,
    )
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": TILE, "width": TILE},
        resample=Image.Resampling.BICUBIC,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        image_grid_pinpoints=[list(pinpoint) for pinpoint in PINPOINTS],
    )
    processor = LlavaOnevisionProcessor(
        image_processor,
        tokenizer,
        LlavaOnevisionVideoProcessor(),  # it asks for one
        num_image_tokens=encoder.tokens_per_side**2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{ARCHITECTURE.max_tiles}",
    )
    return encoder, processor


def measure(size: str, encoder: LlavaTaskEncoder, processor: LlavaOnevisionProcessor, runs: int) -> dict:
    width, height = map(int, size.split("x"))
    file = jpeg(width, height)
    answer = scenes.write_caption(scenes.make_scene(0, 0, validation=False), seed=0)
    turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": answer}]
    sample = StoredSample(
        __key__=size,
        __restore_key__=(),
        images={"jpg": file},
        record=json.dumps({"conversations": turns}).encode(),
    )
    encoded = encoder.encode_sample(sample)
    text = encoder.tokenizer.decode(encoded.text.tokens)
    (layout,) = encoded.layouts
    grid = dict(height=TILE * layout.grid_rows, width=TILE * layout.grid_columns)

    def theirs():
        image = Image.open(io.BytesIO(file)).convert("RGB")
        return processor(images=image, text=text, return_tensors="pt")

    def pillow():
        (image,) = decode_images(sample.images)
        image.resize((TILE, TILE), Image.Resampling.BICUBIC)
        fit_on_black(image, **grid)

    check_same(size, encoder, encoded, theirs())
    functions = (lambda: encoder.encode_sample(sample), theirs, lambda: decode_images(sample.images), pillow)
    taken = {name: [] for name in CONTENDERS}
    for _ in range(runs + 1):  # the first of each warms up
        for name, function in zip(CONTENDERS, functions):
            start = time.process_time()
            function()
            taken[name].append(time.process_time() - start)
    seconds = {name: statistics.median(times[1:]) for name, times in taken.items()}
    spread_s = {name: [min(times[1:]), max(times[1:])] for name, times in taken.items()}
    print(table_row(size.replace("x", " x "), layout.num_tiles, seconds), flush=True)
    ratio = seconds["transformers"] / seconds["ours"]
    return dict(
        size=size, num_tiles=layout.num_tiles, file_bytes=len(file), ratio=ratio, seconds=seconds, spread_s=spread_s
    )


def jpeg(width: int, height: int) -> bytes:
    rng = numpy.random.default_rng(width * 10_000 + height)
    noise = rng.integers(0, 256, (max(1, height // 10), max(1, width // 10), 3), dtype=numpy.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


def check_same(size: str, encoder, encoded, theirs) -> None:
    """Stop unless pixels and tokens are the same; theirs has an image's token as many times as it has positions."""
    image_token = encoder.tokenizer.convert_tokens_to_ids("<image>")
    (layout,) = encoded.layouts
    tokens = []
    for token in encoded.text.tokens:
        tokens += [token] * (
            layout.num_tokens(encoder.tokens_per_side, encoder.max_tiles) if token == image_token else 1
        )
    if not torch.equal(encoded.tiles, theirs["pixel_values"][0]) or tokens != theirs["input_ids"][0].tolist():
        sys.exit(f"the two give other pixels or tokens for an image of {size}: their times are not to be compared")


def table_row(name: str, num_tiles: int, seconds: dict) -> str:
    ours, theirs = seconds["ours"], seconds["transformers"]
    return (
        f"| {name} | {num_tiles} | {ours * 1e3:.1f} | {theirs * 1e3:.1f} | {theirs / ours:.2f} | "
        f"{seconds['decode'] / ours:.0%} | {seconds['pillow'] / ours:.0%} |"
    )


if __name__ == "__main__":
    main()
