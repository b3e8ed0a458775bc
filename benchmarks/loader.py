"""Samples per second of the training loader with 0, 1 and 2 workers, and where the time of a sample goes.

    python benchmarks/loader.py [--workers 0 1 2] [--runs 5] [--append results/benchmarks.jsonl]

Two data sets in Energon shards, read by TrainLoader as in training: the demo's captions, PNGs of 112 pixels that become a
tile of 84, in micro-batches of 16; and JPEGs of usual sizes that AnyRes cuts into tiles of 384 pixels, in micro-batches of 1, and
in packed rows of 16384 positions. A process that does nothing else takes the batches. Settings go round in turns,
each in a process of its own; figures are medians. "First batch" starts the workers and fills the shuffle buffer and
the packing buffer.

The second table is CPU time of the thread that encodes, without workers: reading is Energon's (tar, index, shuffle buffer),
the others are the real functions with a stopwatch around each, which stops while another runs. Handing over is what a worker
does with a batch before the training process can take it: what is not in shared memory yet is copied there. It comes on top
of the others.
"""

import argparse
import collections
import dataclasses
import functools
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from unittest.mock import patch

import demo_run
import machine
import task_encoder as anyres
import torch
import torch.multiprocessing  # it teaches ForkingPickler to put tensors into shared memory
import torch.utils.data
from megatron.energon import WorkerConfig
from PIL import Image
from transformers import AutoTokenizer

from rsa_megatron.data import conversation, tiles
from rsa_megatron.data.loaders import TrainLoader
from rsa_megatron.data.packed_task_encoder import PackingTaskEncoder
from rsa_megatron.data.prepare.sample_checks import ImportedImage, ImportedSample
from rsa_megatron.data.prepare.shard_writer import TarShards, index_shards
from rsa_megatron.data.synthetic import scenes
from rsa_megatron.data.task_encoder import LlavaTaskEncoder
from rsa_megatron.data.tiles import ImageTiler
from rsa_megatron.models.architectures import get_architecture

#: What stands behind each share of a sample's time; a function within another counts for itself alone.
TIMED = {
    "tokenizing": (conversation, "encode"),
    "decoding": (tiles, "decode_images"),
    "resizing": (Image.Image, "resize"),
    "tiling": (ImageTiler, "tiles"),
    "rest of encoding": (LlavaTaskEncoder, "encode_sample"),
    "batching": (LlavaTaskEncoder, "batch"),
}
SHARES = ("reading", *TIMED, "handing over")
#: Positions of a packed row, and image tiles: those of stage 2's recipe.
_ROW, _ROW_TILES = 16384, 37
_FORK = multiprocessing.get_context("fork")


@dataclass
class Data:
    """A data set, and how training reads it."""

    name: str
    path: Path
    encoder: LlavaTaskEncoder | PackingTaskEncoder
    micro_batch_size: int
    #: that are timed
    num_samples: int
    #: of packed rows, 0 for a row a sample
    packing_buffer_size: int = 0


def main():
    args = parse()
    torch.set_num_threads(1)
    description = machine.description(torch.device("cpu"), 1)
    print(description)
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        folder = Path(folder)
        sets = [
            demo_captions(folder / "demo", args.captions),
            anyres_images(folder / "anyres", args.images, args.sizes),
        ]
        # Where the time goes is measured of rows of one sample alone: packing calls other functions in the same places.
        packed = pack(sets[1])
        figures = {data.name: {"workers": {}} for data in (*sets, packed)}
        taken, shares = collections.defaultdict(list), collections.defaultdict(list)
        for _ in range(args.runs):
            for data in (*sets, packed):
                if data is not packed:
                    shares[data.name].append(in_own_process(measure_shares, data))
                for workers in args.workers:
                    taken[data.name, workers].append(in_own_process(measure_rate, data, workers))
    for (name, workers), runs in taken.items():
        figures[name]["workers"][workers] = medians(runs) | {"spread": spread(run["samples_per_s"] for run in runs)}
    for name, runs in shares.items():
        figures[name]["cpu_s"] = medians(runs)
    print_tables(figures)
    machine.append(args.append, "loader", description, {"data": figures})


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--captions", type=int, default=2400, help="number of the demo's samples that are timed")
    parser.add_argument("--images", type=int, default=240, help="of the AnyRes images")
    parser.add_argument("--sizes", nargs="+", default=anyres.SIZES, help="of the AnyRes images, WIDTHxHEIGHT")
    parser.add_argument("--runs", type=int, default=5, help="of each number of workers, on each data set")
    parser.add_argument("--append", type=Path, help="JSONL file to add the figures to")
    return parser.parse_args()


