"""Sequence packing: its flags, what they set of Megatron's arguments, and what does not work with it.

A packed row holds several samples one after the other, up to --seq-length positions, which attend to themselves alone. Only training's
rows are packed; evaluations read a sample a row.
"""

import argparse

from rsa_megatron.models.architectures import Architecture
from rsa_megatron.planning.most_tiles import count_row_tiles


def add_arguments(group) -> None:
    group.add_argument(
        "--packing-buffer-size",
        type=buffer_size,
        default=0,
        metavar="N",
        help="pack training samples into rows of up to --seq-length positions, chosen among the next N of each data worker; "
        "--global-batch-size then counts rows; 0: a row a sample",
    )
    group.add_argument(
        "--packing-max-tiles",
        type=int,
        metavar="T",
        help="the most image tiles of a packed row, which bounds the vision tower's memory; default: those of the largest image, "
        "or half as many again as fill a row, if that is more",
    )


def buffer_size(text: str) -> int:
    """ "1000" as 1000."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text} is no number of samples: name 0 (a row a sample) or more, such as 1000"
        )
    return int(text)


def make_defaults(args) -> dict:
    """Make the defaults of Megatron's arguments that packing sets; a micro-batch that contradicts them is seen in check_packing.

    Args:
        args: as the recipe and the command line have them.
    """
    if not args.packing_buffer_size:
        return {}
    return dict(
        # Attention takes a packed row as the one row of its micro-batch.
        micro_batch_size=1,
        eval_micro_batch_size=args.micro_batch_size,
        # The only weighting that does not depend on which samples share a row: each trained token of a step weighs alike.
        calculate_per_token_loss=True,
    )


def check_packing(args) -> None:
    """Check what does not go with packed rows, before Megatron changes the arguments.

    Raises:
        ValueError: a setting under which packed rows would be wrong, or one that would do nothing.
    """
    if not args.packing_buffer_size:
        if args.packing_max_tiles is not None:
            raise ValueError(
                "--packing-max-tiles is of packed rows: name --packing-buffer-size (1000), or leave it out"
            )
        return
    refused = {
        f"--micro-batch-size {args.micro_batch_size}, as a packed row is a micro-batch of its own: leave it out, and choose by "
        "--seq-length how many samples a row holds": args.micro_batch_size != 1,
        "CUDA graphs (--cuda-graph-impl), which leave out where samples begin; leave them out": _has_cuda_graphs(args),
        "--tp-comm-overlap, whose buffers are for rows of exactly --seq-length positions; leave it out": args.tp_comm_overlap,
    }
    for setting, is_on in refused.items():
        if is_on:
            raise ValueError(f"--packing-buffer-size {args.packing_buffer_size} does not go with {setting}")


def set_max_tiles(args, architecture: Architecture) -> None:
    """Set `args.packing_max_tiles` where no flag has.

    Raises:
        ValueError: the flag's is less than an image may have.
    """
    if not args.packing_buffer_size:
        return
    tiles = count_row_tiles(vars(args), architecture)
    if args.packing_max_tiles is None:
        args.packing_max_tiles = tiles.default
    elif args.packing_max_tiles < tiles.of_largest_image:
        raise ValueError(
            f"--packing-max-tiles {args.packing_max_tiles}: the largest image alone has {tiles.of_largest_image}; name that or more, "
            "or smaller --image-grids"
        )


def _has_cuda_graphs(args) -> bool:
    return args.cuda_graph_impl != "none" or args.enable_cuda_graph or args.external_cuda_graph


def format_packing(args) -> str:
    """Format what packing does, and what follows from it, for the start of a run."""
    return (
        f"packing: rows of up to {args.seq_length} positions and {args.packing_max_tiles} tiles, of {args.packing_buffer_size} "
        "samples that each data worker holds; so the loss is per token (--calculate-per-token-loss), a micro-batch is a row, and "
        "--global-batch-size counts rows: `samples` in the log is how many samples a step has"
    )
