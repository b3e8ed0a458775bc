"""Grids and token counts are transformers': known numbers, thousands of random sizes, and the very tokens kept."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaOnevisionProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

from rsa_megatron import anyres, recipes
from rsa_megatron.anyres import ImageLayout, choose_grid

ONEVISION = [(384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)]
# name: tile in pixels, side in tokens, max_tiles, pinpoints. The last two shrink often, and have even sides.
CASES = {
    "onevision": (384, 27, 9, ONEVISION),
    "stage 1.5": (384, 27, 9, [(384 * rows, 384 * columns) for rows, columns in recipes.stage_1_5()["image_grids"]]),
    "wide lists": (58, 4, 2, [(58, 58), (58, 116), (116, 58), (58, 232), (116, 174), (174, 116)]),
    "tiny": (28, 2, 2, [(28, 56), (56, 28), (56, 56), (84, 56), (84, 84), (28, 140)]),
}

# (height, width): tokens of SigLIP-so400m-384 and anyres_max_9, as transformers packs them.
GOLDEN = {
    (384, 384): 1485,
    (480, 640): 2929,
    (640, 480): 2943,
    (336, 500): 1836,
    (899, 1024): 6551,
    (1080, 1920): 7269,
    (1920, 1080): 7317,
    (100, 1000): 1467,
    (1200, 1200): 7371,
    (1872, 832): 7329,
    (2304, 2304): 7371,
    (1404, 1152): 8765,  # 1.21 times 9 tiles: shrinking begins above a ratio of 1.1
}


def tokens(height, width, pinpoints=ONEVISION, tile=384, side=27, max_tiles=9):
    return ImageLayout(height, width, *choose_grid(height, width, pinpoints, tile)).num_tokens(side, max_tiles)


def is_nothing_in_any_grid(height, width, pinpoints):
    scales = [min(pinpoint[0] / height, pinpoint[1] / width) for pinpoint in pinpoints]
    return min(height, width) * max(scales) < 1


def random_sizes(count):
    """Of all shapes: each side even on a logarithmic scale, and a square now and then."""
    rng = random.Random(0)
    for _ in range(count):
        height, width = (int(2 ** rng.uniform(0, 12)) for _ in range(2))
        yield (height, height) if rng.random() < 0.1 else (height, width)


@pytest.mark.parametrize("size, expected", GOLDEN.items())
def test_known_token_counts(size, expected):
    assert tokens(*size) == expected


@pytest.mark.parametrize(
    "name, wrong, size, expected, count",
    [
        ("round", lambda number, digits: number, (1872, 832), 7329, 7317),  # as LLaVA's own code
        ("_LEAST_SHRINKING", 1.0, (768, 1920), 8073, 7308),
        ("_LEAST_SHRINKING", 1.4, (1080, 1920), 7269, 10929),
    ],
)
def test_another_arithmetic_gives_other_counts(monkeypatch, name, wrong, size, expected, count):
    assert tokens(*size) == expected
    monkeypatch.setattr(anyres, name, wrong, raising=False)
    assert tokens(*size) == count


@pytest.mark.parametrize("case", CASES)
def test_grids_and_counts_are_those_of_transformers(case):
    tile, side, max_tiles, pinpoints = CASES[case]
    processor = object.__new__(LlavaOnevisionProcessor)  # its arithmetic alone, without tokenizer and files
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=[list(pinpoint) for pinpoint in pinpoints])
    processor.num_image_tokens = side**2
    processor.vision_aspect_ratio = f"anyres_max_{max_tiles}"
    num_narrow = num_shrunk = 0
    for height, width in random_sizes(4000):
        num_narrow += is_nothing_in_any_grid(height, width, pinpoints)
        grid = choose_grid(height, width, pinpoints, tile)
        best = select_best_resolution((height, width), pinpoints)
        assert grid == (best[0] // tile, best[1] // tile), (height, width)
        layout = ImageLayout(height, width, *grid)
        expected = processor._get_number_of_features(height, width, tile, tile)
        assert layout.num_tokens(side, max_tiles) == expected, (height, width)
        packed = layout.packed_grid(side, max_tiles)
        num_shrunk += packed.shrunk_rows < packed.rows
    assert num_narrow and (num_shrunk > 100 or case == "stage 1.5"), (num_narrow, num_shrunk)


@pytest.mark.parametrize("case", CASES)
def test_the_tokens_kept_are_those_that_transformers_keeps(case):
    tile, side, max_tiles, pinpoints = CASES[case]
    for height, width in random_sizes(300):
        rows, columns = choose_grid(height, width, pinpoints, tile)
        positions = torch.arange(side**2 * rows * columns).view(1, side * rows, side * columns)
        expected = unpad_image(positions, (height, width))[0]
        kept = ImageLayout(height, width, rows, columns).packed_grid(side, max_tiles)
        actual = positions[0, kept.top : kept.top + kept.rows, kept.left : kept.left + kept.columns]
        assert torch.equal(actual, expected), (height, width)


# As LLaVA-NeXT's scripts write them, (width, height): of its mid stage, and of its last ("(1x1),...,(6x6)").
LLAVA_NEXT = {
    "1.5": [(384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152)],
    "2": [(384 * columns, 384 * rows) for columns in range(1, 7) for rows in range(1, 7)],
}


def best_as_llava_next_has_it(width: int, height: int, resolutions: list[tuple[int, int]]) -> tuple[int, int]:
    """From its description: scaled to fit, most of the image's own pixels win, then least area left over, then the first."""
    best, most, least = None, -1, math.inf
    for columns, rows in resolutions:
        factor = min(columns / width, rows / height)
        pixels = min(int(width * factor) * int(height * factor), width * height)
        left_over = columns * rows - pixels
        if (pixels, -left_over) > (most, -least):
            best, most, least = (columns, rows), pixels, left_over
    return best


