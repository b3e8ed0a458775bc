"""The command `rsa-megatron` (also `python -m rsa_megatron`; with several processes `torchrun ... -m rsa_megatron`).

    rsa-megatron data pack|link|show|fill       training data from data as people have it
    rsa-megatron plan                           which parallel layouts fit N GPUs, and which is fastest
    rsa-megatron measure                        alignment of every layer with every layer
    rsa-megatron plot                           figures of what was measured
    rsa-megatron realign fit|transform|report   text embeddings moved onto image embeddings
    rsa-megatron convert                        checkpoints from and to Hugging Face (python -m checkpoint_conversion)
    rsa-megatron examples                       copies the training script, mixtures and Slurm scripts into a folder

See --help of each. An error is one line `error: ...`, with exit status 2; Ctrl-C is 130.
Training: torchrun -m rsa_megatron.training (the same as examples/pretrain_llava_rsa.py).
"""

import contextlib
import difflib
import importlib
import sys

from rsa_megatron.command_line import NO_READER, end_output, report_errors

COMMANDS = {
    "data": "rsa_megatron.cli.data",
    "plan": "rsa_megatron.cli.plan",
    "measure": "rsa_megatron.cli.measure",
    "plot": "rsa_megatron.cli.plot",
    "realign": "rsa_megatron.cli.realign",
    "convert": "checkpoint_conversion.__main__",
    "examples": "rsa_megatron.cli.examples",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit status, or end the process with it (rsa_megatron/command_line.py)."""
    try:
        with report_errors():
            try:
                return _run(*((sys.argv[1:] if arguments is None else arguments) or ["--help"]))
            finally:
                end_output()  # also that of --help, which ends the process
    except BrokenPipeError:  # the reader, such as head, has seen enough
        with contextlib.suppress(OSError):
            end_output()
        return NO_READER


def _run(name: str, *arguments: str) -> int:
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if name == "--version":
        from rsa_megatron import __version__

        print(f"rsa-megatron {__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        likely = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{name} is not a command of rsa-megatron: {', '.join(COMMANDS)}{likely}")
    try:
        command = importlib.import_module(COMMANDS[name])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("rsa_megatron", "checkpoint_conversion"):
            raise
        raise ValueError(
            f"rsa-megatron {name} needs the package {error.name}: pip install 'rsa-megatron[train,plots]'"
        ) from error
    return command.main(list(arguments)) or 0
