"""Dropout of text embeddings under sequence parallelism, where LLaVAModel's gives a wrong gradient."""

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from torch import Tensor


class SharedDropout(torch.nn.Dropout):
    """Drops the same on all tensor-parallel ranks.

    Under sequence parallelism GPT's embedding drops with numbers of each rank's own, for each rank has positions of its own.
    LLaVAModel scatters them later, after the splice: here each rank has all positions, passes some of them on, and is given
    the gradients of all, also where another rank has decided what to drop.
    """

    def forward(self, embeddings: Tensor) -> Tensor:
        with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):
            return super().forward(embeddings)
