"""Samples become rows of a batch with the right tokens, masks and tiles; what cannot is skipped, named and counted."""

import io
import json
import logging
import math
import random

import numpy
import pytest
import torch
from megatron.energon import SkipSample
from megatron.energon.errors import FatalSampleError
from PIL import Image
from transformers import LlavaOnevisionImageProcessorPil

from rsa_megatron.anyres import ImageLayout
from rsa_megatron.data.task_encoder import LlavaTaskEncoder, StoredSample, sample_id
from tests.support import broken_data

TILE = 28
PINPOINTS = [(28, 28), (28, 56), (56, 28), (56, 56), (28, 84), (84, 28), (84, 84), (56, 112)]
# Width and height of pictures of 12 shapes: wide, tall, square, smaller than a tile, a line of one pixel.
SHAPES = [
    *[(56, 56), (90, 40), (40, 90), (120, 30), (31, 97), (84, 83)],
    *[(200, 201), (13, 11), (7, 29), (300, 70), (1, 50), (57, 111)],
]


def make_encoder(tokenizer, image_aspect_ratio):
    return LlavaTaskEncoder(
        tokenizer,
        image_size=TILE,
        patch_size=14,
        max_sequence_length=128,
        template="plain",
        image_aspect_ratio=image_aspect_ratio,
        grid_pinpoints=PINPOINTS,
        max_tiles=2,
    )


@pytest.fixture
def encoder(tokenizer):
    return make_encoder(tokenizer, "square")


@pytest.fixture
def anyres(tokenizer):
    return make_encoder(tokenizer, "anyres")


def stored(key="a", answer="A red boat.", images=1, rsa=True):
    """A sample with so many images, or with these: PNG files or pictures in a list, or parts by name."""
    if isinstance(images, int):
        images = [broken_data.picture()] * images
    if isinstance(images, list):
        names = ["png"] if len(images) == 1 else [f"{i}.png" for i in range(len(images))]
        images = dict(zip(names, [image if isinstance(image, bytes) else png(image) for image in images]))
    prompt = "<image>\n" * len(images) + "Tell me."
    record = {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]}
    return StoredSample(
        __key__=key,
        __restore_key__=(),
        __subflavors__={"rsa": rsa},
        images=images,
        record=json.dumps(record).encode(),
    )


def noise(width, height, mode="RGB"):
    """A picture of which no two parts are alike, smooth enough for the filters to differ."""
    pixels = numpy.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 4), dtype=numpy.uint8)
    image = Image.fromarray(pixels)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def png(image) -> bytes:
    """Its file, without loss; PNG knows no CMYK."""
    out = io.BytesIO()
    image.save(out, "TIFF" if image.mode == "CMYK" else "PNG")
    return out.getvalue()


def huggingface(**changes):
    """LLaVA-OneVision's processor with the settings of its published checkpoints, but for the sizes."""
    settings = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3, size={"height": TILE, "width": TILE})
    pinpoints = [list(pinpoint) for pinpoint in PINPOINTS]
    processor = LlavaOnevisionImageProcessorPil(**settings | changes, image_grid_pinpoints=pinpoints)
    return lambda images: processor(images, return_tensors="pt")


