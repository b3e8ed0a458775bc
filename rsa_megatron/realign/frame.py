"""The fixed frame in which the modality gap is taken apart: U, where both modalities vary, and V (arXiv 2602.07026, section 3).

Shapes: N rows, D width, R rank of the frame.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rsa_megatron.realign.moments import compute_moments
from rsa_megatron.realign.paired_rows import NAMES, check_widths
from rsa_megatron.realign.spectra import leading_rank
from rsa_megatron.realign.unit_rows import Embeddings


@dataclass(frozen=True)
class Frame:
    """The subspace U, of rank R, and its complement V. A basis is one of many: compare projections, not vectors."""

    #: all eigenvectors as columns, in the order of their eigenvalues: the first R span U, the others V
    axes_DD: Tensor
    #: of Cov(e_x) + Cov(e_y), falling
    eigenvalues_D: Tensor
    rank: int

    @classmethod
    @torch.no_grad()
    def of(cls, image_ND: Embeddings, text_ND: Embeddings, *, energy: float = 0.99, rank: int | None = None) -> "Frame":
        """Take the leading eigenvectors of Cov(e_x) + Cov(e_y), each centred on its own mean: the gap itself is not in it.

        Args:
            image_ND: need not pair up with text_ND, nor be as many.
            energy: share of the variance that U holds at least, by as few directions as possible. The paper gives none.
            rank: R itself, instead of energy.

        Raises:
            ValueError: for rows that have no direction, widths that differ, or no variance.
        """
        image, text = (compute_moments(x, name, with_scatter=True) for x, name in zip((image_ND, text_ND), NAMES))
        check_widths(image.mean_D, text.mean_D)
        return cls.of_covariance(image.covariance_DD + text.covariance_DD, energy=energy, rank=rank)

    @classmethod
    def of_covariance(cls, covariance_DD: Tensor, *, energy: float = 0.99, rank: int | None = None) -> "Frame":
        """Take them from the sum of the two covariances of unit rows."""
        width = len(covariance_DD)
        if rank is not None and not 0 < rank <= width:
            raise ValueError(f"rank={rank}: a frame in {width} dimensions has a rank of 1 to {width}")
        if not 0 < energy <= 1:
            raise ValueError(f"energy={energy} must be a share of the variance, above 0 and at most 1")
        rising_D, axes_DD = torch.linalg.eigh(covariance_DD)
        eigenvalues_D = rising_D.flip(0).clamp_min(0.0)
        least = leading_rank(eigenvalues_D, energy)  # rejects a spectrum of zeros, whatever the rank
        return cls(axes_DD.flip(1), eigenvalues_D, rank or least)

    @property
    def basis_DR(self) -> Tensor:
        return self.axes_DD[:, : self.rank]

    @property
    def energy(self) -> float:
        """The share of the variance that U holds."""
        return (self.eigenvalues_D[: self.rank].sum() / self.eigenvalues_D.sum()).item()

    def project_onto_u(self, x_ND: Tensor) -> Tensor:
        """Compute P_U x of rows, or of one vector."""
        return (x_ND @ self.basis_DR) @ self.basis_DR.T

    def project_onto_v(self, x_ND: Tensor) -> Tensor:
        """Compute P_V x = x - P_U x."""
        return x_ND - self.project_onto_u(x_ND)

    def check_width(self, x_D: Tensor) -> None:
        """Raise ValueError unless the frame is one of this space."""
        if len(x_D) != len(self.axes_DD):
            raise ValueError(
                f"the frame has width {len(self.axes_DD)} and the embeddings {len(x_D)}: use a frame of the same encoder"
            )
