"""Folders of checkpoints as this script's runs leave them: whose they are, and what a later run may begin with.

Beside the checkpoints lie run.json: the model, the stage, how it showed its samples (which an export must fit), of images that come
as embeddings their width, and where the run has come to its end, at which iteration; hf/: the model's files in Hugging Face's format,
without weights; and, while a run writes there, run.lock; and logs/, what each rank has printed (console.py).
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from rsa_megatron import atomic
from rsa_megatron.folder_lock import FolderLock
from rsa_megatron.models.agreement import check_checkpoint_files, check_files, compare_chat_template
from rsa_megatron.models.architectures import Architecture
from rsa_megatron.models.hf_config import is_model_folder, read_architecture
from rsa_megatron.models.hf_files import copy_model_files, write_chat_template, write_model_files
from rsa_megatron.ranks import end_process, exit_with_error, get_rank, print_once, run_on_first_rank
from rsa_megatron.training.checkpoint_faults import TRACKER, list_checkpoints

#: --save-interval of a run that writes its last checkpoint alone. (Megatron saves at the end what is not of an interval.)
AT_THE_END = sys.maxsize


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


class RunFolder:
    """--save, while a run writes to it: no other run may, and what lies beside the checkpoints is written.

    Without --save, or where nothing is trained, it is nothing.
    """

    def __init__(self, args, *beside: Callable[[], None]):
        """`beside`: what writes what lies beside the checkpoints, once the folder is this run's."""
        self._args, self._beside = args, beside
        self._lock = FolderLock(args.save, end_process, print_once) if args.save and not args.skip_train else None
        self._is_open = False

    def wrap_model_provider(self, model_provider: Callable) -> Callable:
        """Return the same provider, which opens the folder first: by then all ranks can be told that it is in use."""

        @functools.wraps(model_provider)
        def provide(*args, **kwargs):
            if not self._is_open:
                self._open()
            return model_provider(*args, **kwargs)

        return provide

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._lock:
            self._lock.release()

    def _open(self) -> None:
        self._is_open = True
        try:
            run_on_first_rank(self._write)
        except ValueError as error:
            exit_with_error(str(error))

    def _write(self) -> None:
        if self._lock:
            try:
                self._lock.acquire()
            except ValueError as error:
                raise ValueError(f"--save {error}") from error
        for write in self._beside:
            write()


def is_same_folder(one: str | None, other: str | None) -> bool:
    return bool(one and other) and Path(one).resolve() == Path(other).resolve()


def check_save(args) -> str | None:
    """Raise ValueError where a run that does not resume the checkpoints in --save would write over them.

    Returns:
        A message where it goes back to an earlier one (--ckpt-step), and writes over the later.
    """
    reached = read_tracker(args.save)
    if not args.save or args.skip_train or reached is None:
        return None
    there = f"--save {args.save} holds checkpoints (the last: {reached})"
    if not args.load:
        raise ValueError(
            f"{there}, and without --load this run would start from scratch and write over them: add --load {args.save} to "
            "resume, or name another --save"
        )
    if args.load != args.save:
        raise ValueError(
            f"{there}, and this run would begin with --load {args.load} and write over them: set --load {args.save} to resume, "
            "or name another --save"
        )
    if args.finetune and reached.isdecimal():
        raise ValueError(
            f"{there}, and with --finetune this run would start at iteration 0 and write over them: leave --finetune out to "
            f"resume, or name another --save (and --pretrained-checkpoint {args.save})"
        )
    start = find_start(args)
    if start is not None and start < int(reached):
        return f"--ckpt-step {start}: back from iteration {reached}; later checkpoints in {args.save} are written over"
    return None


def find_start(args) -> int | None:
    """Return the iteration of the checkpoint in --save that this run resumes; None where it resumes none."""
    return find_resumed(args) if args.save and args.load == args.save else None


def find_resumed(args) -> int | None:
    """Return the iteration that this run goes on from, whatever folder it saves to; None where it begins at 0."""
    reached = read_tracker(args.load)
    if args.finetune or args.override_ckpt_iteration is not None or not (reached or "").isdecimal():
        return None
    return args.ckpt_step or int(reached)


def explain_nothing_left(args) -> str | None:
    """Return a line for a run that has come to its end before and has nothing left to train; else None.

    One that was ended between its last checkpoint and its last evaluation has that left.
    """
    if args.skip_train or args.step_batch_size_schedule:  # with which the number of iterations is not known yet
        return None
    start = find_resumed(args)
    count = args.train_iters or (args.train_samples or 0) // args.global_batch_size
    if start is None or start < count or "finished" not in run_of(args.load):
        return None
    return (
        f"--load {args.load}: its run has come to its end at iteration {start}, and this one has {count}: nothing is left to "
        "train, and nothing is written; to go on, raise --train-iters; to evaluate, add --skip-train"
    )


def read_tracker(folder: str | None) -> str | None:
    """Return what Megatron's tracker says of the last checkpoint, an iteration or "release"; None without one.

    Raises:
        ValueError: it says something else, or names a checkpoint that is not there.
    """
    file = Path(folder, TRACKER) if folder else None
    if not (file and file.is_file()):
        return None
    said = file.read_text(errors="replace").strip()
    there = f"there are {', '.join(map(str, list_checkpoints(folder))) or 'none'}"
    if said != "release" and not said.isdecimal():
        raise ValueError(
            f"{file} says {said[:40]!r}: write the iteration of the last whole checkpoint into it ({there})"
        )
    name = "release" if said == "release" else f"iter_{int(said):07d}"
    if not Path(folder, name).is_dir():
        raise ValueError(
            f"{file} says {said}, and {name} is not there: write the iteration of another into it ({there})"
        )
    return said


def has_checkpoint(args) -> bool:
    return any(Path(folder, TRACKER).is_file() for folder in (args.load, args.pretrained_checkpoint) if folder)
