"""Imported once, in the process that all others of a test run are forked from: Megatron takes seconds to load."""

import queue

from rsa_megatron import megatron_on_cpu

megatron_on_cpu.enable()

# What torch and Megatron import on first use, each rank anew if it is not here: more than half of a launch.
import megatron.core.models.mimo  # noqa: F401
import megatron.training.training  # noqa: F401
import pretrain_llava_rsa  # noqa: F401
import torch
import torch._dynamo  # noqa: F401
import torch._inductor  # noqa: F401
import torch.distributed.run  # noqa: F401
import transformers.models.llava_onevision.modeling_llava_onevision  # noqa: F401
from megatron.core.dist_checkpointing.strategies import filesystem_async

torch.set_num_threads(1)
torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])

# Ranks write their checkpoints themselves, where --async-save is not asked for. Megatron would still hand the results
# over by a manager, a process of its own that loads Megatron again: 6 CPU seconds in each rank that saves.
filesystem_async._results_queue = queue.Queue()
