"""What Megatron's own checks would say in names that nobody has typed, or in an assertion: here each in one line, with the remedy.

Before those checks: values that are too small, flags that exclude each other or need one another, sizes that do not divide. What they
say of other flags is passed on as it is (arguments.parse_megatron).
"""

import math

from rsa_megatron.models.architectures import Architecture
from rsa_megatron.training.run_folder import AT_THE_END
from rsa_megatron.training.run_summary import get_parallel_sizes

#: The least value of each flag, with which its message ends.
_AT_LEAST = {
    1: """
        tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size micro_batch_size global_batch_size
        eval_micro_batch_size eval_global_batch_size seq_length log_interval save_retain_interval exit_interval mutual_knn_k
        recompute_num_layers""",
    0: """
        train_iters train_samples save_interval eval_iters num_workers shuffle_buffer_size mutual_knn_samples lr min_lr
        lr_warmup_iters lr_warmup_samples weight_decay start_weight_decay end_weight_decay clip_grad seed""",
}
_FRACTIONS = "hidden_dropout attention_dropout lr_warmup_fraction adam_beta1 adam_beta2"


def check_values(args, architecture: Architecture) -> None:
    """Check what has been parsed, before Megatron changes it.

    Sets --save-interval where --save has none, and with packing --eval-global-batch-size.

    Raises:
        ValueError: naming flag, value and remedy.
    """
    _check_range(args)
    _check_layout(args, architecture)
    _check_batch(args)
    if not args.skip_train:
        _check_schedule(args)
        _check_recomputation(args)
    if args.fp16 and args.bf16:
        raise ValueError("--fp16 and --bf16 exclude each other: leave one out")
    if args.seq_length > args.max_position_embeddings and not args.packing_buffer_size:
        raise ValueError(
            f"--seq-length {args.seq_length} is above the {args.max_position_embeddings} positions of --model {args.model} "
            f"(--max-position-embeddings): lower it to {args.max_position_embeddings} or less"
        )
    if args.save_retain_interval and args.save_retain_interval % (args.save_interval or AT_THE_END):
        raise ValueError(
            f"--save-retain-interval {args.save_retain_interval} is not a multiple of --save-interval "
            f"{args.save_interval or '(which is missing)'}: change one of the two"
        )
    if args.save and not args.save_interval:
        args.save_interval = AT_THE_END


def check_length(args) -> None:
    """Check that the warm-up ends before the decay does; once it is known how long the run is."""
    if args.skip_train:
        return
    unit = "iters" if args.train_iters else "samples"
    length = getattr(args, f"train_{unit}")
    decay = getattr(args, f"lr_decay_{unit}") or length
    warmup = getattr(args, f"lr_warmup_{unit}")
    if warmup >= decay:
        flag = f"--lr-decay-{unit}" if decay != length else f"--train-{unit}"
        raise ValueError(
            f"--lr-warmup-{unit} {warmup} is not below the {decay} {'iterations' if unit == 'iters' else unit} after which the learning "
            f"rate has decayed ({flag}): lower it"
        )


def _check_range(args) -> None:
    for least, names in _AT_LEAST.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not value >= least:
                raise ValueError(f"{_flag(name)} {value}: it is {least} or more")
    for name in _FRACTIONS.split():
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{_flag(name)} {value}: it is from 0 to below 1")
    if args.eval_interval is not None and args.eval_interval < 1:
        raise ValueError(f"--eval-interval {args.eval_interval}: it is 1 or more; --eval-iters 0 turns evaluation off")


def _check_layout(args, architecture: Architecture) -> None:
    sizes = get_parallel_sizes(args)
    num_divided = math.prod(sizes.values())
    if args.world_size % num_divided:
        product = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        raise ValueError(
            f"{args.world_size} process(es) cannot be divided by {product}: start a multiple of {num_divided}"
        )
    num_stages, num_layers = args.pipeline_model_parallel_size, architecture.decoder.num_layers
    architecture.check_layout(tensor=args.tensor_model_parallel_size, pipeline=num_stages)
    for name in ("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage"):
        if getattr(args, name) is not None and num_stages == 1:
            raise ValueError(f"{_flag(name)} needs --pipeline-model-parallel-size above 1; leave it out")
    is_uneven = (
        args.decoder_first_pipeline_num_layers is not None
        or args.decoder_last_pipeline_num_layers is not None
        or args.account_for_embedding_in_pipeline_split
        or args.account_for_loss_in_pipeline_split
        or args.pipeline_model_parallel_layout is not None
    )
    if num_layers % num_stages and not is_uneven:
        raise ValueError(
            f"--pipeline-model-parallel-size {num_stages} does not divide the decoder's {num_layers} layers: choose another, or give the "
            "first stage a number of its own (--decoder-first-pipeline-num-layers)"
        )
    if args.seq_length % (2 * args.context_parallel_size) and args.context_parallel_size > 1:
        raise ValueError(
            f"--seq-length {args.seq_length} must be a multiple of 2 x --context-parallel-size {args.context_parallel_size}"
        )


