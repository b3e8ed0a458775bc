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

With --rsa-scope global-batch (global_batch.py) S_r is this rank's part of the sum S_m over a micro-batch's rows, and the step is
to give sum_m S_m / P^2 with P the pairs of the global batch. Megatron's 1/M is then taken back, and its division by the step's
tokens likewise:
    without   w = max(n, 1) * D * C * M / P^2,  the pair: D * M / P^2
    with      w = sum_m N_m / P^2.
P and sum_m N_m are known after the step's last micro-batch: until then they are what they will be if the micro-batches to come
are like those so far. That is exact where all have the same numbers, and else an estimate that gets better with each.

Context parallelism: each of the C ranks holds a part of the rows of t. t = sum_c s_c / count, every rank adds the
other parts as constants, and (*) becomes a sum over r and c. The tower's output is whole on each of the C ranks,
which would count dL/dv C times: it is scaled by 1/C. Tensor parallelism: with sequence parallelism the parts of
t are added up by a collective whose backward is the identity, as every TP rank computes the same S_r; without it
t is whole on each.

Packed rows: a rank's micro-batch is one row of as many samples as fit. Nothing above counts samples: N of L is the number of pairs in
all ranks' rows, (*) holds however many of them are rank r's, and for a rank without a pair S_r = 0. Ranks differ in their numbers
of rows of v and t alone, which are filled up for the one collective. "with", which packing implies, weighs the micro-batch by the
tokens of its D rows, as it weighs their LM loss: not by its samples, nor by its pairs.

A loss function that has added up loss and tokens over the context-parallel ranks returns, on each of them, C times its part
of the loss and the same n for all. Nothing changes: n is what Megatron divides by, whatever it counts; and per token both the
sum of n and Megatron's own, by which it divides, count each token C times.
"""

from dataclasses import dataclass

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rsa_megatron.alignment.gather import gather_rows
from rsa_megatron.alignment.global_batch_loss import rsa_sums
from rsa_megatron.alignment.loss import RSALossOfRows, rsa_loss_of_rows
from rsa_megatron.config import LayerPair, RSAConfig
from rsa_megatron.hooks.caption_pooling import caption_counts, caption_means, caption_sums
from rsa_megatron.hooks.global_batch import GlobalBatch
from rsa_megatron.hooks.representations import Representations

_NO_PAIRS = 1e-12  # a denominator for "no pairs in the whole step": reports 0 instead of 0/0


@dataclass
class RSATerm:
    """The RSA loss of one micro-batch as one data-parallel rank sees it."""

    #: this rank's rows of each pair of layers: of L, or with a global batch of S_m
    parts: dict[LayerPair, RSALossOfRows]
    #: pairs of all ranks, N, and of this rank
    num_pairs: int
    num_own_pairs: int
    #: pairs of the step's micro-batches before this one
    num_earlier_pairs: int
    #: the step so far, with --rsa-scope global-batch
    global_batch: GlobalBatch | None
    #: positions of a row that hold copies of captions, and the others
    num_copied: int | Tensor
    num_others: int | Tensor

    @property
    def loss(self) -> Tensor:
        """The parts' sum, weighted."""
        return sum(pair.weight * part.loss for pair, part in self.parts.items())


def rsa_term(
    representations: Representations,
    config: RSAConfig,
    model_config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
    global_batch: GlobalBatch | None = None,
) -> RSATerm:
    """Pool, gather, loss: every rank of the last stage must call it for every micro-batch, pairs or not.

    Args:
        global_batch: with --rsa-scope global-batch, the step so far, at this micro-batch.
    """
    samples = representations.samples
    vectors, count_n = _vectors(representations, config, model_config, pg_collection)
    valid_n = (samples.eligible > 0) & (samples.num_tiles > 0) & (count_n > 0)
    # One collective for all vectors; a sample enters the kernels on every rank or on none.
    names, widths = list(vectors), [x.shape[1] for x in vectors.values()]
    rows_nW = torch.cat(list(vectors.values()), dim=1)
    own = dict(zip(names, rows_nW[valid_n].split(widths, dim=1)))
    if representations.is_packed:
        rows_nW, valid_n = _as_many_on_every_rank(rows_nW, valid_n, pg_collection.dp)
    gathered_NW, first_row = gather_rows(rows_nW, valid_n, pg_collection.dp)
    every = dict(zip(names, gathered_NW.split(widths, dim=1)))
    earlier_MW = global_batch.earlier_rows(gathered_NW) if global_batch else gathered_NW[:0]
    earlier = dict(zip(names, earlier_MW.split(widths, dim=1)))
    parts = {}
    for pair in config.layer_pairs:
        v, t = ("vision", pair.vision), ("text", pair.text)
        rows = own[v], own[t], every[v], every[t], first_row
        if global_batch:
            parts[pair] = rsa_sums(*rows, earlier[v], earlier[t], distance=config.distance)
        else:
            parts[pair] = rsa_loss_of_rows(
                *rows, distance=config.distance, normalize=config.normalize, group=pg_collection.dp
            )
    if global_batch:
        global_batch.add_rows(gathered_NW)
    length, num_copied = representations.caption_mask_BL.shape[1], representations.num_copied
    if samples.captions_are_copies:
        # Sequences of the row: each is the caption's tokens and one more (--context-parallel-size is 1 there).
        has_copy_n = (samples.eligible > 0) & (count_n > 0)
        num_copied = ((count_n + 1) * has_copy_n).sum()
    num_own = len(own[names[0]])
    return RSATerm(parts, len(gathered_NW), num_own, len(earlier_MW), global_batch, num_copied, length - num_copied)


