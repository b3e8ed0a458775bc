"""From a sample's images to tiles, by transformers' own processors: a model is trained on what it is served with."""

import io
import re
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaOnevisionImageProcessorPil, SiglipImageProcessorPil

from rsa_megatron.anyres import ImageLayout, choose_grid

ASPECT_RATIOS = ("square", "anyres")
#: The name of a part of a stored sample that is an image: "png" or "0.png".
IMAGE_PART = re.compile(r"(?:([0-9]+)\.)?(?:png|jpg|jpeg|webp|bmp)")
# Pixels. A square of it is as large as the largest image that Pillow opens; a strip of 1 x 60000 made square is 11 GB.
_LONGEST_SIDE_MADE_SQUARE = 13_000


class ImageTiler:
    """Cuts a sample's images into tiles.

    Args:
        image_size: side of a tile, pixels.
        image_aspect_ratio: "square": each image is squashed to one tile. "anyres", as LLaVA-OneVision: an image alone
            is a base tile and a grid of tiles; each of several is padded to a square, one tile.
        grid_pinpoints: the resolutions of anyres, (height, width) in pixels, multiples of image_size.
    """

    def __init__(self, *, image_size: int, image_aspect_ratio: str, grid_pinpoints: Sequence[tuple[int, int]]):
        assert image_aspect_ratio in ASPECT_RATIOS, image_aspect_ratio
        self.image_size = image_size
        self.image_aspect_ratio = image_aspect_ratio
        self.grid_pinpoints = grid_pinpoints
        # To [-1, 1], as SigLIP was trained; the defaults of LLaVA-OneVision's processor are CLIP's.
        settings = dict(
            size={"height": image_size, "width": image_size},
            resample=Image.Resampling.BICUBIC,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        if image_aspect_ratio == "square":
            self._processor = SiglipImageProcessorPil(**settings)
        else:
            pinpoints = [list(resolution) for resolution in grid_pinpoints]
            self._processor = LlavaOnevisionImageProcessorPil(**settings, image_grid_pinpoints=pinpoints)
        self._no_tiles = torch.empty(0, 3, image_size, image_size)

    def layouts(self, images: list[Image.Image]) -> list[ImageLayout]:
        """How the images of one sample lie in the tiles of `tiles`.

        Raises:
            ValueError: for an image too long to be padded.
        """
        if self.image_aspect_ratio == "square":
            return [ImageLayout(image.height, image.width, newline=0) for image in images]
        if len(images) == 1:
            height, width = images[0].height, images[0].width
            return [ImageLayout(height, width, *choose_grid(height, width, self.grid_pinpoints, self.image_size))]
        for image in images:
            if max(image.size) > _LONGEST_SIDE_MADE_SQUARE:
                raise ValueError(f"an image of {image.width} x {image.height} pixels is too long to be padded to a square")
        return [ImageLayout(image.height, image.width) for image in images]

    def tiles(self, images: list[Image.Image]) -> Tensor:
        """The tiles of one sample's RGB images in order, [n, 3, image_size, image_size]; after `layouts`."""
        if not images:
            return self._no_tiles
        if self.image_aspect_ratio == "square":
            return self._processor(images, return_tensors="pt")["pixel_values"]
        # A list in a list is one sample: by the number of its images the processor knows whether to cut or to pad.
        # They all have the same number of tiles, so that none is filled up with empty ones.
        return self._processor([images], return_tensors="pt")["pixel_values"].flatten(0, 1)


def decode_images(parts: dict[str, bytes]) -> list[Image.Image]:
    """A sample's images in order, RGB, from its parts by name: "png" alone, or "0.png", "1.jpg", ....

    Raises:
        ValueError: the names are neither.
    """
    numbers = {name: int(IMAGE_PART.fullmatch(name)[1] or -1) for name in parts}
    names = sorted(parts, key=numbers.get)
    if [numbers[name] for name in names] not in ([-1], list(range(len(names)))):
        raise ValueError(f"its images are {', '.join(names)}: it must have one, or 0.png, 1.jpg, ... without a gap")
    images = []
    for name in names:
        with Image.open(io.BytesIO(parts[name])) as opened:
            images.append(opened.convert("RGB"))
    return images
