"""v and t of each family of models, read while a whole batch goes forward, are those of one sample at a time, computed from the parts."""

import pytest
import torch

from rsa_megatron import RSAConfig
from rsa_megatron.huggingface.families import FAMILIES, Family, count_images, find_images, find_model, mean_of_grid
from rsa_megatron.huggingface.pairs import CAUSES, read_pairs, read_states
from tests.support import trainer_models
from tests.support.trainer_models import IMAGE, VIDEO, Sample

pytestmark = pytest.mark.slow

TILED = ("llava_onevision", "llava_next", "internvl")
WHOLE = ("llava", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe")
CASES = [(name, pooling) for name in TILED for pooling in ("base", "full")] + [(name, "base") for name in WHOLE]
# float32 sums over a batch's tokens, and over one image's, in another order.
CLOSE = dict(rtol=2e-5, atol=2e-5)


def pairs_of(model, batch, config=RSAConfig(), family=None):
    inner, family = find_model(model, family)
    with read_states(inner, family) as states:
        model(**{name: x for name, x in batch.items() if not name.startswith("rsa_")})
    return read_pairs(inner, family, states, batch, config)


def left_out(pairs) -> dict[str, int]:
    return {cause: int(n) for cause, n in zip(CAUSES, pairs.left_out) if n}


@pytest.mark.parametrize("name, pooling", CASES)
def test_v_and_t_are_those_of_one_sample_at_a_time(name, pooling):
    kind = trainer_models.tiny(name)
    model, chosen = kind.build(), trainer_models.samples(4)
    pairs = pairs_of(model, kind.batch(model, chosen), RSAConfig(image_pooling=pooling))
    expected = torch.stack([kind.v_of_one(model, sample.pictures[0], pooling) for sample in chosen])
    torch.testing.assert_close(pairs.v_nD, expected, **CLOSE)
    torch.testing.assert_close(pairs.t_nE, torch.stack([kind.t_of_one(model, x) for x in chosen]), **CLOSE)
    assert pairs.v_nD.requires_grad and pairs.t_nE.requires_grad and left_out(pairs) == {}
    # Negative controls: another picture, and a token more.
    assert not torch.allclose(pairs.v_nD, expected.roll(1, dims=0), rtol=1e-2)
    longer = [sample._replace(caption=sample.caption + (5,)) for sample in chosen]
    assert not torch.allclose(pairs.t_nE, torch.stack([kind.t_of_one(model, x) for x in longer]), rtol=1e-2)


def test_qwens_tower_gives_tokens_in_the_order_of_windows():
    """So that the test above says something of it: means over rows of the image as it lies would not be those of its own tokens."""
    kind = trainer_models.tiny("qwen2_5_vl")
    model = kind.build()
    inner, family = find_model(model)
    pixels = kind.pixels([2])
    with read_states(inner, family) as states, torch.no_grad():
        inner.get_image_features(**pixels)
    with torch.no_grad():
        merged = inner.visual.merger(states["vision"])
        in_order = inner.visual(pixels["pixel_values"], pixels["image_grid_thw"]).pooler_output
    assert not torch.allclose(merged, in_order) and torch.allclose(merged.sum(0), in_order.sum(0), atol=1e-4)


@pytest.mark.parametrize("name", ["llava_onevision", "internvl", "qwen2_5_vl", "qwen3_vl"])
def test_samples_without_exactly_one_image_are_left_out_and_counted(name):
    kind = trainer_models.tiny(name)
    model = kind.build()
    one, other, *_ = trainer_models.samples(2)
    chosen = [Sample((4, 3), (5, 6)), one, Sample((), (11, 12, 13)), other, Sample((1,), ())]
    pairs = pairs_of(model, kind.batch(model, chosen))
    assert left_out(pairs) == {"several_images": 1, "no_image": 1, "no_caption": 1}
    expected = torch.stack([kind.v_of_one(model, number) for number in (0, 1)])
    torch.testing.assert_close(pairs.v_nD, expected, **CLOSE)
    texts = pairs_of(model, kind.batch(model, [Sample((), (11, 12, 13))]))
    assert texts.v_nD is None and texts.t_nE.shape == (0, 48) and left_out(texts) == {"no_image": 1}


def test_a_batch_says_which_samples_take_part_and_which_tokens_are_captions():
    kind = trainer_models.tiny("qwen2_5_vl")
    model, chosen = kind.build(), trainer_models.samples(3)
    batch = kind.batch(model, chosen)
    mask = batch["labels"] != -100
    mask[1, mask[1].nonzero()[0]] = False  # without its first token
    pairs = pairs_of(model, batch | dict(rsa_eligible=torch.tensor([1, 1, 0]), rsa_caption_mask=mask.long()))
    assert left_out(pairs) == {"not_eligible": 1} and len(pairs.v_nD) == 2
    whole = pairs_of(model, batch)
    torch.testing.assert_close(pairs.t_nE[0], whole.t_nE[0])
    assert not torch.allclose(pairs.t_nE[1], whole.t_nE[1], rtol=1e-2)


def test_a_sample_with_a_video_is_left_out_and_the_images_are_read():
    kind = trainer_models.tiny("qwen2_5_vl")
    model, chosen = kind.build(), trainer_models.samples(3)
    batch = kind.batch(model, chosen)
    # The second sample's picture is a video.
    of_image = torch.repeat_interleave(torch.arange(3), batch["image_grid_thw"].prod(dim=1))
    video = batch["image_grid_thw"][1:2]
    batch.update(
        pixel_values_videos=batch["pixel_values"][of_image == 1],
        video_grid_thw=video,
        pixel_values=batch["pixel_values"][of_image != 1],
        image_grid_thw=batch["image_grid_thw"][[0, 2]],
    )
    for name, value in (("input_ids", VIDEO), ("mm_token_type_ids", 2)):
        is_image = batch["input_ids"][1] == (IMAGE if name == "input_ids" else VIDEO)
        batch[name][1, is_image] = value
    pairs = pairs_of(model, batch)
    assert left_out(pairs) == {"video": 1}
    expected = torch.stack([kind.v_of_one(model, number) for number in (0, 2)])
    torch.testing.assert_close(pairs.v_nD, expected, **CLOSE)


def test_an_image_that_the_decoder_does_not_attend_is_none():
    kind = trainer_models.tiny("qwen3_vl")
    model = kind.build()
    batch = kind.batch(model, trainer_models.samples(2))
    batch["attention_mask"][0, batch["input_ids"][0] == IMAGE] = 0  # as collators hide one behind a text
    assert left_out(pairs_of(model, batch)) == {"no_image": 1}


def test_another_family_is_one_line():
    kind = trainer_models.tiny("qwen2_5_vl")
    model, chosen = kind.build(), trainer_models.samples(2)
    model.model.config.model_type = model.config.model_type = "my_vl"
    with pytest.raises(ValueError, match="does not know the model type my_vl.*rsa_family=Family"):
        find_model(model)
    mine = Family("visual.merger", mean_of_grid)
    pairs = pairs_of(model, kind.batch(model, chosen), family=mine)
    torch.testing.assert_close(pairs.v_nD[1], kind.v_of_one(model, 1), **CLOSE)
    with pytest.raises(ValueError, match="`language_model` and `visual.nothing`"):
        find_model(model, Family("visual.nothing", mean_of_grid))


def test_images_that_cannot_be_told_apart_are_an_error():
    kind = trainer_models.tiny("llava_onevision")
    model = kind.build()
    batch = kind.batch(model, [Sample((0, 1), (5, 6)), Sample((2,), (7, 8))])
    assert batch["batch_num_images"].tolist() == [2, 1]
    in_one = batch["input_ids"][0] == IMAGE
    first, last = in_one.nonzero()[[0, -1]].flatten().tolist()
    between = torch.arange(first, last + 1)[~in_one[first : last + 1]]
    for name, value in (("input_ids", IMAGE), ("labels", -100)):  # the images follow one another, and text comes later
        row = batch[name][0]
        kept = torch.ones(row.shape, dtype=torch.bool)
        kept[between] = False
        batch[name][0] = torch.cat([row[: last + 1][kept[: last + 1]], row[between], row[last + 1 :]])
    assert left_out(pairs_of(model, batch)) == {"several_images": 1}  # batch_num_images says it
    del batch["batch_num_images"]
    with pytest.raises(ValueError, match="3 images and 2 runs of image tokens.*batch_num_images"):
        count_images(find_images(batch, model.config), 3, batch)


def test_every_family_is_tested():
    assert FAMILIES.keys() == {*TILED, *WHOLE}
