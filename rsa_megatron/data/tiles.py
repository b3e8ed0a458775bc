"""From a sample's images to tiles, pixel for pixel as transformers' processors on Pillow make them.

A model is trained on what it is served with: LlavaOnevisionImageProcessorPil (anyres) and SiglipImageProcessorPil (square)
give the same tensors, bit for bit (tests/unit/data/test_tiles.py); only without their copies, and so in half the time
(benchmarks/task_encoder.py). Most of what is left is Pillow's JPEG decoder and bicubic filter. Pillow can do both
faster (Image.draft, reducing_gap), but not to the same pixels.
"""

import contextlib
import io
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from rsa_megatron.anyres import ImageLayout, choose_grid

ASPECT_RATIOS = ("square", "anyres")
#: The name of a stored sample's file that is an image: "png" or "0.png".
IMAGE_PART = re.compile(r"(?:([0-9]+)\.)?(?:png|jpg|jpeg|webp|bmp|gif|tif|tiff)")
# Those that the names stand for, whichever of them it says. Pillow knows more, and runs Ghostscript on PostScript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# Above it Pillow warns of a decompression bomb, above twice as many it refuses. 4 bytes each: 0.36 GB.
_MOST_PIXELS = 89_478_485
# Pixels. A square of it is 0.7 GB in Pillow; a strip of 1 x 60000 made square would be 14 GB.
_LONGEST_SIDE_MADE_SQUARE = 13_000
# EXIF's orientations that lay an image on its side.
_ON_ITS_SIDE = (5, 6, 7, 8)
# By which of a PNG's chunks Pillow finds an orientation; they may stand behind the pixels.
_ORIENTING_CHUNKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
# LLaVA-OneVision pads to squares with int(255 * mean of each colour), in each of its checkpoints 0.5.
_GREY = (127, 127, 127)


class ImageSize(NamedTuple):
    """Of an image as it is seen, upright; pixels."""

    width: int
    height: int


class ImageTiler:
    """Cuts a sample's images into tiles.

    Args:
        image_size: side of a tile, pixels.
        image_aspect_ratio: "square": each image is squashed to one tile. "anyres", as LLaVA-OneVision: a single image
            is a base tile and a grid of tiles; each of several is padded to a square, one tile.
        grid_pinpoints: the resolutions of anyres, (height, width) in pixels, multiples of image_size.
    """

    part = IMAGE_PART

    def __init__(self, *, image_size: int, image_aspect_ratio: str, grid_pinpoints: Sequence[tuple[int, int]]):
        assert image_aspect_ratio in ASPECT_RATIOS, image_aspect_ratio
        self.image_size = image_size
        self.image_aspect_ratio = image_aspect_ratio
        self.grid_pinpoints = grid_pinpoints

    def decode(self, parts: dict[str, bytes]) -> list[Image.Image]:
        return decode_images(parts)

    def read_layouts(self, parts: dict[str, bytes]) -> list[ImageLayout]:
        """Return the layouts of one sample's images from their files' headers: those of `layouts`, unless pixels are damaged.

        Raises:
            ValueError: as `decode` and `layouts`.
        """
        return self.layouts([_read_size(name, parts[name]) for name in _sort_images(parts)])

    def layouts(self, images: Sequence[Image.Image | ImageSize]) -> list[ImageLayout]:
        """Return how the images of one sample lie in the tiles of `tiles`.

        Raises:
            ValueError: for an image too long to be padded.
        """
        if self.image_aspect_ratio == "square":
            return [ImageLayout(image.height, image.width, newline=0) for image in images]
        if len(images) == 1:
            height, width = images[0].height, images[0].width
            return [ImageLayout(height, width, *choose_grid(height, width, self.grid_pinpoints, self.image_size))]
        for image in images:
            if max(image.width, image.height) > _LONGEST_SIDE_MADE_SQUARE:
                raise ValueError(
                    f"an image of {image.width} x {image.height} pixels is too long to be padded to a square"
                )
        return [ImageLayout(image.height, image.width) for image in images]

    def tiles(self, images: list[Image.Image]) -> Tensor:
        """Make the tiles of one sample's RGB images in order, [n, 3, image_size, image_size]; after `layouts`."""
        side, layouts = self.image_size, self.layouts(images)
        tiles = numpy.empty((sum(layout.num_tiles for layout in layouts), 3, side, side), numpy.float32)
        if len(images) > 1 and self.image_aspect_ratio == "anyres":
            images = map(_pad_to_square, images)  # one at a time: see _LONGEST_SIDE_MADE_SQUARE
        cuts = (cut for image, layout in zip(images, layouts) for cut in self._cut(image, layout))
        # Shades to [-1, 1], as SigLIP was trained: for each of the 256, to the bit, transformers'
        # (shade * (1 / 255) - 0.5) / 0.5. A tile at a time stays in the processor's cache.
        for tile, cut in zip(tiles, cuts, strict=True):
            tile[:] = cut.transpose(2, 0, 1)
            tile /= 127.5
            tile -= 1
        return torch.from_numpy(tiles)

    def _cut(self, image: Image.Image, layout: ImageLayout) -> Iterator[numpy.ndarray]:
        """Yield the base tile, then the grid's, row by row: shades of 0 to 255, [image_size, image_size, 3]."""
        side = self.image_size
        yield numpy.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
        if not layout.grid_rows:
            return
        height, width = side * layout.grid_rows, side * layout.grid_columns
        grid = numpy.asarray(fit_on_black(image, height=height, width=width))
        for top, left in itertools.product(range(0, height, side), range(0, width, side)):
            yield grid[top : top + side, left : left + side]


