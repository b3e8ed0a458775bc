"""The small CLIP of `make revision`: it learns, the same from one seed, and its folder is one of transformers'."""

import json

import pytest
import torch
import train_dual_encoder
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from rsa_megatron.data.sources.open_pairs import open_pairs
from rsa_megatron.evaluation.dual_encoders import ImageEmbedder, TextEmbedder
from rsa_megatron.evaluation.hf_models import HFModel

STEPS = 14


def flags(demo, out, *more) -> list[str]:
    small = [
        "--num-samples",
        "64",
        "--num-held-out",
        "32",
        "--batch-size",
        "16",
        "--steps",
        str(STEPS),
        "--width",
        "32",
        "--projection-dim",
        "24",
        "--lr",
        "3e-3",
    ]
    return [
        "--data",
        str(demo / "data" / "captions"),
        "--tokenizer",
        str(demo / "tokenizer"),
        "--out",
        str(out),
        *small,
        *map(str, more),
    ]


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """A folder that it has written, and the losses on the way."""
    out, losses = tmp_path_factory.mktemp("dual encoder") / "model", []
    train = train_dual_encoder.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dual_encoder, "train", lambda *given: losses.extend(train(*given)))
        train_dual_encoder.main(flags(demo, out))
    return out, losses


def test_it_learns(trained):
    _, losses = trained
    assert len(losses) == STEPS
    # At first about ln 16 = 2.8 plus what a temperature of 0.01 makes of chance.
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4])


def test_its_folder_loads_in_transformers_and_in_realign(trained, demo):
    folder, _ = trained
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pairs = open_pairs(demo / "data" / "captions")
    batch = [pairs[index] for index in range(4)]
    tokens = tokenizer([pair.caption for pair in batch], padding=True, truncation=True, return_tensors="pt")
    pixels = processor([pair.image() for pair in batch], return_tensors="pt")
    with torch.inference_mode():
        text_ND = model.get_text_features(**tokens).pooler_output
        image_ND = model.get_image_features(**pixels).pooler_output
    hf = HFModel(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    for embedder, expected_ND in ((ImageEmbedder(hf), image_ND), (TextEmbedder(hf), text_ND)):
        actual_ND = embedder.features([embedder.prepare(pair) for pair in batch])["embedding"]
        assert actual_ND.shape == (4, 24)
        # The same model, to the rounding of float32.
        torch.testing.assert_close(actual_ND, expected_ND, rtol=1e-5, atol=1e-5)
    # A text is read at its end token, wherever padding begins: CLIP's other rule, the highest token id, would be another place.
    alone_1D = model.get_text_features(**tokenizer([batch[0].caption], return_tensors="pt")).pooler_output
    torch.testing.assert_close(alone_1D[0], text_ND[0], rtol=1e-5, atol=1e-5)
    assert model.config.text_config.eos_token_id == tokenizer.eos_token_id != 2


def test_the_batch_it_trains_on_is_what_transformers_makes_of_the_pairs(trained, demo):
    folder, _ = trained
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), train_dual_encoder.image_processor()
    pairs = open_pairs(demo / "data" / "captions")
    examples = train_dual_encoder.read(pairs, 12, tokenizer, processor, "pairs")
    rows = torch.tensor([7, 2, 11])
    actual = train_dual_encoder.batch(examples, rows, processor)
    batch = [pairs[int(row)] for row in rows]
    expected = tokenizer([pair.caption for pair in batch], padding=True, return_tensors="pt")["input_ids"]
    assert torch.equal(actual["input_ids"], expected)
    pixels = processor([pair.image() for pair in batch], return_tensors="pt").pixel_values
    # Kept as uint8: half of 1/255, over a deviation of 0.26, is 0.008.
    torch.testing.assert_close(actual["pixel_values"], pixels, rtol=0, atol=0.008)


def test_one_seed_gives_one_model_and_another_another(trained, demo, tmp_path):
    folder, _ = trained
    for name, seed in (("same", 1), ("other", 2)):
        train_dual_encoder.main(flags(demo, tmp_path / name, "--seed", seed))
    bytes_of = [(path / "model.safetensors").read_bytes() for path in (folder, tmp_path / "same", tmp_path / "other")]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]


def test_figures_are_those_of_the_definition(trained):
    """Two pairs of known embeddings: each image has its own caption nearest, then none."""

    class Planted:
        logit_scale = torch.zeros(())

        def __init__(self, text_ND):
            self.image_embeds, self.text_embeds = torch.eye(2, 3), text_ND

        def __call__(self, **_):
            return self

    examples = train_dual_encoder.Examples(torch.zeros(2, 3, 2, 2, dtype=torch.uint8), torch.tensor([[1, 0], [1, 0]]))
    processor = train_dual_encoder.image_processor()
    right = torch.tensor([[0.8, 0, 0.6], [0, 0.8, 0.6]])
    figures = train_dual_encoder.evaluate(Planted(right), examples, processor)
    # Means (.5, .5, 0) and (.4, .4, .6): a gap of sqrt(.01 + .01 + .36), and s of sqrt((1 - .5) / (1 - .68)).
    assert (
        figures["R@1"] == 1
        and figures["centroid gap"] == pytest.approx(0.38**0.5)
        and figures["s"] == pytest.approx(1.25)
    )
    assert train_dual_encoder.evaluate(Planted(right.flip(0)), examples, processor)["R@1"] == 0


def test_what_is_there_is_not_done_again_and_nothing_else_is_taken_for_it(trained, demo, capsys):
    folder, _ = trained
    before = (folder / "model.safetensors").stat().st_mtime_ns
    train_dual_encoder.main(flags(demo, folder))
    assert "there already" in capsys.readouterr().out and (folder / "model.safetensors").stat().st_mtime_ns == before
    assert json.loads((folder / "figures.json").read_text())["pairs"] == 32
    with pytest.raises(SystemExit, match=f"error: {folder} holds something of other settings"):
        train_dual_encoder.main(flags(demo, folder, "--seed", 3))
    with pytest.raises(SystemExit, match="error: .*nowhere does not exist"):
        train_dual_encoder.main(["--data", "nowhere", *flags(demo, folder.with_name("x"))[2:]])
