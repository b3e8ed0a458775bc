"""Train a LLaVA model with the RSA loss, on Megatron's own pretrain().

    torchrun --nproc-per-node 2 examples/pretrain_llava_rsa.py --model demo --stage 1 \
        --data-path demo/data/captions --tokenizer-model demo/tokenizer --pretrained-checkpoint demo/parts

--model and --stage set Megatron's arguments; every Megatron flag still works and overrides them. --dry-run prints
what would run and stops. Without a CUDA device the same script runs on the CPU.
"""

import gc

gc.disable()  # what modules define stays: to look for garbage among it again and again is a seventh of the imports' time

import dataclasses
import math
import os
import time
from pathlib import Path

from training_arguments import architecture_of, dataloader_folder, end_with, load_tokenizer, parse, say  # first:
# it prepares Megatron for machines without CUDA

import megatron_repairs
from embedding_arguments import image_embeddings
from learning_rates import LearningRates, table
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.energon import WorkerConfig
from megatron.training import get_args, get_wandb_writer, pretrain
from megatron.training.argument_utils import core_transformer_config_from_args, pretrain_cfg_container_from_args
from megatron.training.utils import is_last_rank, print_rank_last
from stage_folders import write_stage
from transformers import AutoTokenizer
from utilisation import Utilisation

from rsa_megatron.data.conversation import IMAGE_TOKEN
from rsa_megatron.data.loader_state import find_train_state
from rsa_megatron.data.loaders import TrainLoader, ValidationLoader
from rsa_megatron.data.task_encoder import LlavaTaskEncoder
from rsa_megatron.huggingface import is_model_folder, read_architecture
from rsa_megatron.huggingface_files import copy_model_files, write_chat_template, write_model_files
from rsa_megatron.llava.measure import measure_mutual_knn, read_pairs
from rsa_megatron.llava.model import LlavaOneVision, set_trainable
from rsa_megatron.llava.new_projector import leave_out_projector_once
from rsa_megatron.llava.train_step import forward_step
from rsa_megatron.plugin import RSAPlugin

gc.freeze()  # and what collects later need not look at it either
gc.enable()


def main():
    rsa = RSAPlugin()
    args = parse(rsa)
    if args.dry_run:
        return dry_run(args, rsa)
    if "RANK" not in os.environ:
        end_with(ValueError("start it with torchrun: torchrun --nproc-per-node 1 examples/pretrain_llava_rsa.py ..."))
    megatron_repairs.repair()
    try:
        write_hugging_face_files(args)
        write_stage(args)
    except (ValueError, OSError) as error:
        end_with(error)
    say(table(args, architecture_of(args)))
    rates = LearningRates(args)
    rates.apply()
    utilisation = Utilisation(args, architecture_of(args))
    utilisation.apply()
    say(utilisation.description)
    pretrain(
        pretrain_cfg_container_from_args(args),
        datasets_provider,
        ModelType.encoder_or_decoder,
        rates.wrap_forward_step(rsa.wrap_forward_step(utilisation.wrap_forward_step(forward_step))),
        rsa.wrap_model_provider(model_provider),
        non_loss_data_func=MutualKnn(rsa) if args.mutual_knn_samples else None,
        process_non_loss_data_func=write_mutual_knn if args.mutual_knn_samples else None,
    )
    # Not reached at --exit-interval, --exit-duration and on a signal, which end the process.
    write_stage(args, finished=args.train_iters)


def dry_run(args, rsa: RSAPlugin) -> None:
    """Print the settings (Megatron has printed its own), the parameters of each part, and which learn."""
    architecture = architecture_of(args)
    say(f"\nmodel {args.model}, stage {args.stage}, {rsa.config}")
    say(f"kernel size N: up to {args.micro_batch_size * args.data_parallel_size} pairs a micro-batch")
    say(table(args, architecture))
    padding = args.padded_vocab_size - architecture.vocab_size
    say(f"word embeddings: {architecture.vocab_size:,} rows, and {padding:,} of padding, which are not counted")


