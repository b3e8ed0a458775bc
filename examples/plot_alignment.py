"""Is now the command `rsa-megatron plot`; this pointer to it goes with version 0.3."""

import sys

from rsa_megatron.cli import main

if __name__ == "__main__":
    print("note: examples/plot_alignment.py is now the command rsa-megatron plot", file=sys.stderr)
    sys.exit(main(["plot", *sys.argv[1:]]))
