"""What Megatron's pretrain() asks for: the model, and the loaders of its data, from the run's arguments."""

from megatron.core import mpu
from megatron.energon import WorkerConfig
from megatron.training import get_args
from megatron.training.argument_utils import core_transformer_config_from_args

from rsa_megatron.data.conversation import IMAGE_TOKEN
from rsa_megatron.data.loader_state import find_train_state
from rsa_megatron.data.loaders import TrainLoader, ValidationLoader
from rsa_megatron.models.llava_onevision import LlavaOneVision, set_trainable
from rsa_megatron.models.partial_load import leave_out_projector_once
from rsa_megatron.training.arguments import dataloader_folder, end_with
from rsa_megatron.training.data_arguments import count_eval_micro_batches
from rsa_megatron.training.task_encoders import (
    architecture_of,
    load_tokenizer,
    task_encoder,
    training_task_encoder,
)


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
        packs_rows=args.packing_buffer_size > 0,
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
            training_task_encoder(args, say_skipped=is_last),
            worker_config(args),
            args.micro_batch_size,
            args.shuffle_buffer_size,
            one_epoch=args.train_iters if args.one_epoch else 0,
            drop_last=args.drop_last,
            last_batch=args.last_row,
            packing_buffer_size=args.packing_buffer_size,
        )
        if args.iteration > 0 and not args.restart_data:
            rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
            try:
                train.restore_state(find_train_state(dataloader_folder(args.load), args.iteration, rank, size))
            except (ValueError, OSError) as error:
                end_with(error)
    validation = None
    if args.eval_iters:
        validation = validation_loader(args, say_skipped=is_last, batches_per_evaluation=count_eval_micro_batches(args))
    return train, validation, None


datasets_provider.is_distributed = True


def validation_loader(
    args, *, say_skipped: bool, image_aspect_ratio: str | None = None, batches_per_evaluation: int = 0
) -> ValidationLoader:
    encoder = task_encoder(args, say_skipped=say_skipped, image_aspect_ratio=image_aspect_ratio)
    return ValidationLoader(
        args.data_path[0],
        encoder,
        worker_config(args),
        args.eval_micro_batch_size,
        batches_per_evaluation=batches_per_evaluation,
    )


def worker_config(args) -> WorkerConfig:
    return WorkerConfig(
        rank=mpu.get_data_parallel_rank(),
        world_size=mpu.get_data_parallel_world_size(),
        num_workers=args.num_workers,
        data_parallel_group=mpu.get_data_parallel_group(),
        seed_offset=args.seed,
    )