def test_a_batch_lines_up(encoder, tokenizer):
    samples = [stored("a"), stored("b", "A long green boat is here.", rsa=False), stored("c", images=0)]
    batch = encoder.batch([encoder.encode_sample(sample) for sample in samples])
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == batch.rsa.caption_mask.shape
    is_token = batch.tokens[:, 1:] != 0  # the last label of a row is no input
    assert torch.equal(batch.tokens[:, 1:][is_token], batch.labels[:, :-1][is_token])
    for row, answer in enumerate(["A red boat.", "A long green boat is here.", "A red boat."]):
        caption = batch.tokens[row][batch.rsa.caption_mask[row] > 0]
        assert tokenizer.decode(caption) == answer
        learnt = batch.labels[row][batch.loss_mask[row] > 0]
        # Without an image the first token of the row is the caption's own, which nothing precedes.
        assert tokenizer.decode(learnt) == (answer + "\n" if row < 2 else answer[1:] + "\n")
    assert batch.rsa.eligible.tolist() == [1, 0, 0]
    assert batch.rsa.num_tiles.tolist() == [1, 1, 0]
    assert batch.images.shape == (2, 3, 28, 28)
    assert batch.image_layouts.tolist() == [[56, 56, 0, 0, 0, 0]] * 2 and batch.image_layouts.dtype == torch.int64
    assert batch.keys == ["a", "b", "c"]
    assert batch.rsa.sample_id.tolist() == [sample_id(key) for key in "abc"]


def test_pixels_are_siglips(encoder):
    tiles = encoder.encode_sample(stored()).tiles
    assert tiles.shape == (1, 3, 28, 28) and tiles.dtype == torch.float32
    assert -1 <= tiles.min() < -0.5 and 0.5 < tiles.max() <= 1


@pytest.mark.parametrize("width, height", SHAPES)
def test_anyres_tiles_are_those_of_transformers(encoder, anyres, width, height):
    image = noise(width, height)
    actual, expected = anyres.encode_sample(stored(images=[image])), huggingface()([[image]])
    assert torch.equal(actual.tiles, expected["pixel_values"][0])
    (layout,) = actual.layouts
    assert layout.num_tiles == len(actual.tiles) > 1 and layout.newline == 1
    assert [layout.height, layout.width] == expected["image_sizes"][0].tolist() == [height, width]
    assert torch.equal(actual.tiles[:1], encoder.encode_sample(stored(images=[image])).tiles)  # the base tile
    for changes in (dict(resample=2), dict(image_mean=[0.48] * 3), dict(image_std=[0.27] * 3)):
        assert not torch.equal(actual.tiles, huggingface(**changes)([[image]])["pixel_values"][0])


def test_the_processors_own_mean_and_std_are_others(anyres):
    image = noise(90, 40)
    processor = LlavaOnevisionImageProcessorPil()
    others = huggingface(image_mean=processor.image_mean, image_std=processor.image_std)([[image]])["pixel_values"][0]
    assert (anyres.encode_sample(stored(images=[image])).tiles - others).abs().max() > 0.5


@pytest.mark.parametrize("width, height", SHAPES)
def test_anyres_tiles_are_cut_row_by_row_from_the_centre(anyres, width, height):
    encoded = anyres.encode_sample(stored(images=[noise(width, height)]))
    (layout,) = encoded.layouts
    full_width, full_height = TILE * layout.grid_columns, TILE * layout.grid_rows
    scale = min(full_width / width, full_height / height)
    size = min(math.ceil(width * scale), full_width), min(math.ceil(height * scale), full_height)
    canvas = Image.new("RGB", (full_width, full_height))
    corner = (full_width - size[0]) // 2, (full_height - size[1]) // 2
    canvas.paste(noise(width, height).resize(size, Image.Resampling.BICUBIC), corner)
    pixels = torch.from_numpy(numpy.array(canvas)).permute(2, 0, 1) / 127.5 - 1
    rows = [pixels[:, top : top + TILE] for top in range(0, full_height, TILE)]
    expected = torch.stack([row[:, :, left : left + TILE] for row in rows for left in range(0, full_width, TILE)])
    torch.testing.assert_close(encoded.tiles[1:], expected, rtol=0, atol=1e-6)  # a shade of grey is 8e-3


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])  # others: test_tiles.py
def test_each_kind_of_picture_is_made_rgb_first(anyres, mode):
    file = png(noise(90, 40, mode))
    expected = huggingface()([[Image.open(io.BytesIO(file)).convert("RGB")]])["pixel_values"][0]
    assert torch.equal(anyres.encode_sample(stored(images=[file])).tiles, expected)


