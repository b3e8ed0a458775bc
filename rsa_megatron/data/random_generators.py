"""Random numbers: what reads data leaves the training's generators as they were."""

import contextlib
import random
from collections.abc import Iterator

import numpy
import torch


@contextlib.contextmanager
def keep_generators() -> Iterator[None]:
    """Give the generators that a process shares (torch's on the CPU and on its GPU, NumPy's, Python's) their states back at the end.

    One tensor-parallel rank reads for all of them, and all must drop the same. A data loader's iterator draws a seed from torch's
    generator on the CPU, which is dropout's too where Megatron runs on the CPU. Without data workers Energon seeds all of them
    for each sample of a task encoder that asks for it, `@stateless(restore_seeds=True)`, and gives those on the CPU back, but
    not that on the GPU. (An encoder that draws without asking would be given the same numbers at each batch.)
    """
    on_gpu = torch.cuda.is_initialized()
    states = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
    gpu_state = torch.cuda.get_rng_state() if on_gpu else None
    try:
        yield
    finally:
        for restore, state in zip((torch.set_rng_state, numpy.random.set_state, random.setstate), states):
            restore(state)
        if on_gpu:
            torch.cuda.set_rng_state(gpu_state)
