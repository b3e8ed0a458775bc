"""Tiles are transformers' to the bit, whatever the image's shape; a file gives the picture that people see in it."""

import io
import random
import struct
import zlib

import numpy
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from transformers import LlavaOnevisionImageProcessorPil, SiglipImageProcessorPil
from transformers.image_utils import load_image

from rsa_megatron.data.tiles import IMAGE_PART, ImageTiler, decode_images
from rsa_megatron.models.architectures import square_grids
from tests.support import broken_data

TILE, PINPOINTS = 28, square_grids(28, 3, 4)
SHAPES = [(1, 1), (1, 4000), (4000, 1), (28, 28), (84, 84), (112, 84), (29, 27), (3, 200), (500, 375)]
SETTINGS = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=Image.Resampling.BICUBIC)
WIDTH, HEIGHT = 70, 45


def ours(images, aspect_ratio="anyres", tile=TILE, pinpoints=PINPOINTS):
    return ImageTiler(image_size=tile, image_aspect_ratio=aspect_ratio, grid_pinpoints=pinpoints).tiles(images)


def transformers(images, tile=TILE, pinpoints=PINPOINTS, **changes):
    settings = SETTINGS | dict(size={"height": tile, "width": tile}, image_grid_pinpoints=[list(p) for p in pinpoints])
    processor = LlavaOnevisionImageProcessorPil(**settings | changes)
    return processor([images], return_tensors="pt")["pixel_values"].flatten(0, 1)