def test_a_batch_of_one_image_several_and_none_lines_up(anyres):
    shapes = [[(56, 28)], [], [(40, 90), (31, 97), (56, 56)], [(200, 201)]]
    samples = [[noise(*shape) for shape in sample] for sample in shapes]
    batch = anyres.batch([anyres.encode_sample(stored(str(i), images=images)) for i, images in enumerate(samples)])
    assert batch.rsa.num_tiles.tolist() == [3, 0, 3, 10] and batch.rsa.eligible.tolist() == [1, 0, 0, 1]
    assert batch.image_layouts.tolist() == [
        [28, 56, 1, 2, 1, 0],
        *([height, width, 0, 0, 1, 0] for width, height in shapes[2]),
        [201, 200, 3, 3, 1, 0],
    ]
    assert (batch.tokens == 3).sum(1).tolist() == [1, 0, 3, 1]
    # Transformers makes one batch of the whole, and fills the images of few tiles up with empty ones.
    expected = huggingface()(samples)["pixel_values"]
    num_tiles = [ImageLayout(*row).num_tiles for row in batch.image_layouts.tolist()]
    assert torch.equal(batch.images, torch.cat([tiles[:n] for tiles, n in zip(expected, num_tiles)]))
    assert not expected[0, 3:].any() and num_tiles == [3, 1, 1, 1, 10]


def test_several_images_of_square_are_a_tile_each_without_newline(encoder):
    images = [noise(90, 40), noise(40, 90)]
    encoded = encoder.encode_sample(stored(images=images))
    assert encoded.layouts == [ImageLayout(40, 90, newline=0), ImageLayout(90, 40, newline=0)]
    alone = [encoder.encode_sample(stored(images=[image])).tiles for image in images]
    assert torch.equal(encoded.tiles, torch.cat(alone)) and not encoded.eligible


@pytest.mark.parametrize("aspect_ratio", ["square", "anyres"])
def test_text_alone_has_no_tile_and_no_layout(tokenizer, aspect_ratio):
    encoder = make_encoder(tokenizer, aspect_ratio)
    batch = encoder.batch([encoder.encode_sample(stored(images=0))])
    assert batch.images.shape == (0, 3, TILE, TILE) and batch.images.dtype == torch.float32
    assert batch.image_layouts.shape == (0, 6) and batch.image_layouts.dtype == torch.int64
    assert batch.rsa.num_tiles.tolist() == [0]


def test_images_come_in_the_order_of_their_numbers(anyres):
    parts = {f"{i}.{'jpg' if i % 2 else 'png'}": png(noise(10 + i, 10)) for i in random.Random(0).sample(range(12), 12)}
    encoded = anyres.encode_sample(stored(images=parts))
    assert [layout.width for layout in encoded.layouts] == list(range(10, 22))


@pytest.mark.parametrize(
    "names", [("png", "0.png"), ("0.png", "2.png"), ("1.png", "2.png"), ("0.png", "0.jpg"), ("png", "jpg")]
)
def test_images_that_are_neither_one_nor_numbered_are_refused(anyres, names, caplog):
    with pytest.raises(SkipSample):
        anyres.encode_sample(stored(images=dict.fromkeys(names, broken_data.picture())))
    (line,) = [record.message for record in caplog.records]
    images = ", ".join(names)
    assert line == f"skipped sample a: its images are {images}: it must have one, or 0.png, 1.jpg, ... without a gap"


@pytest.mark.parametrize(
    "aspect_ratio, images, reason",
    [
        (
            "anyres",
            [noise(1, 14_000), noise(9, 9)],
            "an image of 1 x 14000 pixels is too long to be padded to a square",
        ),
        ("anyres", [png(noise(90, 90))[:900]], "truncated"),
        ("anyres", [noise(9, 9), b"this is no picture"], "cannot identify image file"),
        ("anyres", [noise(9, 9)] * 30, "positions do not fit --seq-length 128"),
        ("square", [b""], "cannot identify image file"),
    ],
)
def test_pictures_that_cannot_be_used_are_skipped_with_a_line(tokenizer, caplog, aspect_ratio, images, reason):
    with pytest.raises(SkipSample):
        make_encoder(tokenizer, aspect_ratio).encode_sample(stored(images=images))
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("skipped sample a: ") and reason in line and "Error" not in line


