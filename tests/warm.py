"""Imported once, in the process that all others of a test run are forked from: Megatron takes seconds to load."""

from rsa_megatron import megatron_on_cpu

megatron_on_cpu.enable()

import megatron.training.training  # noqa: F401
import pretrain_llava_rsa  # noqa: F401
import torch

torch.set_num_threads(1)
