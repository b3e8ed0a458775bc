"""Is now the command `rsa-megatron data`; this pointer to it goes with version 0.3."""

import sys

from rsa_megatron.cli import main

if __name__ == "__main__":
    print("note: examples/prepare_shards.py is now the command rsa-megatron data", file=sys.stderr)
    sys.exit(main(["data", *sys.argv[1:]]))
