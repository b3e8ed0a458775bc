"""What operators that move text embeddings have in common: applied in blocks, saved as a folder.

    FOLDER/manifest.json           the method, its numbers, and what it was fitted on
    FOLDER/METHOD.safetensors      its vectors, float64

The numbers of the manifest have all their digits: an operator that was saved and loaded gives the same bits.

Shapes: N rows, b in a block; D width.
"""

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rsa_megatron import atomic
from rsa_megatron.realign.moments import Moments, compute_moments
from rsa_megatron.realign.unit_rows import Embeddings, Progress, RowFaults, iterate_unit_blocks

MANIFEST = "manifest.json"
# A sum of unit vectors shorter than this has no direction: its rounding errors of some 1e-16 turn it by more than 1e-6, and
# the epsilon of ReAlign's scale by anything.
NO_DIRECTION = 1e-10


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddingOperator(ABC):
    """Moves text embeddings with constants that were fitted once on two sets that need not pair up; images stay."""

    #: names the method in commands, manifests and tables
    method: ClassVar[str]
    #: mean unit row of the images and of the texts, [D], float64
    image_mean_D: Tensor
    text_mean_D: Tensor
    #: mean squared distance of the unit rows from these, divided by N
    image_trace: float
    text_trace: float
    num_images: int
    num_texts: int
    #: what it was fitted on, as the user specified it: encoder, data, ...
    about: dict[str, str] = field(default_factory=dict)

    @abstractmethod
    def move(self, unit_bD: Tensor) -> Tensor:
        """Move unit rows of text, [b, D], float64; rows of the result have length 1, or 0 if they have no direction."""

    @torch.no_grad()
    def transform(self, text_ND: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Move text embeddings, [N, D], to length 1. Each row depends only on itself and the fitted constants.

        Args:
            text_ND: rows of any length.
            dtype: of the result; by default the input's. Rounding to float16 moves a row of width 1280 by 2e-4, to bfloat16
                by 1.6e-3.

        Raises:
            ValueError: rows are zero or not finite, or have another width than the operator, or land on zero.
        """
        return self._transform(text_ND, dtype, lambda operator, unit_bD: operator.move(unit_bD))

    def _transform(
        self, text_ND: Tensor, dtype: torch.dtype | None, move: Callable[["EmbeddingOperator", Tensor], Tensor]
    ) -> Tensor:
        if text_ND.ndim != 2 or text_ND.shape[1] != len(self.text_mean_D):
            raise ValueError(
                f"the operator moves rows of width {len(self.text_mean_D)}, and the text embeddings are {list(text_ND.shape)}"
            )
        moved_ND = torch.empty_like(text_ND, dtype=dtype or text_ND.dtype, requires_grad=False)
        operator, faults, row = self.to(text_ND.device), RowFaults(), 0
        for unit_bD in iterate_unit_blocks([text_ND], faults):
            moved_bD = move(operator, unit_bD)
            if not faults.counts and (lost_b := moved_bD.abs().amax(1) == 0).any():
                faults.add("land on zero", lost_b.nonzero()[:, 0], row)
            moved_ND[row : row + len(moved_bD)] = moved_bD
            row += len(moved_bD)
        if faults.counts:
            raise ValueError(f"text embeddings: {faults.format_message(row)}")
        return moved_ND

    def to(self, device: torch.device) -> "EmbeddingOperator":
        """Return the operator with its vectors on `device`."""
        if self.text_mean_D.device == device:
            return self
        tensors = {name: tensor.to(device) for name, tensor in self._get_tensors().items()}
        return dataclasses.replace(self, **tensors)

    def save(self, folder: str | Path) -> None:
        """Write the operator into a folder, atomically. Over ranks: call it on one.

        Raises:
            ValueError: the folder exists and is not empty.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} already exists: name another folder, or remove it")
        with atomic.new_folder(folder) as unfinished:
            tensors = {name: x.cpu().contiguous() for name, x in self._get_tensors().items()}
            save_file(tensors, unfinished / f"{self.method}.safetensors")
            manifest = {"method": self.method} | self._get_numbers()
            (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "EmbeddingOperator":
        """Load the operator that `save` wrote.

        Raises:
            ValueError: not found, or of another method, or its files are broken.
        """
        manifest = read_manifest(folder)
        if manifest["method"] != cls.method:
            raise ValueError(
                f"{folder} holds an operator of method {manifest['method']!r}, not {cls.method!r}: use load_operator"
            )
        path = Path(folder) / f"{cls.method}.safetensors"
        try:
            tensors = load_file(path)
            numbers = {name: tuple(x) if isinstance(x, list) else x for name, x in manifest.items() if name != "method"}
            operator = cls(**tensors, **numbers)
        except (OSError, SafetensorError, TypeError) as error:
            raise ValueError(
                f"{path} and its {MANIFEST} are not an operator of this version ({error}): fit it again"
            ) from error
        operator._check(path)
        return operator

    @classmethod
    def _fit_moments(
        cls,
        image_embeddings: Embeddings,
        text_embeddings: Embeddings,
        *,
        group,
        progress: Progress | None,
        about,
        with_scatter=False,
    ) -> tuple[Moments, Moments, dict]:
        """Fit the moments of images and texts, and the fields that all operators have."""
        about = dict(about or {})
        if not all(isinstance(text, str) for item in about.items() for text in item):
            raise ValueError(f"about must map strings to strings, not {about}")
        passes = dict(group=group, progress=progress, with_scatter=with_scatter)
        image = compute_moments(image_embeddings, "image embeddings", **passes)
        text = compute_moments(text_embeddings, "text embeddings", **passes)
        if len(image.mean_D) != len(text.mean_D):
            raise ValueError(
                f"image embeddings have width {len(image.mean_D)} and text embeddings {len(text.mean_D)}: "
                "they must come from one space, so from the two halves of one encoder"
            )
        fields = dict(
            image_mean_D=image.mean_D,
            text_mean_D=text.mean_D,
            image_trace=image.trace(),
            text_trace=text.trace(),
            num_images=image.num_rows,
            num_texts=text.num_rows,
            about=about,
        )
        return image, text, fields

    def _get_tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type in (Tensor, "Tensor")}

    def _get_numbers(self) -> dict:
        tensors = self._get_tensors()
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in tensors}

    def _check(self, path: Path) -> None:
        for name, tensor in self._get_tensors().items():
            if (
                tensor.dtype != torch.float64
                or not tensor.isfinite().all()
                or tensor.shape[:1] != self.text_mean_D.shape
            ):
                raise ValueError(
                    f"{path}: {name} is not float64 of width {len(self.text_mean_D)} and finite: fit it again"
                )


def project(x_bD: Tensor) -> Tensor:
    """Divide rows by their length, in place. A row shorter than NO_DIRECTION becomes zero."""
    length_b = torch.linalg.vector_norm(x_bD, dim=1)
    return x_bD.mul_(torch.where(length_b < NO_DIRECTION, 0.0, 1 / length_b)[:, None])


def read_manifest(folder: str | Path) -> dict:
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        manifest["method"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        reason = "not found" if is_missing else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be read ({reason}): name a folder of a saved operator") from error
    return manifest
