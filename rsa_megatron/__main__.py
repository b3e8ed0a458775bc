"""python -m rsa_megatron is the command rsa-megatron; torchrun takes it as `-m rsa_megatron`."""

import sys

from rsa_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