def _check_batch(args) -> None:
    data_parallel_size = args.world_size // math.prod(get_parallel_sizes(args).values())
    micro, whole = args.micro_batch_size, args.global_batch_size
    if args.packing_buffer_size and not args.eval_global_batch_size and (args.eval_micro_batch_size or micro):
        # As many samples as a step has rows, in whole micro-batches, and of these as many as interleaved stages take at a time.
        size = (args.eval_micro_batch_size or micro) * data_parallel_size * _count_interleaved(args)
        args.eval_global_batch_size = -(-(whole or size) // size) * size
    if not whole or not micro or args.decrease_batch_size_if_needed:
        return
    if whole % (micro * data_parallel_size):
        raise ValueError(
            f"--global-batch-size {whole} is not a multiple of --micro-batch-size {micro} x DP {data_parallel_size}: change one of the three"
        )
    micro, whole = args.eval_micro_batch_size or micro, args.eval_global_batch_size or whole
    if whole % (micro * data_parallel_size):
        raise ValueError(
            f"--eval-global-batch-size {whole} is not a multiple of --eval-micro-batch-size {micro} x DP {data_parallel_size}: change one of "
            "the three (without these flags they are those of training)"
        )
    sizes = {"--global-batch-size": (args.global_batch_size, args.micro_batch_size)} if not args.skip_train else {}
    sizes |= {"--eval-global-batch-size": (whole, micro)} if args.eval_iters else {}
    for flag, (whole, micro) in sizes.items():
        num_micro_batches, least = whole // (micro * data_parallel_size), _count_interleaved(args)
        if num_micro_batches < least:
            raise ValueError(
                f"{flag} {whole} is {num_micro_batches} micro-batch(es) a rank, and interleaved pipeline stages take {least} at a time: raise it"
            )


def _count_interleaved(args) -> int:
    """Count the micro-batches that interleaved pipeline stages take at a time; 1 without them."""
    is_interleaved = args.pipeline_model_parallel_size > 1 and (
        args.num_virtual_stages_per_pipeline_rank
        or args.num_layers_per_virtual_pipeline_stage
        or args.pipeline_model_parallel_layout
    )
    return (args.microbatch_group_size_per_vp_stage or args.pipeline_model_parallel_size) if is_interleaved else 1


def _check_schedule(args) -> None:
    if args.train_iters and args.train_samples:
        raise ValueError("--train-iters and --train-samples both say how long the run is: leave one out")
    right, wrong = ("samples", "iters") if args.train_samples else ("iters", "samples")
    for name in ("lr_decay", "lr_warmup"):
        if getattr(args, f"{name}_{wrong}"):
            counted = "samples (--train-samples)" if right == "samples" else "iterations"
            raise ValueError(
                f"{_flag(name)}-{wrong} does not go with a run that is counted in {counted}: name {_flag(name)}-{right}"
            )
    if args.lr_warmup_fraction is not None and getattr(args, f"lr_warmup_{right}"):
        raise ValueError(f"--lr-warmup-fraction and --lr-warmup-{right} exclude each other: leave one out")
    if args.min_lr > args.lr:
        raise ValueError(
            f"--min-lr {args.min_lr:g} is above --lr {args.lr:g}, from which the rate decays to it: lower it"
        )
    ends = {_flag(name): getattr(args, name) for name in ("start_weight_decay", "end_weight_decay")}
    for flag, value in ends.items():
        if args.weight_decay_incr_style == "constant" and value is not None:
            raise ValueError(f"{flag} needs --weight-decay-incr-style linear or cosine; else name --weight-decay")
        if args.weight_decay_incr_style != "constant" and value is None:
            raise ValueError(f"--weight-decay-incr-style {args.weight_decay_incr_style} needs {' and '.join(ends)}")


def _check_recomputation(args) -> None:
    if args.recompute_granularity == "full" and not (args.recompute_method and args.recompute_num_layers):
        raise ValueError(
            "--recompute-granularity full needs --recompute-method and --recompute-num-layers: uniform and 1 recompute every layer"
        )
    if args.recompute_method and args.recompute_granularity != "full":
        raise ValueError(
            f"--recompute-method {args.recompute_method} goes with --recompute-granularity full: add it, or leave it out"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
