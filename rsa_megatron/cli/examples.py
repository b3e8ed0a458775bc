"""Copy what there is to read and to change: the training script, run_stages.sh, mixtures, Slurm scripts, existing jobs, the demo.

    rsa-megatron examples --out DIR
"""

import argparse
import shutil
import sys
from pathlib import Path

from rsa_megatron.example_files import EXAMPLES


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="rsa-megatron examples", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist")
    args = parser.parse_args(arguments)
    try:
        shutil.copytree(EXAMPLES, args.out, ignore=shutil.ignore_patterns("__pycache__"))
    except OSError as error:
        sys.exit(f"error: {error}")
    print("\n".join(sorted(str(path) for path in args.out.rglob("*") if path.is_file())))