def write_hugging_face_files(args) -> None:
    """Beside the checkpoints, what `checkpoint_conversion megatron-to-hf` needs to know of the model."""
    if not args.save or int(os.environ.get("RANK", "0")) != 0:
        return
    architecture, folder = architecture_of(args), Path(args.save) / "hf"
    if folder.exists():
        same = dict(name=architecture.name, image_embedding_width=architecture.image_embedding_width)
        if dataclasses.replace(read_architecture(folder), **same) != architecture:
            raise ValueError(f"{folder} is of another model than this run's: name another --save, or remove it")
        return
    unfinished = Path(args.save) / "hf.unfinished"
    if is_model_folder(args.model):
        copy_model_files(Path(args.model), unfinished)
    else:
        # A tokenizer of its own: it may be given a token that the one in use must not have.
        write_model_files(unfinished, architecture, AutoTokenizer.from_pretrained(args.tokenizer_model))
    if args.template == "qwen_1_5":
        write_chat_template(unfinished)
    unfinished.rename(folder)


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    """Megatron's model provider: one chunk of the model."""
    args = get_args()
    model = LlavaOneVision(
        architecture_of(args),
        config or core_transformer_config_from_args(args),
        padded_vocab_size=args.padded_vocab_size,
        max_sequence_length=args.seq_length,
        image_token_index=load_tokenizer(args).convert_tokens_to_ids(IMAGE_TOKEN),
        tie_word_embeddings=not args.untie_embeddings_and_output_weights,
        rotary_base=args.rotary_base,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    set_trainable(model, args.trainable)
    if pre_process and args.projector_begins_anew:
        leave_out_projector_once(model)
    return model


def datasets_provider(num_samples, vp_stage=None):
    """Megatron's data provider: loaders on the first tensor rank of the first and the last stage."""
    args = get_args()
    is_first = mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    is_last = mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    if mpu.get_tensor_model_parallel_rank() != 0 or not (is_first or is_last):
        return None, None, None
    train = None
    if not args.skip_train:
        train = TrainLoader(
            args.data_path[0],
            task_encoder(args, say_skipped=is_last),
            worker_config(args),
            args.micro_batch_size,
            args.shuffle_buffer_size,
            one_epoch=args.train_iters if args.one_epoch else 0,
            drop_last=args.drop_last,
        )
        if args.iteration > 0 and not args.restart_data:
            rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
            try:
                train.restore_state(find_train_state(dataloader_folder(args.load), args.iteration, rank, size))
            except (ValueError, OSError) as error:
                end_with(error)
    validation = None
    if args.eval_iters:
        validation = validation_loader(args, say_skipped=is_last)
    return train, validation, None


datasets_provider.is_distributed = True


def validation_loader(args, *, say_skipped: bool, image_aspect_ratio: str | None = None) -> ValidationLoader:
    encoder = task_encoder(args, say_skipped=say_skipped, image_aspect_ratio=image_aspect_ratio)
    return ValidationLoader(args.data_path[0], encoder, worker_config(args), args.eval_micro_batch_size)


def task_encoder(args, *, say_skipped: bool, image_aspect_ratio: str | None = None) -> LlavaTaskEncoder:
    architecture = architecture_of(args)
    size = architecture.vision.image_size
    grids = [(rows * size, columns * size) for rows, columns in args.image_grids or []]
    return LlavaTaskEncoder(
        load_tokenizer(args),
        image_size=size,
        patch_size=architecture.vision.patch_size,
        image_aspect_ratio=image_aspect_ratio or args.image_aspect_ratio,
        grid_pinpoints=grids or architecture.grid_pinpoints,
        max_tiles=architecture.max_tiles,
        max_sequence_length=args.seq_length,
        template=args.template,
        label_style=args.label_style,
        embeddings=image_embeddings(args),
        say_skipped=say_skipped,
    )


def worker_config(args) -> WorkerConfig:
    return WorkerConfig(
        rank=mpu.get_data_parallel_rank(),
        world_size=mpu.get_data_parallel_world_size(),
        num_workers=args.num_workers,
        data_parallel_group=mpu.get_data_parallel_group(),
        seed_offset=args.seed,
    )


class MutualKnn:
    """For Megatron's non_loss_data_func: at each evaluation, image alone against caption alone on the same validation pairs."""

    def __init__(self, rsa: RSAPlugin):
        self._rsa = rsa
        self._pairs = None

    def __call__(self, model) -> dict[str, float]:
        args, begin = get_args(), time.monotonic()
        if self._pairs is None:
            self._pairs = self._read(args, model)
        result = measure_mutual_knn(
            model,
            self._pairs,
            num_samples=args.mutual_knn_samples,
            micro_batch_size=args.eval_micro_batch_size,
            seq_length=args.seq_length,
            k=args.mutual_knn_k,
            layer_pairs=args.mutual_knn_layers,
        )
        return said(args, *result, time.monotonic() - begin) if result else {}

    def _read(self, args, model) -> list:
        reads = mpu.get_tensor_model_parallel_rank() == 0 and (
            mpu.is_pipeline_first_stage(ignore_virtual=True) or mpu.is_pipeline_last_stage(ignore_virtual=True)
        )
        # Base tiles alone are measured; with anyres the others would be cut for nothing.
        loader = validation_loader(args, say_skipped=False, image_aspect_ratio="square") if reads else None
        return read_pairs(
            model,
            loader and loader.one_pass(),
            num_samples=args.mutual_knn_samples,
            micro_batch_size=args.eval_micro_batch_size,
            base_tile=self._rsa.config.base_tile,
        )


def said(args, scores: dict[tuple[int, int], float], num_pairs: int, seconds: float) -> dict[str, float]:
    """The scores by the names that the log calls them by, once it has."""
    # args.iteration is that of the checkpoint; where nothing is left to train, the current one stays 0.
    iteration = args.iteration if args.skip_train else max(args.iteration, args.curr_iteration + 1)
    chance = args.mutual_knn_k / (num_pairs - 1) if num_pairs > 1 else math.nan
    named = {"mutual-knn" + ("" if pair == (-1, -1) else " {}:{}".format(*pair)): score for pair, score in scores.items()}
    for name, score in named.items():
        print_rank_last(
            f" validation mutual-knn@{args.mutual_knn_k} at iteration {iteration} | {name} value: {score:.4f} | "
            f"{num_pairs} pairs, image alone against caption alone, {seconds:.1f} s | chance {chance:.4f} |"
        )
    return named


def write_mutual_knn(scores: dict[str, float], iteration: int, writer) -> None:
    """Megatron's process_non_loss_data_func: to TensorBoard and, where it is on, wandb."""
    for key, score in scores.items():
        writer.add_scalar(f"{key} validation", score, iteration)
        if get_wandb_writer() and is_last_rank():
            get_wandb_writer().log({f"{key} validation": score}, iteration)


if __name__ == "__main__":
    main()