def test_tiles_and_layouts_agree_whatever_the_shape(anyres):
    rng = random.Random(0)
    for size in [tuple(int(2 ** rng.uniform(0, 9)) for _ in range(2)) for _ in range(200)]:
        encoded = anyres.encode_sample(stored(images=[Image.new("RGB", size)]))
        assert len(encoded.tiles) == encoded.layouts[0].num_tiles, size


def test_sample_ids_are_fixed_and_fit_63_bits():
    assert sample_id("train-00000.tar/000001") == 341419117525882545
    ids = {sample_id(str(i)) for i in range(1000)}
    assert len(ids) == 1000 and all(0 <= i < 2**63 for i in ids)


def test_an_unusable_sample_is_skipped_named_and_counted(encoder, caplog):
    with caplog.at_level(logging.WARNING):
        for key, images, answer in (("tar/empty", 1, " "), ("tar/long", 33, "Too many to say anything.")):
            with pytest.raises(SkipSample):
                encoder.encode_sample(stored(key, answer, images=images))
    lines = [record.message for record in caplog.records]
    assert lines[0] == "skipped sample tar/empty: the caption is empty"
    assert lines[1].startswith("skipped sample tar/long: ") and "positions do not fit --seq-length 128" in lines[1]
    good = encoder.encode_sample(stored())
    assert encoder.batch([good]).num_skipped == 2
    assert encoder.batch([good]).num_skipped == 0  # counted once


def answer_of(tokenizer, num_tokens):
    """A text of so many tokens."""
    answer = "a" * 800
    while len(tokenizer(answer)["input_ids"]) > num_tokens:
        answer = answer[:-1]
    assert len(tokenizer(answer)["input_ids"]) == num_tokens
    return answer


# 128 positions: 4 of an image, or with a grid 14: 4 of the base tile, 2 rows of 4 and a newline each. The newline after the
# caption is label only.
@pytest.mark.parametrize("aspect_ratio, picture, room", [("square", (56, 56), 124), ("anyres", (100, 50), 114)])
def test_the_longest_row_that_fits_is_whole_and_one_more_token_is_cut(tokenizer, aspect_ratio, picture, room):
    encoder = make_encoder(tokenizer, aspect_ratio)
    fits, longer = (
        encoder.encode_sample(stored(answer=answer_of(tokenizer, room + more), images=[noise(*picture)]))
        for more in (0, 5)
    )
    assert fits.row_length == longer.row_length == 128 and (fits.is_truncated, longer.is_truncated) == (False, True)
    assert len(longer.text.tokens) == len(fits.text.tokens)
    assert fits.text.is_caption == [False] + [True] * room + [False]
    assert longer.text.is_caption == [False] + [True] * (room + 1)  # a caption's part in the place of the newline
    batch = encoder.batch([fits, longer])
    assert batch.row_lengths.tolist() == [128, 128] and batch.num_truncated == 1


def test_wherever_a_conversation_is_cut_images_and_their_places_agree(tokenizer, caplog):
    turns = [("human", "<image>\none"), ("gpt", "a red ball"), ("human", "<image>\ntwo"), ("gpt", "a blue box")]
    sample = stored(images=2)
    sample.record = {"conversations": [{"from": who, "value": value} for who, value in turns]}
    lengths = {}
    for length in range(1, 120):
        encoder = LlavaTaskEncoder(
            tokenizer,
            image_size=TILE,
            patch_size=14,
            max_sequence_length=length,
            template="qwen_1_5",
            image_aspect_ratio="square",
            grid_pinpoints=PINPOINTS,
            max_tiles=2,
        )
        try:
            batch = encoder.batch([encoder.encode_sample(sample)])
        except SkipSample:
            assert not lengths  # too short for both images; from some length on it fits
            continue
        lengths[length] = batch.row_lengths.item()
        assert (batch.tokens == 3).sum() == len(batch.image_layouts) == 2 and lengths[length] <= length
        assert lengths[length] == batch.tokens.shape[1] + 2 * 3  # an image is 4 positions
    assert len(lengths) > 30 and len(set(lengths.values())) > 15


