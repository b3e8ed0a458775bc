"""--rsa-scope global-batch: what an optimizer step's earlier micro-batches leave to the later ones (global_batch_loss.py).

The pooled vectors of all ranks, as numbers: 4 (D + E) bytes a pair, 39 MB for a batch of 2048 pairs of widths 1152 and 3584.

Shapes: N pairs of a micro-batch on all ranks, M_e of the step's micro-batches before it; W width of a pair's vectors.
"""

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from torch import Tensor


class GlobalBatch:
    """The step so far, of one model chunk in training or in evaluation.

    A step is known by its number of micro-batches. In evaluation that is training's, too: the figures there are of as many.
    """

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        """Let the next micro-batch start a step."""
        self._rows: list[Tensor] = []
        self._num_tokens: Tensor | float = 0.0
        self._place = self.num_micro_batches = 0

    def begin_micro_batch(self) -> None:
        """To be called once for each micro-batch: after the step's last one, the next begins a new step."""
        if self._place >= self.num_micro_batches:
            self.forget()
            self.num_micro_batches = _num_micro_batches()
        self._place += 1

    def earlier_rows(self, like_NW: Tensor) -> Tensor:
        """Vectors of the step's micro-batches before this one, [M_e, W]."""
        return torch.cat(self._rows) if self._rows else like_NW[:0]

    def add_rows(self, rows_NW: Tensor) -> None:
        """The vectors of this one, for those after it."""
        self._rows.append(rows_NW)

    def expected_pairs(self) -> float:
        """N of the global batch if the micro-batches to come have as many pairs as those so far: exact if all have equally many."""
        return sum(map(len, self._rows)) * self.num_micro_batches / self._place

    def expected_tokens(self, num_tokens: Tensor) -> Tensor:
        """Return the same estimate for tokens, given this micro-batch's."""
        self._num_tokens = self._num_tokens + num_tokens
        return self._num_tokens * (self.num_micro_batches / self._place)


def _num_micro_batches() -> int:
    try:
        return get_num_microbatches()
    except AttributeError as error:  # there is no calculator
        raise ValueError(
            "--rsa-scope global-batch must know how many micro-batches a step has: call megatron.core.num_microbatches_calculator."
            "init_num_microbatches_calculator, as Megatron's training loop does"
        ) from error
