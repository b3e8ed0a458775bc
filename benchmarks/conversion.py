"""Conversion of a full-size model both ways against a plain copy of the same bytes: time and peak memory.

    python benchmarks/conversion.py [--model llava-ov-0.5b] [--folder /tmp] [--append results/benchmarks.jsonl]

The model is of random weights in bfloat16, written as safetensors without ever being built. Each step is a process of
its own, one thread, whose peak resident size the kernel gives at its end; pages of files that it has mapped count. All
write through to the disk (fsync). The steps go round in turns, and figures are medians; the page cache holds
what was written just before, for the copy as for the conversions. "Holds" is a process that imports and does nothing.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from machine import cpu_name
from safetensors.torch import save_file

from checkpoint_conversion.weight_map import expected_shapes, table
from rsa_megatron.models.architectures import Architecture, get_architecture

_SHARD_BYTES = 10**9


def main():
    args = parse()
    if args.step:
        return run_step(args.step)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="conversion-") as folder:
        figures = measure(args.model, Path(folder), args.runs)
    print(f"{args.model}: {figures['checkpoint_bytes'] / 1e9:.2f} GB in bfloat16")
    print("| step | s | GB/s | times the copy | CPU s | peak memory, MB | above idle, part of the checkpoint |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for step in STEPS:
        seconds, peak = figures["seconds"][step], figures["peak_bytes"][step]
        part = (peak - figures["peak_bytes"]["idle"]) / figures["checkpoint_bytes"]
        rate = figures["checkpoint_bytes"] / seconds / 1e9
        ratio = seconds / figures["seconds"]["copy"]
        cpu_s = figures["cpu_s"][step]
        print(f"| {step} | {seconds:.2f} | {rate:.2f} | {ratio:.2f} | {cpu_s:.2f} | {peak / 1e6:.0f} | {part:.2f} |")
    if args.append:
        args.append.parent.mkdir(parents=True, exist_ok=True)
        machine = dict(date=str(date.today()), device=cpu_name(), threads=1, torch=torch.__version__)
        with open(args.append, "a") as file:
            file.write(json.dumps({"benchmark": "conversion", **machine, **figures}) + "\n")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="llava-ov-0.5b", help="an architecture of rsa_megatron/models/architectures.py"
    )
    parser.add_argument("--folder", type=Path, default="/tmp", help="on the disk to measure; four times the model")
    parser.add_argument("--runs", type=int, default=5, help="of each step")
    parser.add_argument("--append", type=Path, help="JSONL file to add the figures to")
    parser.add_argument("--step", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # in a process of its own
    return parser.parse_args()


OUTPUTS = {"idle": "nothing", "copy": "copy", "hf-to-megatron": "megatron", "megatron-to-hf": "back"}
STEPS = [step for step in OUTPUTS if step != "idle"]


def measure(model: str, folder: Path, runs: int) -> dict:
    checkpoint_bytes = write_model(get_architecture(model), folder / "hf")
    commands = {
        "idle": ["idle"],
        "copy": ["copy", folder / "hf", folder / "copy"],
        "hf-to-megatron": ["convert", "hf-to-megatron", "--hf", folder / "hf", "--out", folder / "megatron"],
        "megatron-to-hf": ["convert", "megatron-to-hf", "--checkpoint", folder / "megatron", "--out", folder / "back"],
    }
    taken = {step: [] for step in commands}
    for _ in range(runs + 1):  # the first of each warms up the disk
        for step, command in commands.items():
            shutil.rmtree(folder / OUTPUTS[step], ignore_errors=True)
            os.sync()  # what the steps before have left to write and to discard is not this one's
            taken[step].append(in_own_process(command))
    taken = {step: runs[1:] for step, runs in taken.items()}
    return dict(
        model=model,
        checkpoint_bytes=checkpoint_bytes,
        seconds={step: statistics.median(run["seconds"] for run in taken[step]) for step in STEPS},
        spread_s={step: sorted(run["seconds"] for run in taken[step]) for step in STEPS},
        cpu_s={step: statistics.median(run["cpu_s"] for run in taken[step]) for step in STEPS},
        peak_bytes={step: max(run["peak_bytes"] for run in taken[step]) for step in taken},
    )


def write_model(architecture: Architecture, folder: Path) -> int:
    """A Hugging Face folder of random weights, in shards; the bytes of the weights."""
    write_config(architecture, folder)
    torch.manual_seed(0)
    shard, weight_map, size, total = {}, {}, 0, 0
    shapes = expected_shapes(table(architecture))
    for name, shape in shapes.items():
        shard[name] = torch.randn(shape, dtype=torch.bfloat16)
        size += shard[name].nbytes
        if size > _SHARD_BYTES or len(weight_map) + len(shard) == len(shapes):
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard, size, total = {}, 0, total + size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def write_config(architecture: Architecture, folder: Path) -> None:
    from transformers import LlavaOnevisionConfig

    vision, decoder = architecture.vision, architecture.decoder
    LlavaOnevisionConfig(
        vision_config=dict(
            model_type="siglip_vision_model",
            num_hidden_layers=vision.num_layers,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.ffn_hidden_size,
            num_attention_heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            vision_use_head=False,
        ),
        text_config=dict(
            model_type="qwen2",
            num_hidden_layers=decoder.num_layers,
            hidden_size=decoder.hidden_size,
            intermediate_size=decoder.ffn_hidden_size,
            num_attention_heads=decoder.num_attention_heads,
            num_key_value_heads=decoder.num_query_groups,
            vocab_size=architecture.vocab_size,
            tie_word_embeddings=decoder.tie_word_embeddings,
        ),
        tie_word_embeddings=decoder.tie_word_embeddings,
        image_grid_pinpoints=[list(grid) for grid in architecture.grid_pinpoints],
    ).save_pretrained(folder)


def in_own_process(step: list) -> dict:
    """Seconds that the step took, by the clock and of the CPU, imports left out; the process's peak memory in bytes."""
    command = [sys.executable, __file__, "--step", *map(str, step)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def run_step(step: list[str]) -> None:
    from checkpoint_conversion.__main__ import main as convert

    what, *arguments = step
    start, cpu_start = time.perf_counter(), time.process_time()
    if what == "copy":
        copy(*map(Path, arguments))
    elif what == "convert":
        convert(arguments)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    print(json.dumps(dict(seconds=seconds, cpu_s=cpu_s, peak_bytes=peak_bytes())))


def peak_bytes() -> int:
    """The most that this process has held. (getrusage's figure begins with what the process held that started it.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[1])


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with open(target / file.name, "rb") as copied:
            os.fsync(copied.fileno())


if __name__ == "__main__":
    main()
