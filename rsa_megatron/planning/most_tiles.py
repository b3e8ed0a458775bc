"""How many tiles an image, or a packed row, may have at most."""

from collections.abc import Mapping
from dataclasses import dataclass

from rsa_megatron.models.architectures import Architecture


@dataclass(frozen=True)
class RowTiles:
    """Tiles of a packed row."""

    #: that a row must be allowed to have
    of_largest_image: int
    #: of --packing-max-tiles
    default: int


def count_most_tiles(settings: Mapping, architecture: Architecture) -> int:
    """Count the tiles of the largest image, with its base tile; 0 for precomputed embeddings.

    Args:
        settings: a recipe, or the run's arguments by name.
    """
    if settings.get("image_positions"):
        return 0
    if settings["image_aspect_ratio"] == "square":
        return 1
    side = architecture.vision.image_size
    grids = settings["image_grids"] or [
        (height // side, width // side) for height, width in architecture.grid_pinpoints
    ]
    return 1 + max(rows * columns for rows, columns in grids)


def count_row_tiles(settings: Mapping, architecture: Architecture) -> RowTiles:
    """Count the tiles of a packed row: by default those of the largest image, and never fewer than rows of small images need.

    AnyRes takes the borders of a grid out of the sequence, so that a tile has fewer positions than tokens: about two thirds of pictures
    of usual sizes. So a row may have 3/2 of the whole tiles that would fill it. (Rows of 8192 positions and grids of up to 2 x 2: 17
    tiles. With the largest image's 5 such rows are 0.36 full, with 12, which would fill it whole, 0.83, with 16 or more 0.97.)
    """
    # An embedding is a tile of its own here, and has as many positions as --image-positions says.
    positions = settings.get("image_positions") or architecture.vision.tokens_per_side**2
    largest = max(1, count_most_tiles(settings, architecture))
    return RowTiles(largest, max(largest, -(-3 * settings["seq_length"] // (2 * positions))))
