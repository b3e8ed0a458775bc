"""A Megatron checkpoint to a Hugging Face folder that transformers and inference servers load.

Weights go under the hub's names, in the dtype in which the checkpoint holds them; everything else is copied from the
folder that the model came from, but for the dtype in config.json, and what must fit how the model was trained
(rsa_megatron/models/trained_files.py).
"""

import argparse
import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_conversion.hf_shards import write_folder, write_rows
from checkpoint_conversion.output_folder import output_folder
from checkpoint_conversion.progress import progress
from checkpoint_conversion.torch_dist_load import MegatronCheckpoint, find_checkpoint
from checkpoint_conversion.weight_files import NEWLINE_FILE
from checkpoint_conversion.weight_map import EMBEDDINGS, IMAGE_NEWLINE, Row, expected_shapes, split, table
from rsa_megatron.models.agreement import check_files
from rsa_megatron.models.hf_config import read_architecture
from rsa_megatron.models.hf_files import copy_model_files
from rsa_megatron.models.trained_files import fit_to_training, read_training

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="Megatron's --save folder, or one checkpoint in it"
    )
    parser.add_argument("--iteration", type=int, help="iteration of a --save folder; default: the latest")
    parser.add_argument("--hf-template", type=Path, help="folder to copy all but weights from; default: hf beside it")
    parser.add_argument(
        "--llava-onevision",
        action="store_true",
        help="keep LLaVA-OneVision's class, processor and template, though the run showed its samples otherwise",
    )
    parser.add_argument(
        "--max-shard-size", type=_parse_size, default="2GB", help="largest safetensors file; default 2GB"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")


def run(args: argparse.Namespace) -> None:
    source = find_checkpoint(args.checkpoint, args.iteration)
    template = args.hf_template or source.parent / "hf"
    if not (template / "config.json").is_file():
        raise ValueError(
            f"{template}/config.json is missing; name the Hugging Face folder that the model came from with --hf-template"
        )
    architecture = read_architecture(template)
    check_files(template)
    if check_projector(source.parent, architecture.vision.hidden_size):
        print(
            f"WARNING: the projector of {source} was trained on precomputed embeddings; Hugging Face's model will give it "
            "the tower's tokens, which have the same width: train it on images first",
            file=sys.stderr,
        )
    training = None if args.llava_onevision else read_training(source.parent)
    rows = table(architecture)
    checkpoint = MegatronCheckpoint(source, rows)
    dtypes = {row.key: checkpoint.dtype(row) for row in rows}
    num_bytes = sum(dtypes[row.key].itemsize * math.prod(row.stored_shape) for row in rows)
    with output_folder(args.out, num_bytes=num_bytes, overwrite=args.overwrite, sources=[source, template]) as folder:
        copy_model_files(template, folder)
        _set_dtype(folder / "config.json", next(dtypes[row.key] for row in rows if EMBEDDINGS in row.parts))
        said = fit_to_training(folder, architecture, training) if training else None
        # What transformers' class for one tile has not, and the way back needs.
        beside = [row for row in rows if IMAGE_NEWLINE in row.parts and training and training.shows_one_tile]
        with progress(len(expected_shapes(rows)), num_bytes, args.out) as bar:
            read_parts = partial(_read_parts, checkpoint, bar)
            write_folder(folder, [row for row in rows if row not in beside], dtypes, read_parts, args.max_shard_size)
            if beside:
                write_rows(folder / NEWLINE_FILE, beside, dtypes, read_parts)
    if said:
        print(f"{said} (--llava-onevision keeps the files of {template})")


def check_projector(run: Path, tower_width: int) -> int | None:
    """Return the image-embedding width of a run with the training script's --image-positions; None for a run on pixels.

    Raises:
        ValueError: its projector's input width is not the tower's.
    """
    try:
        width = json.loads((run / "run.json").read_text()).get("image_embedding_width")
    except (OSError, ValueError, AttributeError):
        return None  # not the training script's
    if width not in (None, tower_width):
        raise ValueError(
            f"{run}: its projector takes precomputed embeddings of width {width}, Hugging Face's LLaVA-OneVision the "
            f"tower's tokens of width {tower_width}; such a model cannot be exported"
        )
    return width


def _read_parts(checkpoint: MegatronCheckpoint, bar, row: Row, layer: int | None) -> list[Tensor]:
    whole = checkpoint.read(row, layer)
    bar.update(whole.nbytes)
    return split(whole, [shape[0] for shape in row.parts.values()], row.groups)


def _set_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Write the weights' dtype to config.json, under the key it has; without one, under both versions'."""
    config = json.loads(config_file.read_text())
    keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype", "dtype"]
    config |= dict.fromkeys(keys, str(dtype).removeprefix("torch."))
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text}: write it as 500MB or 2GB")
    return int(match[1]) * _UNITS[match[2]]
