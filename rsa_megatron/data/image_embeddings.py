"""Images as one precomputed embedding each, instead of pixels: what ReVision's stages train on.

In a shard the embedding is a file "npy" beside the json (several images: "0.npy", "1.npy", ...), in a JSONL record the path
of such a file: numpy's format, one vector of D numbers. Pixels that a sample has as well are not looked at, so that the same
shards may serve other stages.
"""

import io
import re

import numpy
import torch
from torch import Tensor

from rsa_megatron.anyres import ImageLayout
from rsa_megatron.data.tiles import sort_by_number

#: The name of a stored sample's file that is an embedding: "npy" or "0.npy".
EMBEDDING_PART = re.compile(r"(?:([0-9]+)\.)?npy")


class ImageEmbeddings:
    """Reads embeddings; does for them what ImageTiler does for pixels.

    Args:
        width: numbers of an embedding; None where any will do.
        positions: in how many positions of the decoder's sequence each stands (ReVision: 576).
    """

    part = EMBEDDING_PART

    def __init__(self, *, width: int | None, positions: int):
        self.width, self.positions = width, positions

    def decode(self, parts: dict[str, bytes]) -> list[Tensor]:
        """Decode a sample's embeddings in order, [D] float32 each.

        Raises:
            ValueError: the names are neither just "npy" nor "0.npy", "1.npy", ..., or one cannot be used; says which and why.
        """
        return [self._decode(name, parts[name]) for name in sort_by_number(parts, self.part, "0.npy, 1.npy, ...")]

    def read_layouts(self, parts: dict[str, bytes]) -> list[ImageLayout]:
        """Return the layouts of one sample's embeddings, which are decoded for it: they are as small as a header.

        Raises:
            ValueError: as `decode`.
        """
        return self.layouts(self.decode(parts))

    def layouts(self, embeddings: list[Tensor]) -> list[ImageLayout]:
        return [ImageLayout.of_embedding(self.positions)] * len(embeddings)

    def tiles(self, embeddings: list[Tensor]) -> Tensor:
        """Stack a sample's n embeddings, [n, D]."""
        return torch.stack(embeddings) if embeddings else torch.zeros(0, self.width)

    def _decode(self, name: str, part: bytes) -> Tensor:
        try:
            row_D = numpy.lib.format.read_array(io.BytesIO(part), allow_pickle=False)
        except Exception as error:  # whatever numpy comes upon in broken bytes
            raise ValueError(f"{name}: not an array in numpy's format: {error}") from error
        if row_D.ndim != 1 or row_D.dtype.kind != "f" or self.width not in (None, len(row_D)):
            expected = "" if self.width is None else f" of --image-embedding-width {self.width}"
            raise ValueError(
                f"{name}: {row_D.dtype} array of shape {list(row_D.shape)}; it must be a floating-point vector{expected}"
            )
        embedding_D = torch.from_numpy(row_D).float()
        if not embedding_D.isfinite().all():
            raise ValueError(f"{name}: it holds NaN, infinity or a number beyond float32")
        return embedding_D
