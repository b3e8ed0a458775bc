"""Copy what there is to read and to change: the training script, run_stages.sh, mixtures, Slurm scripts, existing jobs, the demo.

rsa-megatron examples --out DIR
"""

import argparse
import shutil
from pathlib import Path

from rsa_megatron import atomic
from rsa_megatron.command_line import Parser, report_errors
from rsa_megatron.example_files import EXAMPLES


def main(arguments: list[str] | None = None) -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="rsa-megatron examples", description=__doc__, formatter_class=style)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist")
    args = parser.parse_args(arguments)
    with report_errors():
        if args.out.exists():
            raise FileExistsError(f"--out {args.out} exists: name another folder")
        with atomic.new_folder(args.out) as folder:
            shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    print("\n".join(str(path) for path in sorted(args.out.rglob("*")) if path.is_file()))
    return 0
