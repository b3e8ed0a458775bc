"""AnyRes: how LLaVA-OneVision cuts an image into tiles, and how many tokens come of them. Arithmetic only.

An image is seen twice: whole, squashed into the base tile, and in detail, as a grid of tiles. The grid is the one
of a list of resolutions that keeps most of the image's pixels. The image is fitted into it with black borders; the
tokens of the borders are taken out again ("unpad"), what is still too many tokens is shrunk, and a newline token ends
each row of tokens. The data side must know how many tokens that gives, the model how to do it; both ask here.

The roundings are those of transformers' LlavaOnevision (pack_image_features, select_best_resolution), to the digit:
a model that is trained with other token counts than it is served with is trained for nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

# A shrinking by less than this is skipped.
_LEAST_SHRINKING = 1.1


@dataclass(frozen=True)
class PackedGrid:
    """Which tokens of a grid are kept, and to what size they are shrunk; in tokens."""

    top: int
    left: int
    rows: int
    columns: int
    shrunk_rows: int
    shrunk_columns: int


@dataclass(frozen=True)
class ImageLayout:
    """How one image lies in its tiles. The base tile comes first, then the grid's, row by row."""

    #: of the image as it was, pixels
    height: int
    width: int
    #: tiles of the grid; 0 by 0 with only the base tile
    grid_rows: int = 0
    grid_columns: int = 0
    #: whether image_newline ends the rows (or the only tile, the base)
    newline: int = 1
    #: of a precomputed embedding: how many positions it fills; 0 for an image of pixels
    positions: int = 0

    @classmethod
    def of_embedding(cls, positions: int) -> "ImageLayout":
        """Make the layout of a precomputed embedding: one "tile" of one token, repeated."""
        return cls(height=1, width=1, newline=0, positions=positions)

    @property
    def num_tiles(self) -> int:
        return 1 + self.grid_rows * self.grid_columns

    def packed_grid(self, side: int, max_tiles: int) -> PackedGrid:
        """Compute which of the grid's tokens are kept.

        Args:
            side: tokens along a side of one tile.
            max_tiles: tokens of how many tiles the grid may keep (the 9 of anyres_max_9).
        """
        rows, columns = side * self.grid_rows, side * self.grid_columns
        top = left = 0
        if self.width / self.height > columns / rows:  # borders above and below
            top = (rows - int(round(self.height * (columns / self.width), 7))) // 2
        else:
            left = (columns - int(round(self.width * (rows / self.height), 7))) // 2
        rows, columns = rows - 2 * top, columns - 2 * left
        ratio = math.sqrt(rows * columns / (max_tiles * side**2))
        if ratio <= _LEAST_SHRINKING:
            return PackedGrid(top, left, rows, columns, rows, columns)
        return PackedGrid(top, left, rows, columns, int(rows // ratio), int(columns // ratio))

    def num_tokens(self, side: int, max_tiles: int) -> int:
        """Count the image's positions in the decoder's sequence; arguments as for packed_grid."""
        if self.positions:
            return self.positions
        if not self.grid_rows:
            return side**2 + self.newline
        grid = self.packed_grid(side, max_tiles)
        return side**2 + grid.shrunk_rows * (grid.shrunk_columns + self.newline)

    def as_numbers(self) -> tuple[int, ...]:
        """Return a row of LlavaBatch.image_layouts; ImageLayout(*row) is the inverse."""
        return astuple(self)


def choose_grid(height: int, width: int, pinpoints: Sequence[tuple[int, int]], tile_size: int) -> tuple[int, int]:
    """Choose rows and columns of the grid for an image of height x width pixels.

    It is the resolution that keeps most of the image's pixels; of several, the one that wastes least; of several, the first.

    Args:
        pinpoints: the resolutions to choose from, (height, width) in pixels.
        tile_size: side of a tile, pixels.
    """

    def kept_and_wasted(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    best = max(pinpoints, key=kept_and_wasted)
    return best[0] // tile_size, best[1] // tile_size
