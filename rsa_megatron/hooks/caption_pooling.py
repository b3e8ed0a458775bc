"""t, the mean over a caption's rows, whose parts lie on the ranks that share a sequence (paper, eq. 2).

Sums add up, means do not: each rank sums over its own rows, and the division by the count stands at the end.

Shapes: B rows, n samples (B of them, or those packed into one row), L positions of this rank's part, width E.
"""

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rsa_megatron.alignment.pooling import pool_packed_text, pool_text


def sequence_shards(model_config: TransformerConfig, tp: torch.distributed.ProcessGroup) -> int:
    """Tensor-parallel ranks that share a sequence: all under sequence parallelism, else each has it whole."""
    return tp.size() if model_config.sequence_parallel else 1


def caption_vectors(
    hidden_LBE: Tensor, mask_BL: Tensor, model_config: TransformerConfig, pg_collection: ProcessGroupCollection
) -> tuple[Tensor, Tensor]:
    """t_i and the number of its rows, [B, E] and [B]: whole on every rank, with gradient to its own rows.

    Args:
        hidden_LBE: a decoder layer's output: this rank's part of the sequence.
        mask_BL: 1 where a row counts: this context-parallel rank's part, of all its tensor-parallel ranks.
    """
    sum_BE = caption_sums(hidden_LBE, mask_BL, hidden_LBE.shape[1], model_config, pg_collection.tp)
    return caption_means(sum_BE, caption_counts(mask_BL, hidden_LBE.shape[1]), pg_collection.cp)


def caption_sums(
    hidden_LBE: Tensor,
    mask_BL: Tensor,
    num_samples: int,
    model_config: TransformerConfig,
    tp: torch.distributed.ProcessGroup,
) -> Tensor:
    """Sums over the rows of this context-parallel rank, [n, E] float32, the same on each of its tensor-parallel ranks.

    Args:
        mask_BL: where n differs from B, one row holds n packed samples: s where a row counts for sample s = 1 .. n.
    """
    local_length = hidden_LBE.shape[0]
    num_shards = sequence_shards(model_config, tp)
    mask_BL = torch.nn.functional.pad(mask_BL, (0, local_length * num_shards - mask_BL.shape[1]))
    own_start = tp.rank() * local_length if model_config.sequence_parallel else 0
    own_mask_BL = mask_BL[:, own_start : own_start + local_length]
    if num_samples == hidden_LBE.shape[1]:
        sum_nE = pool_text(hidden_LBE, own_mask_BL)
    else:
        sum_nE = pool_packed_text(hidden_LBE[:, 0], own_mask_BL[0].long(), num_samples)
    if model_config.sequence_parallel:
        # Its backward is the identity: each tensor-parallel rank computes the same loss from the whole sum.
        sum_nE = reduce_from_tensor_model_parallel_region(sum_nE, group=tp)
    return sum_nE


def caption_counts(mask_BL: Tensor, num_samples: int) -> Tensor:
    """How many rows of this context-parallel rank count for each sample, [n] float32."""
    if num_samples == mask_BL.shape[0]:
        return mask_BL.sum(dim=1, dtype=torch.float32)
    sample_n = torch.arange(1, num_samples + 1, device=mask_BL.device)
    return (mask_BL == sample_n[:, None]).sum(dim=1, dtype=torch.float32)


def caption_means(sum_nE: Tensor, count_n: Tensor, cp: torch.distributed.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The means and their counts, the parts of all context-parallel ranks in them; the gradient goes to the own part."""
    if cp.size() > 1:
        payload = torch.cat([sum_nE.detach(), count_n[:, None]], dim=1)
        torch.distributed.all_reduce(payload, group=cp)
        count_n = payload[:, -1]
        sum_nE = sum_nE + (payload[:, :-1] - sum_nE).detach()
    return sum_nE / count_n.clamp(min=1)[:, None], count_n