def noise(width=WIDTH, height=HEIGHT, mode="RGB", seed=0):
    """A picture of which no two parts are alike."""
    pixels = numpy.random.default_rng([width, height, seed]).integers(0, 256, (height, width, 4), dtype=numpy.uint8)
    image = Image.fromarray(pixels)
    if mode == "CMYK":
        return Image.frombytes(mode, image.size, image.tobytes())
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def file(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def opened(part):
    return Image.open(io.BytesIO(part))


def decoded(part):
    (image,) = decode_images({"png": part})
    assert image.mode == "RGB"
    return image


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, bits, colour_type, rows):
    """A PNG as it is written, of kinds that Pillow reads and does not write."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def random_sizes(count):
    rng = random.Random(0)
    return [tuple(int(2 ** rng.uniform(0, 9)) for _ in range(2)) for _ in range(count)]


def test_an_image_alone_is_transformers_base_tile_and_grid_whatever_its_shape():
    num_seen = dict(bilinear=0, others_mean=0)
    for width, height in SHAPES + random_sizes(200):
        image = noise(width, height)
        actual = ours([image])
        assert torch.equal(actual, transformers([image])), (width, height)
        num_seen["bilinear"] += not torch.equal(actual, transformers([image], resample=Image.Resampling.BILINEAR))
        num_seen["others_mean"] += not torch.equal(actual, transformers([image], image_mean=[0.48] * 3))
    # A picture of one pixel, or as large as its tiles, is the same under any filter: two of SHAPES, others of one shade.
    assert num_seen["bilinear"] > 200 and num_seen["others_mean"] == 209


@pytest.mark.parametrize("width, height", [(336, 336), (640, 480), (300, 1000)])
def test_with_the_tiles_of_the_published_models_too(width, height):
    image, pinpoints = noise(width, height), square_grids(384, 6, 6)
    assert torch.equal(
        ours([image], tile=384, pinpoints=pinpoints), transformers([image], tile=384, pinpoints=pinpoints)
    )


def test_each_shade_is_transformers_float():
    shades = Image.fromarray(numpy.arange(256, dtype=numpy.uint8).reshape(16, 16)).convert("RGB")
    actual = ours([shades], "square", tile=16)
    expected = SiglipImageProcessorPil(**SETTINGS, size={"height": 16, "width": 16})([shades], return_tensors="pt")
    assert torch.equal(actual, expected["pixel_values"]) and actual[0, 0].unique().numel() == 256
    # The same in another order is not: 2 / 255 is rounded once for all shades.
    assert not torch.equal(actual[0, 0].flatten(), torch.arange(256).float() * (2 / 255) - 1)


def test_each_of_several_images_is_transformers_padded_square():
    shapes = [(40, 90), (90, 40), (31, 30), (30, 31), (56, 56), (1, 4000), (1, 1), *random_sizes(40)]
    images = [noise(*shape) for shape in shapes]
    actual = ours(images)
    assert torch.equal(actual, transformers(images)) and len(actual) == len(images)
    assert not torch.equal(actual[:1], ours(images[:1], "square"))  # squashed
    assert actual[0, 0, 14, 0] == torch.tensor(127.0) / 127.5 - 1  # grey, not black as the borders of a grid


def test_square_is_siglips():
    images = [noise(*shape) for shape in SHAPES + random_sizes(40)]
    processor = SiglipImageProcessorPil(**SETTINGS, size={"height": TILE, "width": TILE})
    assert torch.equal(ours(images, "square"), processor(images, return_tensors="pt")["pixel_values"])


def without_black(cmyk):
    return Image.fromarray(255 - numpy.array(cmyk)[..., :3])


def numbers(image):
    """What is stored, taken for shades of grey."""
    return Image.fromarray(numpy.array(image).astype(numpy.uint8))


SECOND = dict(save_all=True, append_images=[noise(mode="RGBA", seed=1)])
# What is in the file, and a wrong way to read it that the comparison must see.
OPAQUE = {
    "colour": (file(noise()), lambda image: image.convert("L")),
    "colour, JPEG": (file(noise(), "JPEG"), lambda image: image.convert("L")),
    "grey": (file(noise(mode="L")), ImageOps.invert),
    "grey, JPEG": (file(noise(mode="L"), "JPEG"), ImageOps.invert),
    "two shades": (file(noise(mode="1")), numbers),
    "palette": (file(noise(mode="P")), numbers),
    "CMYK, JPEG": (file(noise(mode="CMYK"), "JPEG"), without_black),
    "CMYK, TIFF": (file(noise(mode="CMYK"), "TIFF"), without_black),
    "GIF": (file(noise(), "GIF"), numbers),
    "pages": (file(noise(), "TIFF", **SECOND), lambda image: image.seek(1)),
    "moving GIF": (file(noise(), "GIF", **SECOND), lambda image: image.seek(1)),
}
TRANSPARENT = {
    "grey and alpha": file(noise(mode="RGBA").convert("LA")),
    "alpha": file(noise(mode="RGBA")),
    "alpha, WebP": file(noise(mode="RGBA"), "WEBP", lossless=True, exact=True),
    "alpha, TIFF": file(noise(mode="RGBA"), "TIFF"),
    "one transparent colour": file(noise(), transparency=noise().getpixel((7, 7))),
    "one transparent shade": file(noise(mode="L"), transparency=77),
    "transparent black": file(noise(mode="1"), transparency=0),
    "one transparent index": file(noise(mode="P"), transparency=noise(mode="P").getpixel((7, 7))),
    "a palette of transparencies": file(noise(mode="P"), transparency=bytes(range(256))),
    "transparent GIF": file(noise(mode="P"), "GIF", transparency=noise(mode="P").getpixel((7, 7))),
    "moving PNG": file(noise(mode="RGBA"), **SECOND),
    "moving WebP": file(noise(mode="RGBA"), "WEBP", lossless=True, exact=True, **SECOND),
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_an_opaque_picture_is_as_transformers_loads_it(kind):
    part, wrong = OPAQUE[kind]
    actual = ours([decoded(part)])
    assert torch.equal(actual, transformers([load_image(opened(part))]))
    image = opened(part)
    assert not torch.equal(actual, transformers([wrong(image) or image.convert("RGB")]))


@pytest.mark.parametrize("kind", TRANSPARENT)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # of the wrong way
def test_a_transparent_picture_is_put_on_white_as_transformers_processor_puts_it(kind):
    part = TRANSPARENT[kind]
    actual = ours([decoded(part)])
    assert torch.equal(actual, transformers([opened(part)]))
    image = opened(part)
    beneath = image.convert("RGB")
    beneath.info.clear()  # where Pillow keeps the one transparent colour
    assert not torch.equal(actual, transformers([beneath]))
    if getattr(image, "n_frames", 1) > 1:
        image.seek(1)
        assert not torch.equal(actual, transformers([image]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_picture_is_put_upright_as_transformers_loads_it(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    part = file(noise(), kind, exif=exif)
    image = decoded(part)
    assert image.size == ((HEIGHT, WIDTH) if orientation > 4 else (WIDTH, HEIGHT))
    assert torch.equal(ours([image]), transformers([load_image(opened(part))]))
    assert not torch.equal(ours([image])[:1], transformers([opened(file(noise(), kind))])[:1])  # as it lies in the file


def of_header(*parts):
    tiler = ImageTiler(image_size=TILE, image_aspect_ratio="anyres", grid_pinpoints=PINPOINTS)
    named = {f"{number}.png": part for number, part in enumerate(parts)}
    return tiler.read_layouts(named), tiler.layouts(tiler.decode(named))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_size_in_the_header_is_that_of_the_upright_picture(kind, monkeypatch):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        read, decoded = of_header(file(noise(), kind, exif=exif))
        assert read == decoded and (read[0].width == HEIGHT) == (orientation > 4)
    for part in (*(part for part, _ in OPAQUE.values()), *TRANSPARENT.values(), file(noise(), "BMP")):
        read, decoded = of_header(part, part)
        assert read == decoded
    if kind != "TIFF":
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("pixels are read"))
        tiler = ImageTiler(image_size=TILE, image_aspect_ratio="square", grid_pinpoints=[])
        (layout,) = tiler.read_layouts({"png": file(noise(), kind, exif=exif)})
        assert (layout.width, layout.height) == (HEIGHT, WIDTH)


def test_a_png_may_say_behind_its_pixels_which_side_is_up():
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    whole = file(noise())
    for name, content in ((b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")), (b"iTXt", xmp)):
        for place in (whole.index(b"IDAT") - 4, whole.index(b"IEND") - 4):
            read, decoded = of_header(whole[:place] + chunk(name, content) + whole[place:])
            assert read == decoded and read[0].width == HEIGHT


def test_unreadable_exif_turns_nothing():
    part = file(noise(), exif=b"Exif\0\0nonsense")
    assert of_header(part)[0] == of_header(file(noise()))[0]
    with pytest.raises(SyntaxError):
        load_image(opened(part))
    assert torch.equal(ours([decoded(part)]), ours([noise()]))


def test_16_bit_grey_is_scaled_as_16_bit_colour_is():
    shades = numpy.arange(0, 65536, 257 * 2, dtype=">u2")  # 128 of them
    grey = png(len(shades), 1, 16, 0, b"\0" + shades.tobytes())
    colour = png(len(shades), 1, 16, 2, b"\0" + shades.repeat(3).tobytes())
    tif = file(opened(grey), "TIFF")
    assert (opened(grey).mode, opened(colour).mode, opened(tif).mode) == ("I;16", "RGB", "I;16")
    for part in (grey, tif):
        assert list(decoded(part).get_flattened_data()) == list(decoded(colour).get_flattened_data())
    assert (
        numpy.array(opened(grey).convert("RGB")).min(axis=2)[0, 1:].tolist() == [255] * 127
    )  # as transformers loads it


def test_a_strip_of_one_pixel_is_used():
    assert torch.equal(ours([decoded(file(noise(1, 60_000)))]), transformers([noise(1, 60_000)]))


@pytest.mark.parametrize(
    "part, reason",
    [
        (b"", "cannot identify image file, 0 bytes that begin with b''"),
        (b"this is no picture", "cannot identify image file, 18 bytes that begin with b'this is no p'"),
        (
            b'<svg xmlns="http://www.w3.org/2000/svg"/>',
            "cannot identify image file, 41 bytes that begin with b'<svg xmlns=\"'",
        ),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
            "cannot identify",
        ),  # a program, not a picture
        (png(0, 9, 8, 2, b""), "cannot identify image file"),
        (png(9, 0, 8, 2, b""), "cannot identify image file"),
        (file(noise())[:900], "image file is truncated"),
        (file(noise(), "JPEG")[:900], "image file is truncated"),
        (file(noise(), "WEBP")[:900], "0.png: "),
        (file(noise(), "GIF")[:900], "image file is truncated"),
        (file(noise())[:60] + b"damage" + file(noise())[66:], "0.png: "),
        (png(10_000, 9_000, 8, 2, b""), "an image of 10000 x 9000 pixels is larger than 89478485 pixels"),
        (png(20_000, 20_000, 8, 2, b""), "Image size (400000000 pixels) exceeds limit of 178956970 pixels"),
        (file(Image.new("F", (9, 9)), "TIFF"), "its pixels are 32-bit numbers"),
        (file(Image.new("I", (9, 9)), "TIFF"), "its pixels are 32-bit numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore:Image size")
def test_what_cannot_be_used_is_refused_with_its_name_and_a_reason(part, reason):
    with pytest.raises(ValueError) as caught:
        decode_images({"0.png": part, "1.png": broken_data.picture()})
    assert str(caught.value).startswith("0.png: ") and reason in str(caught.value)
    assert "object at 0x" not in str(caught.value) and "\n" not in str(caught.value)


def test_the_names_of_images():
    for ending in ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff"):
        assert IMAGE_PART.fullmatch(ending) and IMAGE_PART.fullmatch(f"12.{ending}")
    assert not any(IMAGE_PART.fullmatch(name) for name in ("json", "svg", "x.png", "png.json", "0.0.png", "eps"))
    part = file(noise(), "GIF")
    first, second = decode_images({"1.tiff": file(noise(9, 9), "TIFF"), "0.gif": part})
    assert first.tobytes() == opened(part).convert("RGB").tobytes() and second.size == (9, 9)