def num_other_grids(stage: str, grids: list[tuple[int, int]]) -> int:
    """Of 20,000 sizes, most of them small, those for which (rows, columns) of `grids` are not LLaVA-NeXT's."""
    rng, pinpoints = random.Random(0), [(384 * rows, 384 * columns) for rows, columns in grids]
    count = 0
    for _ in range(20_000):
        height, width = (rng.randint(1, rng.choice((384, 768, 3000))) for _ in range(2))
        best_width, best_height = best_as_llava_next_has_it(width, height, LLAVA_NEXT[stage])
        count += choose_grid(height, width, pinpoints, 384) != (best_height // 384, best_width // 384)
    return count


def test_the_stages_grids_are_those_that_llava_next_takes():
    grids = recipes.stage_1_5()["image_grids"]
    assert num_other_grids("1.5", grids) == 0
    # In the model's own list no two grids that tie are the best: its order is Hugging Face's.
    assert num_other_grids("2", [(rows, columns) for rows in range(1, 7) for columns in range(1, 7)]) == 0
    # Images below a tile's size keep all their pixels in either of the small grids: the order decides.
    assert num_other_grids("1.5", [(1, 2), (2, 1), *grids[2:]]) > 2000


def test_of_grids_as_good_the_first_is_taken():
    pinpoints = [(384, 768), (768, 384)]
    assert choose_grid(100, 100, pinpoints, 384) == (1, 2)
    assert choose_grid(100, 100, pinpoints[::-1], 384) == (2, 1)


def test_a_base_tile_alone_is_its_tokens_and_perhaps_a_newline():
    assert ImageLayout(480, 640).num_tokens(27, 9) == 730
    assert ImageLayout(480, 640, newline=0).num_tokens(27, 9) == 729
    assert (ImageLayout(480, 640).num_tiles, ImageLayout(480, 640, 2, 3).num_tiles) == (1, 7)


def test_a_layout_comes_back_from_its_numbers():
    layout = ImageLayout(480, 640, 2, 3, newline=0)
    assert ImageLayout(*layout.as_numbers()) == layout and layout.as_numbers() == (480, 640, 2, 3, 0, 0)


def test_an_embedding_stands_in_as_many_positions_as_are_said():
    layout = ImageLayout.of_embedding(576)
    assert ImageLayout(*layout.as_numbers()) == layout
    assert layout.num_tiles == 1 and layout.num_tokens(27, 9) == layout.num_tokens(2, 1) == 576
