"""Hugging Face to a Megatron checkpoint that --load takes under any tensor and pipeline parallelism.

OUT/latest_checkpointed_iteration.txt    "release"
OUT/release/                             the weights, as a torch_dist checkpoint
OUT/hf/                                  config, tokenizer and processor: --model OUT/hf --tokenizer-model OUT/hf
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

from checkpoint_conversion.hf_weights import Readable, check, drop_tied_head, open_folder
from checkpoint_conversion.initial_weights import add_vocabulary_rows, drop_last_tower_layer, init_projector
from checkpoint_conversion.lmms_lab import is_lmms_lab, read_lmms_lab
from checkpoint_conversion.output_folder import output_folder
from checkpoint_conversion.progress import progress
from checkpoint_conversion.torch_dist_save import save_checkpoint
from checkpoint_conversion.weight_map import EMBEDDINGS, LM_HEAD, TOWER, table
from rsa_megatron.models.agreement import check_files
from rsa_megatron.models.architectures import Architecture
from rsa_megatron.models.hf_config import read_architecture, read_towers
from rsa_megatron.models.hf_files import copy_model_files, write_model_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf", type=Path, help="folder of a LLaVA-OneVision: llava-hf's or lmms-lab's")
    parser.add_argument("--vision", type=Path, help="instead: folder of a SigLIP, for a new model")
    parser.add_argument("--language", type=Path, help="and folder of a Qwen2")
    parser.add_argument("--seed", type=int, help="seed of a new model's projector and image_newline; default 1234")
    parser.add_argument(
        "--untie-embeddings-and-output-weights",
        action="store_true",
        help="give a new model with a tied Qwen2 its own output layer (as llava-ov-1.5b, the RSA paper's)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")


def run(args: argparse.Namespace) -> None:
    sources = _check_sources(args)
    is_onevision = bool(args.hf) and not is_lmms_lab(args.hf)  # a folder that transformers reads as it is
    if args.hf:
        architecture = read_architecture(args.hf) if is_onevision else read_lmms_lab(args.hf)
        if is_onevision:
            check_files(args.hf)
        tensors = open_folder(args.hf)
    else:
        architecture = read_towers(args.vision, args.language)
        seed = 1234 if args.seed is None else args.seed
        tensors = _join_towers(architecture, open_folder(args.vision), open_folder(args.language), seed)
        if args.untie_embeddings_and_output_weights and architecture.decoder.tie_word_embeddings:
            drop_tied_head(tensors)
            architecture = replace(architecture, decoder=replace(architecture.decoder, tie_word_embeddings=False))
            tensors[LM_HEAD] = tensors[EMBEDDINGS]
    if not is_onevision:
        add_vocabulary_rows(tensors, architecture.vocab_size)
    if architecture.decoder.tie_word_embeddings:
        drop_tied_head(tensors)
    rows = table(architecture)
    where = " and ".join(map(str, sources))
    check(tensors, rows, where)
    num_bytes = sum(tensor.dtype.itemsize * math.prod(tensor.shape) for tensor in tensors.values())
    with output_folder(args.out, num_bytes=num_bytes, overwrite=args.overwrite, sources=sources) as folder:
        if is_onevision:
            copy_model_files(args.hf, folder / "hf")
        else:
            write_model_files(folder / "hf", architecture, _load_tokenizer(args.hf or args.language))
        with progress(len(tensors), num_bytes, args.out) as bar:
            save_checkpoint(folder / "release", rows, tensors, bar.update)
        (folder / "latest_checkpointed_iteration.txt").write_text("release")


def _check_sources(args: argparse.Namespace) -> list[Path]:
    if bool(args.hf) == bool(args.vision or args.language) or bool(args.vision) != bool(args.language):
        raise ValueError("name either --hf DIR, or --vision DIR and --language DIR")
    if args.hf and args.seed is not None:
        raise ValueError("--seed: with --hf nothing is initialised at random; drop the flag")
    if args.hf and args.untie_embeddings_and_output_weights:
        raise ValueError(
            "--untie-embeddings-and-output-weights: a model of --hf keeps what its config.json specifies; drop the flag"
        )
    return [args.hf] if args.hf else [args.vision, args.language]


def _join_towers(
    architecture: Architecture, vision: dict[str, Readable], language: dict[str, Readable], seed: int
) -> dict[str, Readable]:
    drop_last_tower_layer(vision, architecture.vision.num_layers)
    for folder, tensors, is_tower in (("--vision", vision, True), ("--language", language, False)):
        wrong = [name for name in tensors if name.startswith(TOWER) != is_tower]
        if wrong:
            raise ValueError(f"{folder}: {tensors[wrong[0]].source} is not a tensor of such a model")
    if EMBEDDINGS not in language:
        raise ValueError(f"--language: {EMBEDDINGS} is missing")
    return vision | init_projector(architecture, seed, language[EMBEDDINGS].dtype) | language


def _load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
