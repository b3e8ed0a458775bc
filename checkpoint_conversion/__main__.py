"""Convert checkpoints between Hugging Face and Megatron. On the CPU, in little memory; needs no Transformer Engine.

python -m checkpoint_conversion hf-to-megatron --hf DIR --out DIR
python -m checkpoint_conversion hf-to-megatron --vision SIGLIP_DIR --language QWEN2_DIR --out DIR
python -m checkpoint_conversion megatron-to-hf --checkpoint DIR --out DIR
python -m checkpoint_conversion verify --hf DIR --checkpoint DIR
"""

import argparse
import sys

from checkpoint_conversion import hf_to_megatron, megatron_to_hf, verify
from rsa_megatron.command_line import Parser, report_errors

# rsa-megatron's command imports this file.
PROGRAM = "python -m checkpoint_conversion" if __name__ == "__main__" else "rsa-megatron convert"
COMMANDS = {
    "hf-to-megatron": hf_to_megatron,
    "megatron-to-hf": megatron_to_hf,
    "verify": verify,
}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with report_errors():
        status = COMMANDS[args.command].run(args)
    if status:
        sys.exit(status)


def parse(argv: list[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    description = __doc__.replace("python -m checkpoint_conversion", PROGRAM)
    parser = Parser(prog=PROGRAM, description=description, formatter_class=style)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        summary = module.__doc__.partition("\n")[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__, formatter_class=style)
        module.add_arguments(command)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
