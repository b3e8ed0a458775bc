"""Folders of checkpoints as this script's runs leave them: whose they are, and what a later run may begin with.

Beside the checkpoints lie run.json: the model, the stage, how it showed its samples (which an export must fit), of images that come
as embeddings their width, and where the run has come to its end, at which iteration; and hf/: the model's files in Hugging Face's format, without weights.
"""

import dataclasses
import json
from pathlib import Path

from transformers import AutoTokenizer

from rsa_megatron import atomic
from rsa_megatron.models.agreement import check_checkpoint_files, check_files, compare_chat_template
from rsa_megatron.models.architectures import Architecture
from rsa_megatron.models.hf_config import is_model_folder, read_architecture
from rsa_megatron.models.hf_files import copy_model_files, write_chat_template, write_model_files
from rsa_megatron.ranks import get_rank, print_once

TRACKER = "latest_checkpointed_iteration.txt"


def take_weights_of_another_stage(args) -> str | None:
    """`--load STAGE1` in a run of another stage: the weights alone, until this run has checkpoints of its own.

    Within one stage --load is Megatron's: weights, optimizer, learning-rate schedule and data position.

    Returns:
        A message for the log.
    """
    message = None
    for folder in filter(None, (args.load, args.save)):
        stage = run_of(folder).get("stage")
        if stage in (None, args.stage):
            continue
        if folder == args.save:
            raise ValueError(
                f"--save {folder} holds a run of stage {stage}, this is stage {args.stage}: name another --save"
            )
        if args.pretrained_checkpoint:
            raise ValueError(
                f"--load {folder} is of stage {stage}, whose weights this stage {args.stage} would begin from, and "
                f"--pretrained-checkpoint {args.pretrained_checkpoint} is named too: leave one out"
            )
        if not Path(folder, TRACKER).is_file():
            raise ValueError(f"--load {folder}: stage {stage} has no checkpoint there yet; let it end first")
        args.pretrained_checkpoint, args.load = args.load, args.save
        if not (args.save and Path(args.save, TRACKER).is_file()):
            message = f"weights from {folder}, of stage {stage}; optimizer, learning rates and data start from scratch"
    return message


def run_of(folder: str) -> dict:
    """What `write_stage` says of the run that writes to a folder; empty where it is not this script's."""
    file = Path(folder, "run.json")
    try:
        run = json.loads(file.read_text()) if file.is_file() else {}
        return run | {"stage": run["stage"]} if run else {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read: remove it if {folder} is not of another stage ({error})") from error


def write_stage(args, **more) -> None:
    """Beside the checkpoints: whose they are, for the next stage, and `finished` once the run has come to its end."""
    if args.save and not args.skip_train and get_rank() == 0:
        if args.image_positions:
            more["image_embedding_width"] = args.image_embedding_width
        if args.image_grids:
            more["image_grids"] = args.image_grids
        shown = {"template": args.template, "image_aspect_ratio": args.image_aspect_ratio}
        atomic.write_text(
            Path(args.save, "run.json"), json.dumps({"model": args.model, "stage": args.stage, **shown, **more}) + "\n"
        )


def write_hugging_face_files(args, architecture: Architecture) -> None:
    """Beside the checkpoints, what `checkpoint_conversion megatron-to-hf` needs to know of the model."""
    if not args.save or get_rank() != 0:
        return
    folder = Path(args.save) / "hf"
    if folder.exists():
        same = dict(name=architecture.name, image_embedding_width=architecture.image_embedding_width)
        if dataclasses.replace(read_architecture(folder), **same) != architecture:
            raise ValueError(f"{folder} is of another model than this run's: name another --save, or remove it")
        return
    with atomic.new_folder(folder) as unfinished:
        if is_model_folder(args.model):
            copy_model_files(Path(args.model), unfinished)
        else:
            # A tokenizer of its own: it may be given a token that the one in use must not have.
            write_model_files(unfinished, architecture, AutoTokenizer.from_pretrained(args.tokenizer_model))
        if args.template == "qwen_1_5":
            write_chat_template(unfinished)


def check_agreement(args, architecture: Architecture, tokenizer) -> None:
    """Compare the files of --model, and those beside the checkpoint that is loaded, with one another and with the run.

    Raises:
        ValueError: naming each two values and files that differ.
    """
    if is_model_folder(args.model):
        check_files(Path(args.model), say=print_once)
        if args.template == "qwen_1_5" and (said := compare_chat_template(Path(args.model), tokenizer)):
            print_once(said)
    for folder in filter(None, (args.load, args.pretrained_checkpoint)):
        check_checkpoint_files(Path(folder) / "hf", architecture, tokenizer, args.model, args.tokenizer_model)


def has_checkpoint(args) -> bool:
    return any(Path(folder, TRACKER).is_file() for folder in (args.load, args.pretrained_checkpoint) if folder)
