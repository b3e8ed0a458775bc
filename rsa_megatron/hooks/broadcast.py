"""A batch's tensors from the tensor-parallel rank that has read them to the ranks that share the layer.

Megatron's own broadcast_data takes a tensor with a dimension of size 0 for one of fewer dimensions, which a batch
without images has.
"""

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor

_MAX_DIMS = 5


def broadcast_tensors(
    names: Sequence[str], tensors: dict[str, Tensor] | None, dtype: torch.dtype, group: torch.distributed.ProcessGroup
) -> dict[str, Tensor]:
    """The named tensors on every rank of the group, on its device, as `dtype`; shapes may change from call to call.

    Args:
        tensors: on rank 0 of the group, of at most 5 dimensions, on any device and of any type that dtype can hold;
            None elsewhere.
    """
    device = torch.device(torch.cuda.current_device())
    if group.rank() == 0:
        own = {name: tensors[name].to(device, dtype, non_blocking=True) for name in names}
        if group.size() == 1:
            return own
    source = torch.distributed.get_process_group_ranks(group)[0]
    shapes = torch.full((len(names), _MAX_DIMS), -1, dtype=torch.int64)
    if group.rank() == 0:
        for row, tensor in zip(shapes, own.values()):
            row[: tensor.dim()] = torch.tensor(tensor.shape)
    shapes = shapes.to(device)
    torch.distributed.broadcast(shapes, source, group=group)
    sizes = [torch.Size(size for size in row if size >= 0) for row in shapes.tolist()]
    lengths = [size.numel() for size in sizes]
    if group.rank() == 0:
        parts = [tensor.reshape(-1) for tensor in own.values()]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)  # the images are sent as they lie
    else:
        flat = torch.empty(sum(lengths), dtype=dtype, device=device)
    torch.distributed.broadcast(flat, source, group=group)
    return {name: part.view(size) for name, part, size in zip(names, flat.split(lengths), sizes)}
