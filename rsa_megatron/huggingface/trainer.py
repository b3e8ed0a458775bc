"""RSATrainerMixin: the RSA loss in transformers' Trainer, beside its own loss.

The gradient's scale. Write D for the ranks, M for the step's micro-batches (gradient_accumulation_steps, fewer at an epoch's end);
L_m is the RSA loss of micro-batch m over all ranks, S_rm the sum over rank r's own rows: L_m = sum_r S_rm, and `rsa_loss_of_rows`
gives S_rm the gradient dL_m/d(own rows), so that
    sum_r dS_rm/dtheta = dL_m/dtheta.                                                                     (*)
What compute_loss returns, l_rm, reaches theta as
    1/D sum_r sum_m 1/Q dl_rm/dtheta:
DDP, FSDP and DeepSpeed average over the ranks, and Q = M where the Trainer divides by the micro-batches, or 1 where it does not: then
the model (or compute_loss_func) has divided its sum of losses by num_items_in_batch, the tokens of the whole step. With a term
w S_rm in l_rm and
    w = D Q / M        1/D sum_rm w/Q dS_rm = 1/M sum_m dL_m by (*):
the mean over micro-batches, so that the weight does not depend on D, M or the number of tokens. What the Trainer does to the LM loss for
the ranks' sake (average_tokens_across_devices: times D, its tokens being those of all ranks) is over when the term is added.

With scope="global-batch" S_rm is a part of the sum over the pairs of the whole step (alignment/global_batch_loss.py), which is to count
1/P^2: w = D Q / P^2. P, the pairs of the step, is known after its last micro-batch; until then it is what it will be if the micro-batches
to come are like those so far, exact where all have as many.

Shapes: B samples of a rank, n of them its pairs, N those of all ranks; S positions; D and E widths of v and t.
"""

import torch
import torch.distributed
from torch import Tensor
from transformers.utils import logging

from rsa_megatron.alignment.global_batch_loss import rsa_sums
from rsa_megatron.alignment.loss import rsa_loss_of_rows
from rsa_megatron.config import RSAConfig
from rsa_megatron.huggingface.families import Family, find_model
from rsa_megatron.huggingface.pairs import Pairs, count_ranks, gather_pairs, read_pairs, read_states
from rsa_megatron.huggingface.steps import Steps

logger = logging.get_logger(__name__)

#: columns of a data set, or keys of a batch, that are RSA's own
_COLUMNS = ("rsa_eligible", "rsa_caption_mask")