def demo_captions(folder: Path, num_samples: int) -> Data:
    demo_run.prepare(folder, max(2, num_samples // 2))
    architecture = get_architecture("demo")
    encoder = LlavaTaskEncoder(
        AutoTokenizer.from_pretrained(folder / "tokenizer"),
        image_size=architecture.vision.image_size,
        patch_size=architecture.vision.patch_size,
        max_sequence_length=160,
        template="plain",
        image_aspect_ratio="square",
        grid_pinpoints=architecture.grid_pinpoints,
        max_tiles=architecture.max_tiles,
    )
    return Data("demo captions", demo_run.captions(folder), encoder, 16, num_samples)


def anyres_images(folder: Path, num_samples: int, sizes: list[str]) -> Data:
    """As many of each size."""
    folder.mkdir()
    shards = TarShards(folder, "train", 100, None)
    for number in range(max(len(sizes), num_samples // 2)):
        width, height = map(int, sizes[number % len(sizes)].split("x"))
        answer = scenes.write_caption(scenes.make_scene(0, number, validation=False), seed=0)
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": answer}]
        image = ImportedImage(anyres.jpeg(width, height), "jpg", height, width, None)
        shards.write(ImportedSample(number, number, turns, [turn["value"] for turn in turns], [image]))
    shards.close()
    index_shards(folder, subflavors={"rsa": True}, num_workers=1)
    encoder, _ = anyres.make_contenders()
    return Data("AnyRes JPEGs", folder, encoder, 1, num_samples)


def pack(data: Data) -> Data:
    """Return the AnyRes images in packed rows, as stage 2's recipe has them."""
    encoder = PackingTaskEncoder(
        data.encoder.tokenizer,
        image_size=anyres.TILE,
        patch_size=anyres.ARCHITECTURE.vision.patch_size,
        max_sequence_length=_ROW,
        row_length=_ROW,
        template="qwen_1_5",
        image_aspect_ratio="anyres",
        grid_pinpoints=anyres.PINPOINTS,
        max_tiles=anyres.ARCHITECTURE.max_tiles,
        max_tiles_per_row=_ROW_TILES,
    )
    buffer_size = min(1000, data.num_samples // 4)
    return dataclasses.replace(data, name=f"{data.name}, packed", encoder=encoder, packing_buffer_size=buffer_size)


def in_own_process(function, *args) -> dict:
    """What function(*args) returns in a fork of this process, of which nothing is left."""
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=lambda: sender.send(function(*args)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def new_loader(data: Data, workers: int) -> TrainLoader:
    config = WorkerConfig(rank=0, world_size=1, num_workers=workers, seed_offset=1)
    shuffle_buffer_size = min(1000, data.num_samples // 4)
    return TrainLoader(
        str(data.path),
        data.encoder,
        config,
        data.micro_batch_size,
        shuffle_buffer_size,
        packing_buffer_size=data.packing_buffer_size,
    )


def measure_rate(data: Data, workers: int) -> dict[str, float]:
    loader, start = new_loader(data, workers), time.perf_counter()
    next(loader)
    first_s = time.perf_counter() - start
    # What the workers have ready was made before: after two batches of each they work as fast as batches are taken.
    for _ in range(2 * workers):
        next(loader)
    start, num_samples = time.perf_counter(), 0
    while num_samples < data.num_samples:
        num_samples += next(loader).num_samples
    seconds = time.perf_counter() - start
    return {"samples_per_s": num_samples / seconds, "first_batch_s": first_s}


def measure_shares(data: Data) -> dict[str, float]:
    """CPU seconds a sample, by SHARES."""
    stopwatch, LlavaTaskEncoder.batch = Stopwatch(), as_in_a_worker(LlavaTaskEncoder.batch)
    for name, (owner, function) in TIMED.items():
        setattr(owner, function, stopwatch.around(name, getattr(owner, function)))  # in this process, which ends
    loader, num_batches = new_loader(data, 0), data.num_samples // data.micro_batch_size
    read, hand_over = (
        stopwatch.around("reading", loader.__next__),
        stopwatch.around("handing over", ForkingPickler.dumps),
    )
    read()
    stopwatch.seconds.clear()
    for _ in range(num_batches):
        hand_over(read())
    return {name: stopwatch.seconds[name] / (num_batches * data.micro_batch_size) for name in SHARES}


def as_in_a_worker(batch):
    """The method, which lays a batch into shared memory where a data worker would."""

    @functools.wraps(batch)
    def method(*args):
        with patch.object(torch.utils.data, "get_worker_info", object):  # it asks whether there is such information
            return batch(*args)

    return method


class Stopwatch:
    """CPU seconds of this thread in functions, without those of other functions that it times."""

    def __init__(self):
        self.seconds = collections.Counter()
        self._within = [0.0]  # of each timed function that runs: seconds of timed functions that it called

    def around(self, name: str, function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            self._within.append(0.0)
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.thread_time() - start
                self.seconds[name] += seconds - self._within.pop()
                self._within[-1] += seconds

        return timed


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def spread(values) -> list[float]:
    values = sorted(values)
    return [values[0], values[-1]]


def print_tables(figures: dict) -> None:
    print("| data | workers | samples/s | of runs | first batch, s |\n| --- | --- | --- | --- | --- |")
    for name, data in figures.items():
        for workers, rate in data["workers"].items():
            low, high = rate["spread"]
            per_second, first_s = rate["samples_per_s"], rate["first_batch_s"]
            print(f"| {name} | {workers} | {per_second:.1f} | {low:.1f} to {high:.1f} | {first_s:.2f} |")
    print(f"\n| data | CPU ms a sample | {' | '.join(SHARES)} |\n| --- | --- |{' --- |' * len(SHARES)}")
    for name, data in figures.items():
        if "cpu_s" not in data:
            continue
        whole = sum(seconds for share, seconds in data["cpu_s"].items() if share != "handing over")
        shares = " | ".join(f"{data['cpu_s'][share] / whole:.1%}" for share in SHARES)
        print(f"| {name} | {whole * 1e3:.2f} | {shares} |")


if __name__ == "__main__":
    main()
