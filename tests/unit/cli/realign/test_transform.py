"""realign.py transform: shards of embeddings are those that transformers and the operator give, sample by sample."""

import json
import re
from pathlib import Path

import numpy
import pytest
import torch
import transformers
import yaml

from rsa_megatron.cli.show_sample import stored_samples
from rsa_megatron.realign.baselines import load_operator
from rsa_megatron.realign.realign import ReAlign, normalise_rows
from tests.support import tiny_backbones
from tests.support.realign_runs import NUM_PAIRS, _opened, error, read_back, rows, run

pytestmark = pytest.mark.slow


@torch.no_grad()
def by_hand(clip, shards) -> dict[str, dict[str, tuple]]:
    """part -> id -> (the record's turns, its text's embedding, its image's or None), all of unit length."""
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    processor = transformers.AutoImageProcessor.from_pretrained(clip, backend="pil")
    found = {}
    for part in ("train", "val"):
        found[part] = {}
        for sample in stored_samples(shards, part):
            content = json.loads(sample.record)
            tokens = tokenizer([content["conversations"][-1]["value"]], truncation=True, return_tensors="pt")
            text_D = normalise_rows(model.get_text_features(**tokens).pooler_output)[0]
            image_D = None
            for data in sample.images.values():
                pixels = processor([transformers.image_utils.load_image(_opened(data))], return_tensors="pt")
                image_D = normalise_rows(model.get_image_features(**pixels).pooler_output)[0]
            found[part][content["id"]] = (content["conversations"], text_D, image_D)
    return found


def test_an_encoder_and_shards_become_shards_of_embeddings(clip, shards, capsys):
    expected = by_hand(clip, shards)
    run("fit", "--encoder", clip, "--data", shards, "--out", "op", "--device", "cpu")
    train = expected["train"].values()
    images_ND = torch.stack([image_D for _, _, image_D in train if image_D is not None])
    texts_ND = torch.stack([text_D for _, text_D, _ in train])
    operator = load_operator("op")
    assert (operator.num_images, operator.num_texts) == (len(images_ND), len(texts_ND)) and len(images_ND) < len(
        texts_ND
    )
    # Embeddings of float32: 1e-6 of their length, and a batch is multiplied in another order than a sample alone.
    by_rows = ReAlign.fit(images_ND, texts_ND)
    assert operator.scale == pytest.approx(by_rows.scale, rel=1e-4)
    torch.testing.assert_close(operator.projected_mean_D, by_rows.projected_mean_D, atol=1e-5, rtol=0)
    assert operator.about["text_encoder"].startswith("clip sha256:") and operator.about["images"].endswith(
        "layer embedding"
    )

    run("transform", "--operator", "op", "--encoder", clip, "--data", shards, "--side", "text", "--out", "texts")
    assert "already complete" in capsys.readouterr().err  # the texts of the part train are those of `fit`
    for part, found in read_back("texts").items():
        assert list(found) == list(expected[part])
        for name, (turns, row_D) in found.items():
            told, text_D, image_D = expected[part][name]
            torch.testing.assert_close(row_D.double(), operator.transform(text_D[None])[0], atol=1e-5, rtol=0)
            assert turns[-1] == told[-1] and turns[0]["value"] == "<image>\nWhat?"  # also where there was no image
    run("transform", "--encoder", clip, "--data", shards, "--side", "image", "--out", "images", "--shard-size", "10")
    for part, found in read_back("images").items():
        assert list(found) == [name for name, (_, _, image_D) in expected[part].items() if image_D is not None]
        for name, (turns, row_D) in found.items():
            told, text_D, image_D = expected[part][name]
            assert turns == told and row_D.norm() == pytest.approx(1, abs=1e-6)
            torch.testing.assert_close(row_D.double(), image_D, atol=1e-5, rtol=0)
            assert (row_D - text_D).norm() > 0.1  # negative control: images are not texts
    for folder in ("texts", "images"):
        assert yaml.safe_load(Path(folder, ".nv-meta", "dataset.yaml").read_text())["subflavors"] == {"rsa": True}
    assert not list(Path().rglob("*unfinished*"))


def test_texts_alone_and_other_texts_than_the_images(clip, shards):
    Path("c.txt").write_text(
        "\n".join(f"{caption} {number}" for number in range(4) for caption in tiny_backbones.CAPTIONS)
    )
    run(
        "fit",
        "--encoder",
        clip,
        "--data",
        shards,
        "--text-data",
        "c.txt",
        "--num-samples",
        12,
        "--out",
        "op",
        "--store-dtype",
        "float16",
    )
    operator = load_operator("op")
    assert (operator.num_images, operator.num_texts) == (12, 12) and "c.txt-train-12x1" in operator.about["texts"]
    assert {path.name for path in Path("features").iterdir()} == {"shards-train-12x1", "c.txt-train-12x1"}
    run(
        "transform",
        "--operator",
        "op",
        "--encoder",
        clip,
        "--data",
        "c.txt",
        "--side",
        "text",
        "--out",
        "out",
        "--val",
        3,
        "--rsa",
    )
    found = read_back("out")
    assert [len(found[part]) for part in ("train", "val")] == [21, 3]
    turns, row_D = (
        found["train"]["c.txt, line 1"] if "c.txt, line 1" in found["train"] else found["val"]["c.txt, line 1"]
    )
    assert turns[0]["value"].startswith("<image>\n") and turns[1]["value"] == f"{tiny_backbones.CAPTIONS[0]} 0"
    assert yaml.safe_load(Path("out/.nv-meta/dataset.yaml").read_text())["subflavors"] == {"rsa": True}


def test_embeddings_made_elsewhere_are_looked_up_by_id(shards, capsys):
    """Rows in another order than the samples, named by their records' ids."""
    ids = [f"id.{number}" for number in reversed(range(NUM_PAIRS))]
    x_ND = rows(NUM_PAIRS, seed=5) * 9
    numpy.save("x.npy", x_ND.numpy())
    Path("ids").write_text("\n".join(ids) + "\n")
    run("fit", "--images", "x.npy", "--texts", "x.npy", "--method", "none", "--out", "op")
    run("transform", "--operator", "op", "--texts", "x.npy", "--keys", "ids", "--data", shards, "--out", "texts")
    run("transform", "--images", "x.npy", "--keys", "ids", "--data", shards, "--out", "images")
    unit_ND = normalise_rows(x_ND)
    for folder, count in (("texts", NUM_PAIRS), ("images", NUM_PAIRS - 6)):
        found = {name: row_D for part in read_back(folder).values() for name, (_, row_D) in part.items()}
        assert len(found) == count
        for name, row_D in found.items():
            torch.testing.assert_close(row_D.double(), unit_ND[ids.index(name)], atol=1e-7, rtol=0)
    flags = ("transform", "--operator", "op", "--texts", "x.npy", "--data", shards, "--out", "no")
    assert "does not map its rows to samples: pass --keys FILE, one id per line" in error(capsys, *flags)
    Path("ids").write_text("\n".join(ids[:-1]) + "\n")
    assert "29 keys for 30 embeddings" in error(capsys, *flags, "--keys", "ids")
    Path("ids").write_text("\n".join([*ids[:-2], "x", "y"]) + "\n")
    assert re.search(
        r"2 keys \(id.\d+, id.\d+\) have no embedding, of 30 samples", error(capsys, *flags, "--keys", "ids")
    )
    Path("ids").write_text("\n".join([*ids[:-1], "id.7"]) + "\n")
    assert "1 key (id.7) has more than one embedding" in error(capsys, *flags, "--keys", "ids")
    assert not Path("no").exists() and not list(Path().rglob("*unfinished*"))