def decode_images(parts: dict[str, bytes]) -> list[Image.Image]:
    """Decode a sample's images in order, upright RGB, from its files by name: just "png", or "0.png", "1.jpg", ....

    Raises:
        ValueError: the names are neither, or an image cannot be read; it says which and why.
    """
    return [_decode(name, parts[name]) for name in _sort_images(parts)]


def _sort_images(parts: Iterable[str]) -> list[str]:
    return sort_by_number(parts, IMAGE_PART, "0.png, 1.jpg, ...")


def sort_by_number(parts: Iterable[str], pattern: re.Pattern, example: str) -> list[str]:
    """Sort the names of a sample's images by their numbers; `pattern` finds the number in each.

    Raises:
        ValueError: it is neither one without a number nor all from 0 on.
    """
    numbers = {name: int(pattern.fullmatch(name)[1] or -1) for name in parts}
    names = sorted(parts, key=numbers.get)
    if [numbers[name] for name in names] not in ([-1], list(range(len(names)))):
        raise ValueError(f"its images are {', '.join(names)}: it must have one, or {example} without a gap")
    return names


def _decode(name: str, part: bytes) -> Image.Image:
    """Decode the image, or the first of several in the file (of an animation, of pages)."""
    with _open(name, part) as image:
        image.load()
        with contextlib.suppress(Exception):  # EXIF that cannot be read turns nothing
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def _read_size(name: str, part: bytes) -> ImageSize:
    """Return the size of the image that `_decode` gives, from its header where that has it."""
    with _open(name, part) as image:
        in_header = image.format != "TIFF"  # of which Pillow turns the size before the pixels
        if image.format == "PNG":
            pixels = part.find(b"IDAT")
            in_header = all(part.find(chunk, pixels) < 0 for chunk in _ORIENTING_CHUNKS)
        orientation, (width, height) = None, image.size
        with contextlib.suppress(Exception):
            # Not the method of a PNG's own, which decodes it to look behind the pixels.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    if not in_header:
        return ImageSize(*_decode(name, part).size)
    return ImageSize(height, width) if orientation in _ON_ITS_SIDE else ImageSize(width, height)


@contextlib.contextmanager
def _open(name: str, part: bytes) -> Iterator[Image.Image]:
    """Open an image; what goes wrong with it is a ValueError that names it."""
    try:
        with Image.open(io.BytesIO(part), formats=_FORMATS) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(
                    f"an image of {image.width} x {image.height} pixels is larger than {_MOST_PIXELS} pixels"
                )
            yield image
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name}: cannot identify image file, {len(part)} bytes that begin with {part[:12]!r}"
        ) from error
    except Exception as error:  # of damaged files Pillow raises SyntaxError, struct.error, ...
        raise ValueError(f"{name}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers, of which none is known to be white")
    if image.mode.startswith("I;16"):
        # The upper 8 bits, as Pillow reads 16-bit colour. Its convert would make everything above 255 white.
        image = Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        # On white, as transformers puts it.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _pad_to_square(image: Image.Image) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), _GREY)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def fit_on_black(image: Image.Image, *, height: int, width: int) -> Image.Image:
    """Scale the image as large as fits, in the middle."""
    across, down = width / image.width, height / image.height
    if across < down:
        size = width, min(math.ceil(image.height * across), height)
    else:
        size = min(math.ceil(image.width * down), width), height
    fitted = image.resize(size, Image.Resampling.BICUBIC)
    if size == (width, height):
        return fitted
    canvas = Image.new("RGB", (width, height))
    canvas.paste(fitted, ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas
