"""The image vectors' way through the pipeline: a few extra rows at the end of the hidden state.

v is made on the first stage, the loss on the last. Between stages Megatron sends one tensor [S, B, H] forward
and its gradient back. v is appended to it as K rows a sample and taken off again before any layer sees them, so
that Megatron's own backward pass brings dL/dv to the first stage, in any schedule.

One row of numbers a sample: [hi | lo | id], cut into rows of width H.
    hi, lo  v in the pipeline's type, and what that rounding lost. hi alone keeps 8 bits of v in bf16, and the
            distance of two nearby vectors is a difference in which those are gone; hi + lo keeps 16. The
            gradient goes through hi alone: lo is a constant. An fp32 pipeline needs no lo.
    id      the 8 bytes of the sample's id, each exact even in bf16, so that the last stage can tell whether it
            reads the same samples as the first.

Shapes: B samples, D width of v, H width of the hidden state, K rows.
"""

import math

import torch
from torch import Tensor

_NUM_ID_BYTES = 8


def num_rows(vector_width: int, hidden_width: int, dtype: torch.dtype) -> int:
    """K: how many rows of width H carry a vector of width D and its sample id."""
    return math.ceil((vector_width * _num_parts(dtype) + _NUM_ID_BYTES) / hidden_width)


def pack(v_BD: Tensor, sample_id_B: Tensor, hidden_width: int, dtype: torch.dtype) -> Tensor:
    """Rows to append, [K, B, H] in `dtype`; differentiable with respect to v."""
    v_BD = v_BD.float()
    hi_BD = v_BD.to(dtype)
    parts = [hi_BD]
    if _num_parts(dtype) == 2:
        parts.append((v_BD - hi_BD.float()).detach().to(dtype))
    shifts = torch.arange(0, 8 * _NUM_ID_BYTES, 8, device=sample_id_B.device)
    parts.append(((sample_id_B[:, None] >> shifts) & 255).to(dtype))
    row_BF = torch.cat(parts, dim=1)
    k = num_rows(v_BD.shape[1], hidden_width, dtype)
    row_BF = torch.nn.functional.pad(row_BF, (0, k * hidden_width - row_BF.shape[1]))
    return row_BF.view(-1, k, hidden_width).transpose(0, 1)


def unpack(rows_KBH: Tensor, vector_width: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`: v, [B, D] in float32 and differentiable, and the sample ids, [B]."""
    num_parts = _num_parts(rows_KBH.dtype)
    row_BF = rows_KBH.transpose(0, 1).flatten(1)
    v_BD = row_BF[:, :vector_width].float()
    if num_parts == 2:
        v_BD = v_BD + row_BF[:, vector_width : 2 * vector_width].detach().float()
    id_bytes = row_BF[:, num_parts * vector_width :][:, :_NUM_ID_BYTES].detach().long()
    shifts = torch.arange(0, 8 * _NUM_ID_BYTES, 8, device=rows_KBH.device)
    return v_BD, (id_bytes << shifts).sum(dim=1)


def _num_parts(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.float32 else 2
