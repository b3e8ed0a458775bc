"""Training on Megatron's own pretrain(): the command line, the recipes' settings, the providers, what is logged.

The only folder that imports megatron.training. Importing it makes Megatron ready for a machine without CUDA, which has to be
done before any of Megatron's modules is loaded: they look for CUDA as they load.
"""

import gc
import importlib.util
import re
import sys
from pathlib import Path

from rsa_megatron import screen

if sys.argv[:1] == ["-m"]:  # python -m rsa_megatron.training imports this before the script, and with it what warns
    screen.begin()

from rsa_megatron import megatron_on_cpu  # isort: skip  # both import torch, which takes seconds
from rsa_megatron.ranks import exit_with_error  # isort: skip


def find_megatron() -> tuple[str, str]:
    """Return where megatron-core is imported from, and its version, without importing it."""
    folder = Path(importlib.util.find_spec("megatron.core").submodule_search_locations[0])
    info = folder / "package_info.py"
    numbers = dict(re.findall(r"^(MAJOR|MINOR) = (\d+)", info.read_text() if info.is_file() else "", re.MULTILINE))
    return str(folder), ".".join(numbers.get(part, "?") for part in ("MAJOR", "MINOR"))


_place, _version = find_megatron()
if _version != "0.19":
    exit_with_error(
        f"megatron-core {_version} is imported from {_place}, and this script needs 0.19: "
        "install 'megatron-core[training]>=0.19.2,<0.20', or take another Megatron off PYTHONPATH"
    )

try:
    #: whether this process trains on the CPU
    ON_CPU = megatron_on_cpu.enable()
except RuntimeError as error:
    exit_with_error(str(error))

gc.disable()  # what modules define stays: to look for garbage among it again and again is a seventh of the imports' time
import megatron.training.training  # noqa: F401

gc.freeze()  # and what collects later need not look at it either
gc.enable()
