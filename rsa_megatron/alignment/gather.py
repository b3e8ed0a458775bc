"""Rows of all data-parallel ranks on each of them, in one collective; the backward pass has none.

Shapes: B samples a rank (the same on every rank), n of them valid; N valid samples in all; W width.
"""

import torch
import torch.distributed
from torch import Tensor


def gather_rows(rows_BW: Tensor, valid_B: Tensor, group: torch.distributed.ProcessGroup) -> tuple[Tensor, int]:
    """forward: one AG of [B, W + 1]; backward: none (the result is detached).

    Every rank of the group must call this the same number of times, with the same B and W; a rank without a
    valid row sends none and still takes part, so that ragged counts cannot hang.

    Returns:
        The valid rows of all ranks, [N, W], in the order of ranks; and where this rank's own begin in them.
    """
    payload_BW = torch.cat([rows_BW.detach(), valid_B[:, None].to(rows_BW.dtype)], dim=1)
    world_size, rank = group.size(), group.rank()
    gathered = payload_BW.new_empty(world_size * payload_BW.shape[0], payload_BW.shape[1])
    torch.distributed.all_gather_into_tensor(gathered, payload_BW, group=group)
    is_valid = gathered[:, -1] > 0
    first_row = int(is_valid[: rank * payload_BW.shape[0]].sum())
    return gathered[is_valid, :-1], first_row
