"""What ReAlign is compared with: text embeddings as they are, shifted, shifted with noise, and with whole covariances matched.

    none         e
    mean-shift   pi(e - mu_y + mu_x)                            one translation (Unicorn)
    c3           pi(e - mu_y + mu_x + sigma n), n ~ N(0, I)     Connect, Collapse, Corrupt (Zhang et al., ICLR 2024)
    blockwise    covariances matched in two blocks              arXiv 2602.07026, appendix F, reported there as a failure

pi divides by the length. All are fitted, applied, saved and loaded as ReAlign is.

Shapes: N rows, b in a block; D width, R rank of a block.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from rsa_megatron.realign.frame import Frame
from rsa_megatron.realign.moments import compute_mean
from rsa_megatron.realign.operator import EmbeddingOperator, project, read_manifest
from rsa_megatron.realign.realign import ReAlign
from rsa_megatron.realign.unit_rows import Embeddings, Progress

# Eigenvalues below this share of the largest are rounding errors of a covariance: its pseudo-inverse omits them.
SMALLEST_SHARE = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class NoAlignment(EmbeddingOperator):
    """Unit rows as they are. Both means are fitted all the same: bad input is found, and the gap is on record."""

    method: ClassVar[str] = "none"

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        image_embeddings: Embeddings,
        text_embeddings: Embeddings,
        *,
        group=None,
        progress: Progress | None = None,
        about=None,
    ):
        """Fit in one pass over each set; arguments and errors as for ReAlign.fit."""
        _, _, fields = cls._fit_moments(image_embeddings, text_embeddings, group=group, progress=progress, about=about)
        return cls(**fields)

    def move(self, unit_bD: Tensor) -> Tensor:
        return unit_bD


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanShift(NoAlignment):
    """The texts' mean to the images', then to the sphere: only ReAlign's first step."""

    method: ClassVar[str] = "mean-shift"

    def move(self, unit_bD: Tensor) -> Tensor:
        return project(unit_bD + (self.image_mean_D - self.text_mean_D))