class RSATrainerMixin:
    """Adds weight * L_RSA to the loss of a Trainer: `class MyTrainer(RSATrainerMixin, Trainer)`, the mixin first.

    Args:
        rsa: the settings; weight=0 is the Trainer without RSA, bit for bit.
        rsa_family: for a model that FAMILIES does not list.
        *args, **kwargs: the Trainer's own.

    By default every sample with exactly one image is a pair, and its caption is all tokens whose label is not -100. A batch may say
    otherwise: `rsa_eligible`, [B], 1 for a sample that may take part, and `rsa_caption_mask`, [B, S], 1 where the token AT a position is
    the caption's. The model gets neither. In evaluation and generation nothing is read.

    Logs `lm_loss` (of `loss`, what is not RSA's), `rsa_loss`, `rsa_pairs` (of a kernel) and, for each cause that has left samples out since
    the last line, `rsa_left_out_<cause>`, their number on all ranks.

    Raises:
        ValueError: for settings, a model or a layout of ranks with which RSA would not be right.
    """

    def __init__(self, *args, rsa: RSAConfig | None = None, rsa_family: Family | None = None, **kwargs):
        self.rsa, self.rsa_family = rsa or RSAConfig(), rsa_family
        self._rsa_steps = Steps(is_global=self.rsa.scope == "global-batch")
        self._rsa_said = set()
        super().__init__(*args, **kwargs)
        if self.rsa.weight:
            _check_settings(self.rsa)
            _check_ranks(self)
            find_model(self.model, rsa_family)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        batch, inputs = dict(inputs), _without_columns(inputs)  # the Trainer may take labels out of the latter
        options = dict(return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs)
        if not (self.rsa.weight and model.training):
            return super().compute_loss(model, inputs, **options)
        inner, family = find_model(model, self.rsa_family)
        with read_states(inner, family) as states:
            result = super().compute_loss(model, inputs, **options)
        loss, *outputs = result if return_outputs else (result,)
        pairs = read_pairs(inner, family, states, batch, self.rsa)
        loss = loss + self._rsa_term(pairs, loss.device, num_items_in_batch)
        return (loss, *outputs) if return_outputs else loss

    def _rsa_term(self, pairs: Pairs, device: torch.device, num_items_in_batch) -> Tensor:
        """weight * w * S_rm. Every rank must call it for every micro-batch, pairs or not."""
        config, steps = self.rsa, self._rsa_steps
        num_ranks, num_micro_batches, divisor = count_ranks(), self._rsa_micro_batches(), 1
        if not self._rsa_is_scaled(num_items_in_batch):
            divisor = num_micro_batches
        self._rsa_say_what_is_frozen(pairs)
        steps.begin_micro_batch(self.state.global_step)
        v_nD, t_nE = (x if x is None else x.to(device) for x in (pairs.v_nD, pairs.t_nE))
        v_nD, t_nE, v_ND, t_NE, first_row = gather_pairs(v_nD, t_nE)
        if config.scope == "global-batch":
            part = rsa_sums(v_nD, t_nE, v_ND, t_NE, first_row, *steps.earlier(v_ND, t_NE), distance=config.distance)
            steps.add_rows(v_ND, t_NE)
            scale = num_ranks * divisor / max(steps.expected_pairs(num_micro_batches), 1) ** 2
        else:
            group = torch.distributed.group.WORLD if num_ranks > 1 else None
            settings = dict(distance=config.distance, normalize=config.normalize, group=group)
            part = rsa_loss_of_rows(v_nD, t_nE, v_ND, t_NE, first_row, **settings)
            scale = num_ranks * divisor / num_micro_batches
        term = config.weight * scale * part.loss
        steps.add_figures(part, term / (divisor * num_ranks), len(v_nD), pairs.left_out)
        return term

    def _rsa_micro_batches(self) -> int:
        """M of the step that is under way."""
        return getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)

    def _rsa_is_scaled(self, num_items_in_batch) -> bool:
        """Whether the Trainer takes the loss for one of the whole step, and does not divide it by M."""
        stated = getattr(self, "loss_is_scaled_for_ga", None)
        if stated is not None:
            return stated
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or getattr(self, "compute_loss_func", None) is not None

    def _rsa_say_what_is_frozen(self, pairs: Pairs) -> None:
        sides = {"vision": pairs.v_nD, "text": pairs.t_nE}
        for side, x in sides.items():
            if x is not None and len(x) and not x.requires_grad and side != self.rsa.stop_gradient:
                self._rsa_say(
                    side,
                    f"RSA gives the {side} side no gradient: nothing that trains lies before its states (frozen, or adapters elsewhere)",
                )

    def _rsa_say(self, what: str, message: str) -> None:
        if what not in self._rsa_said and self.is_world_process_zero():
            logger.warning(message)
        self._rsa_said.add(what)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and (figures := self._rsa_steps.take()):
            logs["lm_loss"] = logs["loss"] - figures.pop("added")
            if figures.pop("most_pairs") < 2:
                self._rsa_say(
                    "pairs",
                    f"RSA is on (weight {self.rsa.weight:g}), but since the last line no two pairs could be compared: look for samples with exactly one "
                    'image and labels, take larger batches or more ranks, or RSAConfig(scope="global-batch")',
                )
            logs.update(figures)
        super().log(logs, *args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        return super().prediction_step(model, _without_columns(inputs), *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # remove_unused_columns would take them off the data set.
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *_COLUMNS]))


def _without_columns(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if name not in _COLUMNS}


def _check_settings(config: RSAConfig) -> None:
    refused = {
        "layers": (config.layers != "-1:-1", "only the last layers are read: leave it at -1:-1"),
        "text_source": (config.text_source != "sequence", "captions are read in their sequence: leave it at sequence"),
        "base_tile": (config.base_tile != "first", "where the base image lies follows from the model: leave it out"),
        "normalize": (
            config.normalize != "none" and config.scope == "global-batch",
            "the mean distance of a global batch is not known before its last micro-batch: leave it, or scope, out",
        ),
    }
    for name, (is_refused, reason) in refused.items():
        if is_refused:
            raise ValueError(f"RSAConfig({name}={getattr(config, name)!r}) in a Trainer: {reason}")


def _check_ranks(trainer: RSATrainerMixin) -> None:
    """Each rank must have samples of its own."""
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"RSA in a Trainer does not follow torch.nn.DataParallel ({trainer.args.n_gpu} GPUs in one process): start with torchrun"
        )
    for kind, name in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
        if (size := getattr(trainer, f"get_{kind}_size", lambda: 1)()) > 1:
            raise ValueError(
                f"RSA in a Trainer is for data-parallel ranks: {name} parallelism ({kind}_size={size}) must be 1"
            )
