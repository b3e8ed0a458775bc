"""Training on Megatron's own pretrain(): the command line, the recipes' settings, the providers, what is logged.

The only folder that imports megatron.training. Importing it makes Megatron ready for a machine without CUDA, which has to be
done before any of Megatron's modules is loaded: they look for CUDA as they load.
"""

import gc

from rsa_megatron import megatron_on_cpu
from rsa_megatron.ranks import exit_with_error

try:
    #: whether this process trains on the CPU
    ON_CPU = megatron_on_cpu.enable()
except RuntimeError as error:
    exit_with_error(str(error))

import megatron.core

if not megatron.core.__version__.startswith("0.19."):
    exit_with_error(
        f"megatron-core {megatron.core.__version__} is imported from {list(megatron.core.__path__)[0]}, and this script needs 0.19: "
        "install 'megatron-core[training]>=0.19.2,<0.20', or take another Megatron off PYTHONPATH"
    )

gc.disable()  # what modules define stays: to look for garbage among it again and again is a seventh of the imports' time
import megatron.training.training  # noqa: F401

gc.freeze()  # and what collects later need not look at it either
gc.enable()
