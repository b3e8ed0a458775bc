"""ReAlign: text embeddings moved onto the distribution of image embeddings, so that text can stand in for images.

    rsa-megatron realign fit --images SOURCE --texts SOURCE --out FOLDER                 from existing embeddings
    rsa-megatron realign fit --encoder HF --data DATA [--text-data DATA] --out FOLDER    embedded and stored first
    torchrun --nproc-per-node N -m rsa_megatron realign fit ...                          ranks share the rows
    rsa-megatron realign transform --operator FOLDER --texts SOURCE --out x.npy          rows to rows
    rsa-megatron realign transform --operator FOLDER --encoder HF --data SHARDS --side text --out SHARDS2
    rsa-megatron realign transform --encoder HF --data SHARDS --side image --out SHARDS2
    rsa-megatron realign transform [--operator FOLDER] --texts|--images SOURCE [--keys IDS] --data DATA --out SHARDS2
    rsa-megatron realign report ...                                                      a page of figures of two sets

SOURCE: FOLDER[:LAYER] of features stored by this command or rsa-megatron measure, x.npy, x.safetensors[:TENSOR]. HF: a CLIP,
SigLIP or SigLIP2 model. DATA: as for rsa-megatron measure; for texts also LLaVA's records without images, or a .txt with
one caption per line. SHARDS2 is what pretrain_llava_rsa.py --stage revision trains on: each sample's image is its embedding,
of unit length; records, splits and `rsa` are unchanged.

Images and texts need not pair up. Use the same encoder and the same kind of data for fitting an operator and for
applying it. Embeddings are stored below --store: a run that was killed resumes where it stopped.
"""

import argparse
import os
import sys
from datetime import timedelta

import torch
from tqdm import tqdm

from rsa_megatron.cli import realign_fit, realign_transform
from rsa_megatron.cli.realign_sources import add_source_arguments, open_sources
from rsa_megatron.command_line import Parser, report_errors
from rsa_megatron.ranks import exit_with_error

__all__ = ["add_source_arguments", "main", "open_sources"]


def main(arguments: list[str] | None = None) -> None:
    """Run a command; bad input is reported in one line (rsa_megatron/command_line.py)."""
    tqdm.monitor_interval = 0  # its thread would live on while Energon's indexing forks
    join_ranks()
    command = parse(arguments)
    import transformers  # takes a second, which --help is spared

    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    with report_errors(end=exit_with_error, interrupted="interrupted; the same command resumes from here"):
        try:
            command.run(command)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"--batch-size {command.batch_size} is too large for the device: {str(error).splitlines()[0]}"
            ) from error


def join_ranks() -> None:
    """Join the ranks of torchrun over gloo: they exchange a few vectors."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        # As long as the first rank may embed.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    arguments = sys.argv[1:] if arguments is None else arguments
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="rsa-megatron realign", description=__doc__, formatter_class=style)
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {"fit": realign_fit, "transform": realign_transform}
    if arguments[:1] == ["report"]:
        from rsa_megatron.cli import gap_report  # loads matplotlib, which the others need not have

        modules["report"] = gap_report
    for name, help in (
        ("fit", "fit an operator"),
        ("transform", "move texts, or write shards"),
        ("report", "draw a page of figures"),
    ):
        command = commands.add_parser(name, help=help)
        if name in modules:
            modules[name].add_arguments(command)
            command.set_defaults(run=modules[name].run)
    return parser.parse_args(arguments)
