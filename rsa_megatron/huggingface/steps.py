"""What a Trainer's optimizer steps leave behind: rows for the step's later micro-batches, and the figures of the log."""

import torch
import torch.distributed
from torch import Tensor

from rsa_megatron.alignment.loss import RSALossOfRows
from rsa_megatron.huggingface.pairs import CAUSES, count_ranks


class Steps:
    """The step under way, micro-batch by micro-batch, and the figures of the steps since the last line of the log."""

    def __init__(self, is_global: bool):
        self._is_global, self._step = is_global, None
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._figures: list[Tensor] = []
        self._sums: Tensor | None = None
        self._num_steps = 0

    def begin_micro_batch(self, step: int) -> None:
        if step != self._step:
            self._end_step()
            self._step = step

    def earlier(self, v_ND: Tensor, t_NE: Tensor) -> tuple[Tensor, Tensor]:
        """v and t of the step's micro-batches before this one."""
        return tuple(torch.cat(x) for x in zip((v_ND[:0], t_NE[:0]), *self._rows))

    def add_rows(self, v_ND: Tensor, t_NE: Tensor) -> None:
        self._rows.append((v_ND, t_NE))

    def expected_pairs(self, num_micro_batches: int) -> float:
        return sum(len(v_ND) for v_ND, _ in self._rows) * num_micro_batches / len(self._rows)

    def add_figures(self, part: RSALossOfRows, added: Tensor, num_pairs: int, left_out: list[Tensor]) -> None:
        """Of this rank; kept as sums over the ranks, so that any of them may log alone."""
        numbers = [part.loss, added, torch.tensor(num_pairs), *left_out]
        figures = torch.stack([x.detach().to(part.loss.device, torch.float32) for x in numbers])
        if count_ranks() > 1:
            torch.distributed.all_reduce(figures)
        self._figures.append(figures)

    def take(self) -> dict[str, float]:
        """The figures since the last call, a mean over steps, and forget them; empty if there are none."""
        self._end_step()
        if not self._num_steps:
            return {}
        loss, pairs, most_pairs, added, *left_out = self._sums.tolist()
        steps = self._num_steps
        self._sums, self._num_steps = None, 0
        figures = {
            "rsa_loss": loss / steps,
            "rsa_pairs": pairs / steps,
            "most_pairs": most_pairs,
            "added": added / steps,
        }
        return figures | {f"rsa_left_out_{cause}": n for cause, n in zip(CAUSES, left_out) if n}

    def _end_step(self) -> None:
        if self._figures:
            of_step = torch.stack(self._figures)
            loss, added, pairs, *_ = of_step.unbind(dim=1)
            if self._is_global:
                num_pairs = most = pairs.sum()
                loss = loss.sum() / num_pairs.clamp(min=1) ** 2
            else:
                loss, num_pairs, most = loss.mean(), pairs.mean(), pairs.max()
            sums = torch.cat([torch.stack([loss, num_pairs, most, added.sum()]), of_step[:, 3:].sum(dim=0)])
            if self._sums is not None:
                most = torch.maximum(most, self._sums[2])
                sums = sums + self._sums
                sums[2] = most
            self._sums = sums
            self._num_steps += 1
        self._figures, self._rows = [], []
