"""From the two representations of a micro-batch to its RSA term in Megatron's loss (paper, eq. 6).

The gradient scale. Write D, C for the data- and context-parallel sizes, M for micro-batches, n for the tokens
of this rank's micro-batch; L is the RSA loss of the micro-batch over all D ranks, S_r the sum over rank r's own
rows: L = sum_r S_r, and `rsa_loss_of_rows` gives S_r the gradient dL/d(own rows), so that over the ranks
    sum_r dS_r/dtheta = dL/dtheta.                                                                        (*)

Megatron takes (loss_sum, n, report) from the loss function and
    without --calculate-per-token-loss  divides by max(n, 1) and M; the gradients of all D*C ranks are averaged
    with it                             adds up the D*C ranks' gradients and divides by all tokens of the step.
A term w * S_r in loss_sum therefore reaches theta as
    without   1/(D C) sum_r w / (max(n, 1) M) dS_r/dtheta   ->  w = max(n, 1) * D * C   gives  1/M dL/dtheta by (*)
    with      sum_r w dS_r/dtheta / sum_m N_m               ->  w = N_m = sum of n over the D*C ranks
              gives sum_m N_m dL_m / sum_m N_m: the mean over micro-batches weighted by tokens, as the LM loss has it.
The old pair (loss, report): Megatron multiplies by C, divides by M and averages: w = D.

A sum over micro-batches of L means that --rsa-weight does not depend on D, C, M or the sequence length.

Context parallelism: each of the C ranks holds a part of the rows of t. t = sum_c s_c / count, every rank adds the
other parts as constants, and (*) becomes a sum over r and c. The tower's output is whole on each of the C ranks,
which would count dL/dv C times: it is scaled by 1/C. Tensor parallelism: with sequence parallelism the parts of
t are added up by a collective whose backward is the identity, as every TP rank computes the same S_r; without it
t is whole on each.
"""

from dataclasses import dataclass

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rsa_megatron.alignment.gather import gather_rows
from rsa_megatron.alignment.loss import RSALossOfRows, rsa_loss_of_rows
from rsa_megatron.alignment.pooling import pool_text
from rsa_megatron.config import RSAConfig
from rsa_megatron.llava.taps import Representations

_NO_PAIRS = 1e-12  # a denominator for "no pairs in the whole step": reports 0 instead of 0/0


@dataclass
class RSATerm:
    """The RSA loss of one micro-batch as one data-parallel rank sees it."""

    parts: RSALossOfRows
    #: pairs of all ranks, N, and of this rank
    num_pairs: int
    num_own_pairs: int
    #: positions of a row that hold copies of captions, and the others
    num_copied: int
    num_others: int


def rsa_term(
    representations: Representations,
    config: RSAConfig,
    model_config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
) -> RSATerm:
    """Pool, gather, loss: every rank of the last stage must call it for every micro-batch, pairs or not."""
    samples = representations.samples
    t_BE, count_B = caption_vectors(
        representations.hidden_LBE, representations.caption_mask_BL, model_config, pg_collection
    )
    v_BD = _scale_gradient(representations.v_BD, 1 / pg_collection.cp.size())
    if config.stop_gradient == "vision":
        v_BD = v_BD.detach()
    if config.stop_gradient == "text":
        t_BE = t_BE.detach()
    valid_B = (samples.eligible > 0) & (samples.num_tiles > 0) & (count_B > 0)
    # One collective for both vectors; a sample enters the kernels on every rank or on none.
    gathered_ND, first_row = gather_rows(torch.cat([v_BD, t_BE], dim=1), valid_B, pg_collection.dp)
    v_ND, t_NE = gathered_ND.split([v_BD.shape[1], t_BE.shape[1]], dim=1)
    own_v_nD, own_t_nE = v_BD[valid_B], t_BE[valid_B]
    parts = rsa_loss_of_rows(
        own_v_nD,
        own_t_nE,
        v_ND,
        t_NE,
        first_row,
        distance=config.distance,
        normalize=config.normalize,
        group=pg_collection.dp,
    )
    length, num_copied = representations.caption_mask_BL.shape[1], representations.num_copied
    return RSATerm(parts, v_ND.shape[0], own_v_nD.shape[0], num_copied, length - num_copied)


def add_to_loss(
    outputs: tuple, term: RSATerm, config: RSAConfig, per_token: bool, pg_collection: ProcessGroupCollection
) -> tuple:
    """What the training script's loss function returned, with weight * w * S_r added (w: the table above)."""
    loss, *num_tokens, report = outputs
    data_size, context_size = pg_collection.dp.size(), pg_collection.cp.size()
    if not num_tokens:
        scale = data_size
    elif per_token:
        scale = num_tokens[0].detach().clone().float()
        torch.distributed.all_reduce(scale, group=pg_collection.dp_cp)
    else:
        scale = num_tokens[0].clamp(min=1) * (data_size * context_size)
    loss = loss + config.weight * scale * term.parts.loss
    return (loss, *num_tokens, {**report, **_report(term, config, data_size)})


def _report(term: RSATerm, config: RSAConfig, data_size: int) -> dict[str, Tensor]:
    """(numerator, denominator) pairs, which Megatron adds up over micro-batches and the D*C ranks, then divides."""
    parts = term.parts
    share = 1 / data_size  # denominators of the D ranks add up to 1 a micro-batch; the C ranks count alike
    num_distances = term.num_own_pairs * (term.num_pairs - 1) + _NO_PAIRS
    values = {
        "rsa loss": (parts.loss.detach(), share),
        "rsa pairs": (term.num_own_pairs, share),
        "rsa dist vision": (parts.distance_sum_v, num_distances),
        "rsa dist text": (parts.distance_sum_t, num_distances),
    }
    if config.text_source == "caption":
        values["rsa extra positions"] = (term.num_copied, term.num_others)
    return {
        key: torch.stack([torch.as_tensor(x, dtype=torch.float32, device=parts.loss.device) for x in pair])
        for key, pair in values.items()
    }


def caption_vectors(
    hidden_LBE: Tensor, mask_BL: Tensor, model_config: TransformerConfig, pg_collection: ProcessGroupCollection
) -> tuple[Tensor, Tensor]:
    """t_i, the mean over the masked rows, and their number: whole on every rank, with gradient to its own rows.

    Args:
        hidden_LBE: the decoder's output: this rank's part of the sequence.
        mask_BL: 1 where a row counts: this context-parallel rank's part, of all its tensor-parallel ranks.
    """
    local_length, tp = hidden_LBE.shape[0], pg_collection.tp
    num_shards = tp.size() if model_config.sequence_parallel else 1
    mask_BL = torch.nn.functional.pad(mask_BL, (0, local_length * num_shards - mask_BL.shape[1]))
    own_start = tp.rank() * local_length if model_config.sequence_parallel else 0
    sum_BE = pool_text(hidden_LBE, mask_BL[:, own_start : own_start + local_length])
    count_B = mask_BL.sum(dim=1, dtype=torch.float32)
    if model_config.sequence_parallel:
        sum_BE = reduce_from_tensor_model_parallel_region(sum_BE, group=tp)
    if pg_collection.cp.size() > 1:
        payload = torch.cat([sum_BE.detach(), count_B[:, None]], dim=1)
        torch.distributed.all_reduce(payload, group=pg_collection.cp)
        count_B = payload[:, -1]
        sum_BE = sum_BE + (payload[:, :-1] - sum_BE).detach()
    return sum_BE / count_B.clamp(min=1)[:, None], count_B


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor + (x * (1 - factor)).detach()
