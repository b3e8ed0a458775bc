"""ReAlign: text embeddings moved onto the distribution of image embeddings, without training and without pairs.

From "Modality Gap-Driven Subspace Alignment Training Paradigm for MLLMs" (Yu et al. 2026, arXiv 2602.07026), section 4. Two sets
of embeddings of one encoder pair give two means, one scale and one more mean; with these constants any text embedding is moved.
Images stay as they are. All on rows of unit length, in float64:

    e        = row / |row|
    anchor     the texts' mean goes to the images': e - mu_y + mu_x
    trace      their spread, too: mu_x + s (e - mu_y), s = sqrt(T_x / (T_y + epsilon)), T = mean |e - mu|^2
    project    e' = that / its length
    centroid   the projection has moved the mean to mu' = mean e': e' - mu' + mu_x, once
    project    the result

What the spread has to do with it: mean |mu_x + s (e - mu_y)|^2 = |mu_x|^2 + s^2 T_y = |mu_x|^2 + T_x, which is mean |e_x|^2 = 1.
The cloud has the sphere's radius before it is projected, so that the projection moves its mean little. As T = 1 - |mu|^2 for
unit rows (Moments.trace), s is near 1 where the two means are about as long; then the centroid step does the work.

The mean of the result is near mu_x, not equal to it: |mean - mu_x| <= |mu_x - mu'| (Prop. B.19), for the set it was fitted on.

Shapes: N rows, b in a block; D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rsa_megatron.realign.moments import compute_mean
from rsa_megatron.realign.operator import EmbeddingOperator, project
from rsa_megatron.realign.unit_rows import Embeddings, Progress, normalise_rows

__all__ = ["STEPS", "ReAlign", "normalise_rows"]

STEPS = ("anchor", "trace", "centroid")
# Rounding errors of unit rows, some 1e-16 each, have this variance or less.
NO_SPREAD = 1e-28


@dataclass(frozen=True, kw_only=True, eq=False)
class ReAlign(EmbeddingOperator):
    """The paper's operator, fitted; `steps` omits some of it for ablations."""

    method: ClassVar[str] = "realign"
    #: mu', the mean after the first projection of the texts it was fitted on, [D], float64
    projected_mean_D: Tensor
    #: s
    scale: float
    epsilon: float
    steps: tuple[str, ...] = STEPS

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        image_embeddings: Embeddings,
        text_embeddings: Embeddings,
        *,
        epsilon: float = 1e-10,
        steps: Sequence[str] = STEPS,
        group: torch.distributed.ProcessGroup | None = None,
        progress: Progress | None = None,
        about: dict[str, str] | None = None,
    ) -> "ReAlign":
        """Fit in one pass over the images, two over the texts; memory for some vectors and a block.

        Args:
            image_embeddings: [N, D], or an iterable of pieces [n, D] that starts from the beginning each time; rows of any length.
            text_embeddings: the same, [M, D]. The sets need not pair up, nor be equally large.
            epsilon: added to T_y, which is 0 if all texts are equal (1e-10 in the authors' code; the paper gives none).
            steps: those of STEPS to take, in this order. The projections are always taken.
            group: its ranks' embeddings together are the set; a rank may have none. All must call this; all get the same bits.
            progress: wraps an iterable of pieces, given it and what is read.
            about: what the sets are (encoder, data, ...), for the manifest.

        Raises:
            ValueError: rows are zero or not finite (counted, named), fewer than two rows, other widths; on all ranks alike.
        """
        steps = tuple(steps)
        if steps != tuple(step for step in STEPS if step in steps):
            raise ValueError(
                f"steps must be some of {', '.join(STEPS)}, in this order, not {', '.join(map(str, steps))}"
            )
        if not (epsilon >= 0 and math.isfinite(epsilon)):
            raise ValueError(f"epsilon must be 0 or a small positive number, not {epsilon}")
        _, _, fields = cls._fit_moments(image_embeddings, text_embeddings, group=group, progress=progress, about=about)
        scale = compute_trace_scale(fields["image_trace"], fields["text_trace"], epsilon) if "trace" in steps else 1.0
        fields |= dict(scale=scale, epsilon=epsilon, steps=steps)
        before = cls(**fields, projected_mean_D=torch.zeros_like(fields["text_mean_D"]))

        def sum_projected(unit_bD: Tensor) -> Tensor:
            return before.to(unit_bD.device).sum_projected(unit_bD)

        passes = dict(group=group, progress=progress)
        projected_mean_D = compute_mean(
            sum_projected, text_embeddings, "text embeddings, projected", fields["num_texts"], **passes
        )
        return cls(**fields, projected_mean_D=projected_mean_D)

    def shift_and_project(self, unit_bD: Tensor) -> Tensor:
        """Compute e', [b, D]: anchor, trace, project. A row that lands on zero has no direction and stays there."""
        return project(torch.add(self._shift_D, unit_bD, alpha=self.scale))

    def sum_projected(self, unit_bD: Tensor) -> Tensor:
        """Sum e' over the rows, [D], in half the time: no row of e' is stored.

        With e~ = c + s e, |e~|^2 = |c|^2 + 2 s c.e + s^2. Its rounding errors are some 1e-16 of numbers near 1, so that rows near
        zero, where that counts, are computed directly.
        """
        shift_D = self._shift_D
        square_b = torch.mv(unit_bD, shift_D).mul_(2 * self.scale).add_(shift_D @ shift_D + self.scale**2)
        if square_b.amin() < 0.01:
            return self.shift_and_project(unit_bD).sum(0)
        inverse_b = square_b.rsqrt_()
        return torch.mv(unit_bD.T, inverse_b * self.scale).add_(shift_D * inverse_b.sum())

    @property
    def _shift_D(self) -> Tensor:
        """mu_x - s mu_y: anchor and trace are e -> this + s e."""
        return (self.image_mean_D if "anchor" in self.steps else self.text_mean_D) - self.scale * self.text_mean_D

    def move(self, unit_bD: Tensor) -> Tensor:
        projected_bD = self.shift_and_project(unit_bD)
        if "centroid" not in self.steps:
            return projected_bD
        return project(projected_bD.add_(self.image_mean_D - self.projected_mean_D))


def compute_trace_scale(image_trace: float, text_trace: float, epsilon: float) -> float:
    """Compute s = sqrt(T_x / (T_y + epsilon)): a factor of lengths, hence the root. Its square takes T_y to T_x.

    Raises:
        ValueError: all texts are equal and epsilon is 0, or all images are equal.
    """
    if image_trace <= NO_SPREAD:
        raise ValueError(
            "all image embeddings are equal: texts scaled to their spread would be equal, too; fit on other images"
        )
    if not text_trace + epsilon > 0:
        raise ValueError(
            "all text embeddings are equal, and epsilon is 0: there is no spread to scale; pass an epsilon above 0"
        )
    return math.sqrt(image_trace / (text_trace + epsilon))
