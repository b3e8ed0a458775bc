"""`torchrun -m rsa_megatron.training ...` is `torchrun examples/pretrain_llava_rsa.py ...`, from an installed wheel too."""

import runpy

from rsa_megatron.example_files import EXAMPLES

if __name__ == "__main__":
    runpy.run_path(str(EXAMPLES / "pretrain_llava_rsa.py"), run_name="__main__")
