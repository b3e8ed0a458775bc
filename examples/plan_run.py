"""Is now the command `rsa-megatron plan`; this pointer to it goes with version 0.3."""

import sys

from rsa_megatron.cli import main

if __name__ == "__main__":
    print("note: examples/plan_run.py is now the command rsa-megatron plan", file=sys.stderr)
    sys.exit(main(["plan", *sys.argv[1:]]))
