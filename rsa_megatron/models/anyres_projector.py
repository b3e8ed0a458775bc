"""LLaVA-OneVision's projector: Megatron's, and after it the packing of an image's tiles into its tokens (AnyRes).

A precomputed embedding (ReVision) is projected once and fills as many positions as its layout says.

LLaVAModel splices a fixed number of tokens a tile into the text. Here an image's number of tokens depends on its shape.
So the projector packs, and returns the tokens of all images in one sequence; LLaVAModel is passed that a "tile" is one
token and how many such tiles each image has, and its own splice puts them where they belong.

Shapes: T tiles, P tokens of a tile (P = side * side), D and H widths of tower and decoder.
"""

import math
from collections.abc import Sequence

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from torch import Tensor

from rsa_megatron.anyres import ImageLayout


class AnyResProjector(MultimodalProjector):
    """Two linear layers with GELU, and packing.

    Args:
        side: tokens along a side of one tile.
        max_tiles: tokens of how many tiles a grid may keep.
        Others as MultimodalProjector's.
    """

    def __init__(self, config, submodules, input_size: int, *, side: int, max_tiles: int, tp_group=None):
        super().__init__(config, submodules, "mlp", input_size, tp_group=tp_group)
        self.side, self.max_tiles = side, max_tiles
        # Initialised as LLaVA-OneVision does; the same on every tensor-parallel rank, as they share this generator.
        newline_H = torch.randn(config.hidden_size) / math.sqrt(config.hidden_size)
        self.image_newline = torch.nn.Parameter(newline_H.to(config.params_dtype))
        #: of the images whose tiles come next; the model sets it before each forward pass
        self.layouts: Sequence[ImageLayout] = ()

    def forward(self, tokens_PTD: Tensor) -> Tensor:
        """Project and pack all images' tokens, [number of tokens, 1, H]."""
        projected_PTH = super().forward(tokens_PTD)
        packed = pack_images(projected_PTH.transpose(0, 1), self.layouts, self.image_newline, self.side, self.max_tiles)
        return packed[:, None]


def pack_images(
    tokens_TPH: Tensor, layouts: Sequence[ImageLayout], newline_H: Tensor, side: int, max_tiles: int
) -> Tensor:
    """Pack the tokens of all images in order, [number of tokens, H]; differentiable.

    Without a layout tiles give no token (the dummy tile in a batch of text): their gradient, and that of a newline that is
    used nowhere, is zero and not missing. Megatron's overlapped gradient reduction waits for every parameter.
    """
    num_tiles = sum(layout.num_tiles for layout in layouts)
    assert num_tiles == len(tokens_TPH) or not layouts, (
        f"{len(tokens_TPH)} tiles where the images' layouts have {num_tiles}"
    )
    packed, first = [], 0
    for layout in layouts:
        base_PH, grid_TPH = tokens_TPH[first], tokens_TPH[first + 1 : first + layout.num_tiles]
        first += layout.num_tiles
        packed.append(base_PH.expand(layout.positions, -1) if layout.positions else base_PH)
        if layout.grid_rows:
            packed.append(_pack_grid(grid_TPH, layout, newline_H, side, max_tiles))
        elif layout.newline:
            packed.append(newline_H[None])
    return torch.cat([*packed, tokens_TPH.flatten(0, 1)[:0], newline_H[None][:0]])


def _pack_grid(grid_TPH: Tensor, layout: ImageLayout, newline_H: Tensor, side: int, max_tiles: int) -> Tensor:
    grid = layout.packed_grid(side, max_tiles)
    # Tiles are stored row by row; lay them side by side: rows x columns of tokens.
    whole = grid_TPH.unflatten(1, (side, side)).unflatten(0, (layout.grid_rows, layout.grid_columns))
    whole = whole.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    image = whole[grid.top : grid.top + grid.rows, grid.left : grid.left + grid.columns]
    if (grid.shrunk_rows, grid.shrunk_columns) != (grid.rows, grid.columns):
        image = torch.nn.functional.interpolate(
            image.permute(2, 0, 1)[None], (grid.shrunk_rows, grid.shrunk_columns), mode="bilinear"
        )[0].permute(1, 2, 0)
    if layout.newline:
        image = torch.cat([image, newline_H.expand(grid.shrunk_rows, 1, -1)], dim=1)
    return image.flatten(0, 1)
