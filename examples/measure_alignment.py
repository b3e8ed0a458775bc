"""Is now the command `rsa-megatron measure`; this pointer to it goes with version 0.3."""

import sys

from rsa_megatron.cli import main

if __name__ == "__main__":
    print("note: examples/measure_alignment.py is now the command rsa-megatron measure", file=sys.stderr)
    sys.exit(main(["measure", *sys.argv[1:]]))
