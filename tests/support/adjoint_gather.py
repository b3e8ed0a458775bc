"""The textbook gather: the transposed collective in the backward pass. The oracle of the one without."""

import torch
import torch.distributed


class _AllGather(torch.autograd.Function):
    """forward: AG; backward: AR of the sum, own rows taken."""

    @staticmethod
    def forward(ctx, rows, counts, group):
        ctx.counts, ctx.group = counts, group
        padded = torch.nn.functional.pad(rows, (0, 0, 0, max(counts) - len(rows)))
        gathered = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(gathered, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(gathered, counts)])

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient.split(ctx.counts)[ctx.group.rank()], None, None


def all_gather_with_adjoint(rows: torch.Tensor, counts: list[int], group) -> torch.Tensor:
    """Rows of all ranks, differentiable; counts[r] of them on rank r."""
    return _AllGather.apply(rows, counts, group)
