"""What runs, said before it runs: model, loss, layout, data, and what is trained. --dry-run ends after it."""

import dataclasses

from rsa_megatron.config import RSAConfig
from rsa_megatron.models.architectures import Architecture
from rsa_megatron.training import learning_rates, packing_arguments
from rsa_megatron.training.run_folder import AT_THE_END, find_resumed


def format_run(args, rsa: RSAConfig, architecture: Architecture) -> str:
    """Format the run's settings in a dozen lines; Megatron's own list of them has four hundred."""
    resumed = find_resumed(args)
    return "\n".join(
        [
            f"model {args.model}, stage {args.stage}: {_format_precision(args)}, {args.transformer_impl} layers, rows of up to "
            f"{args.seq_length} positions",
            f"layout: {_format_layout(args)}",
            f"batch: micro-batch {args.micro_batch_size} x {_count_micro_batches(args)} x DP {args.data_parallel_size} = "
            f"{args.global_batch_size} {_name_rows(args)}; {_format_length(args)}",
            *([packing_arguments.format_packing(args)] if args.packing_buffer_size else []),
            *([f"data: {args.data_path[0]}"] if args.data_path else []),
            *([] if args.skip_train else [f"checkpoints: {_format_saving(args)}"]),
            *([f"resumes {args.load} at iteration {resumed}"] if resumed and not args.skip_train else []),
            f"RSA: {_format_rsa(args, rsa)}",
            learning_rates.format_table(args, architecture),
            *learning_rates.explain_warmup(args, resumed),
            f"word embeddings: {architecture.vocab_size:,} rows, and {args.padded_vocab_size - architecture.vocab_size:,} of "
            "padding, not counted",
        ]
    )


def get_parallel_sizes(args) -> dict[str, int]:
    """Return over how many ranks a model is split, by the field's name of each way."""
    return {
        "TP": args.tensor_model_parallel_size,
        "PP": args.pipeline_model_parallel_size,
        "CP": args.context_parallel_size,
    }


def _format_precision(args) -> str:
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def _format_layout(args) -> str:
    parts = [f"{args.world_size} rank(s), DP {args.data_parallel_size}"]
    parts += [f"{name} {size}" for name, size in get_parallel_sizes(args).items() if size > 1]
    parts += ["sequence parallel"] * args.sequence_parallel
    parts += ["distributed optimizer"] * args.use_distributed_optimizer
    parts += [f"recompute {args.recompute_granularity}"] * bool(args.recompute_granularity)
    return ", ".join(parts)


def _count_micro_batches(args) -> int:
    return args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)


def _format_length(args) -> str:
    if args.skip_train:
        return "validation only"
    if args.train_samples:
        return f"{args.train_samples} {_name_rows(args)}"
    return f"{args.train_iters} iteration{'s' * (args.train_iters > 1)}"


def _format_saving(args) -> str:
    if not args.save:
        interval = args.unused_save_interval
        return "none, as there is no --save" + f" (--save-interval {interval} does nothing)" * bool(interval)
    if args.save_interval == AT_THE_END:
        return f"{args.save}, at the end alone (--save-interval N: every N iterations too)"
    return f"{args.save}, every {args.save_interval} iterations and at the end"


def _format_rsa(args, rsa: RSAConfig) -> str:
    if not rsa.weight:
        return "off (weight 0)"
    if args.packing_buffer_size:
        pairs = f"the pairs of {args.data_parallel_size} packed row(s) (DP) a kernel"
    else:
        pairs = f"up to {args.micro_batch_size * args.data_parallel_size} pairs a kernel (micro-batch x DP)"
    changed = [
        f"{field.name.replace('_', '-')} {getattr(rsa, field.name)}"
        for field in dataclasses.fields(rsa)
        if field.name != "weight" and getattr(rsa, field.name) != field.default
    ]
    return "; ".join([f"weight {rsa.weight:g}", pairs, *changed])


def _name_rows(args) -> str:
    """Name what Megatron's batch sizes and --train-samples count."""
    return "packed rows" if args.packing_buffer_size else "samples"