def test_rsa_takes_one_image_with_a_caption_that_is_left(tokenizer):
    def eligible(**sample):
        return encoder.encode_sample(stored(**sample)).eligible

    encoder = make_encoder(tokenizer, "square")
    assert eligible() and eligible(answer=answer_of(tokenizer, 300))
    assert not eligible(rsa=False) and not eligible(images=0) and not eligible(images=2)
    # In a conversation that is cut before its answer, "\n" and <|im_end|> of the question are learnt, but no caption is left.
    encoder = LlavaTaskEncoder(
        tokenizer,
        image_size=TILE,
        patch_size=14,
        max_sequence_length=60,
        template="qwen_1_5",
        image_aspect_ratio="square",
        grid_pinpoints=PINPOINTS,
        max_tiles=2,
    )
    turns = [
        {"from": "human", "value": "<image>\n" + answer_of(tokenizer, 80)},
        {"from": "gpt", "value": "A red boat."},
    ]
    sample = stored()
    sample.record = {"conversations": turns}
    cut = encoder.encode_sample(sample)
    assert cut.is_truncated and any(cut.text.is_target) and not cut.eligible
    # A caption whose only token that is left is label alone has none in the row.
    for length, is_eligible in ((4, False), (5, True)):
        encoder = make_encoder(tokenizer, "square")
        encoder.max_sequence_length = length
        found = encoder.encode_sample(stored())
        assert found.eligible == is_eligible == bool(encoder.batch([found]).rsa.caption_mask.any())
    encoder = LlavaTaskEncoder(
        tokenizer,
        image_size=TILE,
        patch_size=14,
        max_sequence_length=60,
        template="qwen_1_5",
        image_aspect_ratio="square",
        grid_pinpoints=PINPOINTS,
        max_tiles=2,
    )
    encoder.max_sequence_length = 128
    assert encoder.encode_sample(sample).eligible


def test_a_batch_is_filled_up_with_rows_that_weigh_nothing(tokenizer, caplog):
    encoder = make_encoder(tokenizer, "anyres").of_one_epoch(4, shuffle_buffer_size=1)
    unusable = encoder.encode_sample(stored("bad", answer=""))
    batch = encoder.batch([encoder.encode_sample(stored("good")), unusable])
    assert batch.keys == ["good", "bad", "", ""] and batch.num_skipped == 1 and "skipped sample bad" in caplog.text
    assert batch.tokens.shape[0] == 4 and batch.loss_mask.sum(1).tolist()[1:] == [0, 0, 0]
    assert (
        batch.row_lengths.tolist()[1:]
        == batch.rsa.num_tiles.tolist()[1:]
        == batch.rsa.eligible.tolist()[1:]
        == [0, 0, 0]
    )
    assert torch.equal(batch.images, encoder.encode_sample(stored("good")).tiles)
    empty = encoder.batch([])
    assert empty.tokens.shape == (4, 1) and not empty.loss_mask.any() and empty.images.shape == (0, 3, TILE, TILE)


def test_a_data_set_of_unusable_samples_ends_the_run(encoder):
    for _ in range(99):
        with pytest.raises(SkipSample):
            encoder.encode_sample(stored(answer=""))
    with pytest.raises(FatalSampleError, match="100 samples in a row were skipped; the last: .*the caption is empty"):
        encoder.encode_sample(stored(answer=""))
