"""--data-path against the run that reads it: whether it is whole and large enough, who takes part in RSA, how long one pass is."""

from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size

from rsa_megatron.alignment.metrics import NEIGHBOUR_METRICS
from rsa_megatron.config import RSAConfig
from rsa_megatron.data.dataset_checks import check_data, check_rsa_flags
from rsa_megatron.data.epoch_length import count_epoch_iterations, count_epoch_samples
from rsa_megatron.data.loaders import explain_unread_validation
from rsa_megatron.data.packed_epoch import count_epoch_rows
from rsa_megatron.data.raw_samples import check_embeddings
from rsa_megatron.ranks import get_rank, print_once, run_on_first_rank
from rsa_megatron.training.embedding_arguments import image_embeddings
from rsa_megatron.training.task_encoders import training_task_encoder


def check_data_path(args, rsa_weight: float) -> None:
    if not args.data_path:
        raise ValueError("--data-path is missing: name a prepared Energon data set or a mixture (.yaml)")
    if len(args.data_path) > 1:
        raise ValueError(f"--data-path takes one data set, not {len(args.data_path)}: name a mixture (.yaml) of them")
    if get_rank() == 0:
        check_data(
            args.data_path[0],
            (["train"] if not args.skip_train else []) + (["val"] if args.eval_iters else []),
            num_readers=args.data_parallel_size * max(1, args.num_workers),
            micro_batch_size=args.eval_micro_batch_size,
        )
        if args.eval_iters:
            say_unread_validation(args)
        if embeddings := image_embeddings(args):
            check_embeddings(args.data_path[0], "val" if args.skip_train else "train", embeddings)
    if not args.skip_train:
        check_rsa_flags(args.data_path[0], rsa_weight=rsa_weight)


def explain_lone_pairs(args, rsa: RSAConfig) -> str | None:
    """Return a warning where a pair of image and caption has no other to be compared with, so that the RSA loss is always 0.

    (How many packed rows have is seen in training alone, which warns of a log interval without any.)
    """
    most = args.micro_batch_size * args.data_parallel_size if rsa.scope == "micro-batch" else args.global_batch_size
    if args.skip_train or not rsa.weight or most > 1 or args.packing_buffer_size:
        return None
    return (
        f"WARNING: RSA is on (--rsa-weight {rsa.weight:g}), but compares the pairs of a micro-batch on all data-parallel ranks, and "
        "there is one: its loss is always 0; raise --micro-batch-size, use more ranks, or --rsa-scope global-batch"
    )


def say_unread_validation(args) -> None:
    """Print once which validation samples no evaluation reads, and which scores cannot be."""
    has_neighbours = not set(NEIGHBOUR_METRICS).isdisjoint(args.eval_metrics)
    unread = explain_unread_validation(
        args.data_path[0],
        data_parallel_size=args.data_parallel_size,
        num_workers=args.num_workers,
        micro_batch_size=args.eval_micro_batch_size,
        micro_batches=count_eval_micro_batches(args),
        pairs=args.mutual_knn_samples,
        neighbours=args.mutual_knn_k * has_neighbours,
    )
    if unread:
        print_once(unread)


def count_eval_micro_batches(args) -> int:
    """Count the micro-batches that a rank reads in an evaluation (megatron.training's evaluate)."""
    return args.eval_iters * (args.eval_global_batch_size // (args.eval_micro_batch_size * args.data_parallel_size))


def set_one_epoch(args) -> None:
    """Without a number of iterations or samples a run is one pass over the training part."""
    args.one_epoch = not (args.train_iters or args.train_samples or args.skip_train)
    if args.drop_last and not args.one_epoch:
        raise ValueError(
            "--drop-last is about a single pass over the data; leave it out, or leave out the number of iterations"
        )
    args.last_row = 0  # of a rank in a pass over packed rows, of which there may be more
    if not args.one_epoch:
        return
    if args.packing_buffer_size:
        return _set_packed_epoch(args)
    args.train_iters = count_epoch_iterations(
        args.data_path[0],
        data_parallel_size=args.data_parallel_size,
        num_workers=args.num_workers,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=get_current_running_global_batch_size(),  # less with --decrease-batch-size-if-needed
        drop_last=args.drop_last,
    )
    if not args.train_iters:
        raise ValueError(
            f"--data-path {args.data_path[0]}: one pass over it does not fill a batch of {args.global_batch_size}; lower "
            "--global-batch-size or leave out --drop-last"
        )
    if get_rank() == 0:
        print_once(f"one pass over the data: {_format_pass(args, sum(count_epoch_samples(args.data_path[0])))}")


def _format_pass(args, num_samples: int) -> str:
    iterations = f"{args.train_iters} iteration{'s' * (args.train_iters > 1)}"
    if args.drop_last:
        num_read = args.train_iters * args.global_batch_size
        return f"{num_read} of {num_samples} samples (--drop-last) in {iterations} of {args.global_batch_size}"
    return f"{num_samples} samples in {iterations} of up to {args.global_batch_size}"


def _set_packed_epoch(args) -> None:
    if args.drop_last:
        raise ValueError(
            "--drop-last leaves out samples that do not fill a micro-batch, and a packed row is one: leave it out"
        )
    # Thousands of samples are read for it: by one rank for all.
    rows = run_on_first_rank(
        lambda: count_epoch_rows(
            args.data_path[0],
            training_task_encoder(args, say_skipped=False),
            data_parallel_size=args.data_parallel_size,
            num_workers=args.num_workers,
            packing_buffer_size=args.packing_buffer_size,
            shuffle_buffer_size=args.shuffle_buffer_size,
            seed=args.seed,
        )
    )
    batch_size = get_current_running_global_batch_size()
    rows_per_iteration = batch_size // args.data_parallel_size
    args.train_iters = -(-rows.of_rank // rows_per_iteration)
    args.last_row = args.train_iters * rows_per_iteration
    how = "as the lengths of its samples say"
    if not rows.is_exact:
        how = f"at most, by the lengths of {rows.num_read} of its {rows.num_samples} samples; once the data has ended, rows are empty"
    print_once(
        f"one pass over the data: {args.train_iters} iterations of {args.global_batch_size} rows of {rows.samples_per_row:.1f} samples, {how}"
    )