@dataclass(frozen=True, kw_only=True, eq=False)
class C3(EmbeddingOperator):
    """Mean shift with isotropic noise, in place of what a translation cannot close.

    The noise of a row is a function of the seed and of the row itself: the same in any batch, order, shard or process.
    """

    method: ClassVar[str] = "c3"
    #: standard deviation of each of the D coordinates of the noise, before the projection
    sigma: float
    seed: int

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        image_embeddings: Embeddings,
        text_embeddings: Embeddings,
        *,
        sigma: float = 0.04,
        seed: int = 0,
        group=None,
        progress: Progress | None = None,
        about=None,
    ) -> "C3":
        """Fit in one pass over each set; arguments and errors as for ReAlign.fit.

        Args:
            sigma: noise of length sigma sqrt(D) on rows of length 1: with 0.04, 1.43 at D = 1280 and 0.9 at D = 512. The ReAlign
                paper does not say what it takes. The code of C3's authors takes sqrt(0.016) = 0.126 at D = 512, which is 2.9.
        """
        if not 0 <= sigma < float("inf"):
            raise ValueError(f"sigma={sigma} must be a standard deviation, 0 or above")
        _, _, fields = cls._fit_moments(image_embeddings, text_embeddings, group=group, progress=progress, about=about)
        return cls(**fields, sigma=sigma, seed=seed)

    @torch.no_grad()
    def transform(
        self, text_ND: Tensor, *, dtype: torch.dtype | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Move texts as the others do; a CPU generator, if given, draws the noise instead, different at each call."""
        return self._transform(text_ND, dtype, lambda operator, unit_bD: operator.move(unit_bD, generator))

    def move(self, unit_bD: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise_bD = torch.randn(unit_bD.shape, generator=generator) if generator else self._draw_noise(unit_bD)
        shifted_bD = unit_bD + (self.image_mean_D - self.text_mean_D)
        return project(shifted_bD.add_(noise_bD.to(shifted_bD), alpha=self.sigma))

    def _draw_noise(self, unit_bD: Tensor) -> Tensor:
        noise_bD, generator = torch.empty(unit_bD.shape), torch.Generator()
        # Rounded to float16: the last bit of a row's length, which may depend on the batch, must not change its noise.
        for row, half_D in enumerate(unit_bD.half().cpu().numpy()):
            digest = hashlib.blake2b(
                half_D.tobytes(), digest_size=8, salt=self.seed.to_bytes(8, "little", signed=True)
            ).digest()
            generator.manual_seed(int.from_bytes(digest, "little", signed=True))
            torch.randn(noise_bD.shape[1], generator=generator, out=noise_bD[row])
        return noise_bD


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockwiseCovariance(EmbeddingOperator):
    """Whole covariances matched, in the dominant subspace U of both sets and in its complement V.

        e~ = pi(e - mu_y + mu_x)
        e^ = pi(T_U P_U e~ + T_V P_V e~),   T_W = Cov(P_W e_x)^(1/2) Cov(P_W e_y)^(-1/2)   in each block W
        pi(e^ - mean e^ + mu_x)

    Cov(P_W e_y)^(-1/2) enlarges the directions in which texts vary least, which are mostly noise; shrinkage bounds that. U is the
    frame of decomposition.py: the leading eigenvectors of Cov(e_x) + Cov(e_y).
    """

    method: ClassVar[str] = "blockwise"
    #: T_U P_U + T_V P_V, [D, D], float64
    map_DD: Tensor
    #: mean e^ of the texts it was fitted on, [D], float64
    mapped_mean_D: Tensor
    #: of U
    rank: int
    energy: float
    shrinkage: float

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        image_embeddings: Embeddings,
        text_embeddings: Embeddings,
        *,
        energy: float = 0.99,
        shrinkage: float = 0.01,
        group=None,
        progress: Progress | None = None,
        about=None,
    ) -> "BlockwiseCovariance":
        """Fit in one pass over the images, two over the texts; memory for some matrices [D, D], over ranks one of each rank.

        Args:
            energy: share of the variance that U holds at least. The paper gives none.
            shrinkage: a in (1 - a) S + a (tr S / R) I of each block's covariances S. The paper names shrinkage and gives no a.
        """
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage={shrinkage} must be a share, between 0 and 1")
        passes = dict(group=group, progress=progress)
        image, text, fields = cls._fit_moments(
            image_embeddings, text_embeddings, **passes, about=about, with_scatter=True
        )
        image_DD, text_DD = image.covariance_DD, text.covariance_DD
        frame = Frame.of_covariance(image_DD + text_DD, energy=energy)
        bases = (frame.axes_DD[:, : frame.rank], frame.axes_DD[:, frame.rank :])
        map_DD = sum(_match_covariances(basis_DR, image_DD, text_DD, shrinkage) for basis_DR in bases)
        fields |= dict(map_DD=map_DD, rank=frame.rank, energy=energy, shrinkage=shrinkage)
        before = cls(**fields, mapped_mean_D=torch.zeros_like(fields["text_mean_D"]))

        def sum_mapped(unit_bD: Tensor) -> Tensor:
            return before.to(unit_bD.device).apply_map(unit_bD).sum(0)

        mapped_mean_D = compute_mean(
            sum_mapped, text_embeddings, "text embeddings, mapped", fields["num_texts"], **passes
        )
        return cls(**fields, mapped_mean_D=mapped_mean_D)

    def apply_map(self, unit_bD: Tensor) -> Tensor:
        """Compute e^, [b, D]."""
        return project(project(unit_bD + (self.image_mean_D - self.text_mean_D)) @ self.map_DD.T)

    def move(self, unit_bD: Tensor) -> Tensor:
        return project(self.apply_map(unit_bD).add_(self.image_mean_D - self.mapped_mean_D))


def _match_covariances(basis_DR: Tensor, image_DD: Tensor, text_DD: Tensor, shrinkage: float) -> Tensor:
    """Compute T_W P_W of the block that the columns span, [D, D]."""
    if not basis_DR.shape[1]:
        return torch.zeros_like(image_DD)
    image_RR, text_RR = (
        _shrink_covariance(basis_DR.T @ covariance_DD @ basis_DR, shrinkage) for covariance_DD in (image_DD, text_DD)
    )
    return (
        basis_DR @ _raise_to_power(image_RR, 0.5) @ _raise_to_power(text_RR, -0.5) @ basis_DR.T
    ).contiguous()  # as it will be when loaded


def _shrink_covariance(covariance_RR: Tensor, shrinkage: float) -> Tensor:
    mean_variance = covariance_RR.diagonal().mean()
    return (1 - shrinkage) * covariance_RR + shrinkage * mean_variance * torch.eye(
        len(covariance_RR), dtype=covariance_RR.dtype
    )


def _raise_to_power(covariance_RR: Tensor, exponent: float) -> Tensor:
    """Raise a symmetric matrix to a power by its eigenvalues; those that are 0 stay 0, in inverses as well."""
    eigenvalues_R, axes_RR = torch.linalg.eigh(covariance_RR)
    is_zero_R = eigenvalues_R <= SMALLEST_SHARE * eigenvalues_R[-1]
    return (axes_RR * torch.where(is_zero_R, 0.0, eigenvalues_R.clamp_min(0).pow(exponent))) @ axes_RR.T


METHODS: dict[str, type[EmbeddingOperator]] = {
    operator.method: operator for operator in (NoAlignment, MeanShift, C3, BlockwiseCovariance, ReAlign)
}


def load_operator(folder: str | Path) -> EmbeddingOperator:
    """Load the operator saved in a folder, whatever its method.

    Raises:
        ValueError: not found, or its files are broken.
    """
    method = read_manifest(folder)["method"]
    if method not in METHODS:
        raise ValueError(f"{folder} holds an operator of method {method!r}, which is not one of {', '.join(METHODS)}")
    return METHODS[method].load(folder)