def _as_many_on_every_rank(
    rows_nW: Tensor, valid_n: Tensor, group: torch.distributed.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """With rows that are not valid behind them: rows are packed with more samples on one rank than on another."""
    most = torch.tensor(len(rows_nW), device=rows_nW.device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
    missing = int(most) - len(rows_nW)
    return torch.nn.functional.pad(rows_nW, (0, 0, 0, missing)), torch.nn.functional.pad(valid_n, (0, missing))


def _vectors(representations, config, model_config, pg_collection) -> tuple[dict[tuple[str, int], Tensor], Tensor]:
    """v and t of every layer by ("vision" or "text", layer), [n, D] or [n, E], and the number of caption rows, [n]."""
    mask_BL, num_samples = representations.caption_mask_BL, len(representations.samples.eligible)
    count_n = caption_counts(mask_BL, num_samples)
    sums = dict(representations.sums)
    for layer, hidden_LBE in representations.hidden.items():
        sums[layer] = caption_sums(hidden_LBE, mask_BL, num_samples, model_config, pg_collection.tp)
    vectors = {}
    for layer, v_nD in representations.v.items():
        vectors["vision", layer] = _scale_gradient(v_nD, 1 / pg_collection.cp.size())
    for layer, sum_nE in sums.items():
        vectors["text", layer], whole_count_n = caption_means(sum_nE, count_n, pg_collection.cp)
    constant = {name: x.detach() if name[0] == config.stop_gradient else x for name, x in vectors.items()}
    return constant, whole_count_n


def add_to_loss(
    outputs: tuple, term: RSATerm, config: RSAConfig, per_token: bool, pg_collection: ProcessGroupCollection
) -> tuple:
    """What the training script's loss function returned, with weight * w * S_r added (w: the tables above)."""
    loss, *num_tokens, report = outputs
    scale = _scale(num_tokens, term, per_token, pg_collection)
    loss = loss + config.weight * scale * term.loss
    return (loss, *num_tokens, {**report, **_report(term, config, pg_collection.dp.size())})


def _scale(num_tokens: list, term: RSATerm, per_token: bool, pg_collection: ProcessGroupCollection) -> Tensor | float:
    """w of this micro-batch."""
    data_size, context_size = pg_collection.dp.size(), pg_collection.cp.size()
    whole = term.global_batch
    num_micro_batches = whole.num_micro_batches if whole else 1
    if not num_tokens:
        scale = data_size * num_micro_batches
    elif per_token:
        # (Some loss functions return a plain number.)
        scale = torch.as_tensor(num_tokens[0], device=term.loss.device).detach().clone().float()
        torch.distributed.all_reduce(scale, group=pg_collection.dp_cp)
        scale = whole.expected_tokens(scale) if whole else scale
    else:
        tokens = torch.as_tensor(num_tokens[0], device=term.loss.device)
        scale = tokens.clamp(min=1) * (data_size * context_size * num_micro_batches)
    # A step without a pair so far has a loss of 0, whatever the scale.
    return scale / max(whole.expected_pairs(), 1.0) ** 2 if whole else scale


def _report(term: RSATerm, config: RSAConfig, data_size: int) -> dict[str, Tensor]:
    """(numerator, denominator) pairs, which Megatron adds up over micro-batches and the D*C ranks, then divides."""
    share = 1 / data_size  # denominators of the D ranks add up to 1 a micro-batch; the C ranks count alike
    num_own, num_earlier = term.num_own_pairs, term.num_earlier_pairs
    num_distances = num_own * (term.num_pairs - 1 + 2 * num_earlier) + _NO_PAIRS
    if term.global_batch:
        # Ordered pairs of the step, N^2 = sum_m N_m (N_m + 2 N_before): so that the quotient is L of the global batch.
        of_loss, of_pairs = (
            num_own * (term.num_pairs + 2 * num_earlier) + _NO_PAIRS,
            share / term.global_batch.num_micro_batches,
        )
    else:
        of_loss = of_pairs = share
    values = {"rsa loss": (term.loss.detach(), of_loss), "rsa pairs": (num_own, of_pairs)}
    for pair, part in term.parts.items():
        of_layers = f" {pair}" if len(term.parts) > 1 else ""
        if of_layers:
            values[f"rsa loss{of_layers}"] = (part.loss.detach(), of_loss)
        values[f"rsa dist vision{of_layers}"] = (part.distance_sum_v, num_distances)
        values[f"rsa dist text{of_layers}"] = (part.distance_sum_t, num_distances)
    if config.text_source == "caption":
        values["rsa extra positions"] = (term.num_copied, term.num_others)
    return {key: torch.stack([_number(x, term.loss.device) for x in pair]) for key, pair in values.items()}


def _number(x: Tensor | float, device: torch.device) -> Tensor:
    # torch.full, unlike torch.tensor, does not wait for a GPU.
    return x.to(torch.float32) if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float32, device=device)


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor + (x * (1 - factor)).detach()
