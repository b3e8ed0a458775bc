"""Is now the command `rsa-megatron realign`; this pointer to it goes with version 0.3."""

import sys

from rsa_megatron.cli import main

if __name__ == "__main__":
    print("note: examples/realign.py is now the command rsa-megatron realign", file=sys.stderr)
    sys.exit(main(["realign", *sys.argv[1:]]))
