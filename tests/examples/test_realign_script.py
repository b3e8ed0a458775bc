"""The script as a user runs it: on embeddings that are there and on a tiny CLIP, to operators, rows and shards."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import prepare_shards
import pytest
import realign
import torch
import transformers
import yaml
from safetensors.torch import save_file
from show_sample import stored_samples

from rsa_megatron.alignment.realign import ReAlign, unit_rows
from rsa_megatron.alignment.realign_baselines import load_operator
from rsa_megatron.measurement.feature_store import FeatureStore
from tests.support import processes, tiny_backbones, tiny_dual_encoders

ROOT = Path(realign.__file__).parent.parent
NUM_PAIRS, NUM_HELD_OUT = 30, 6
# Sums of some hundred numbers of size 1 in float64, in another order (T16).
SAME = dict(atol=1e-12, rtol=1e-12)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_dual_encoders.clip(tmp_path_factory.mktemp("encoder") / "clip")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Pairs, and texts of no image."""
    folder = tmp_path_factory.mktemp("data")
    told = []
    for number, image in enumerate(tiny_backbones.pictures(NUM_PAIRS)):
        image.save(folder / f"{number}.png")
        words = tiny_backbones.CAPTIONS[number % 6].split()
        answer = " ".join(words[number % 3 :] + ["boat"] * (number % 4) + [f"{number}"])
        is_pair = number % 5 != 0
        turns = [{"from": "human", "value": "<image>\nWhat?" if is_pair else "What?"}, {"from": "gpt", "value": answer}]
        told.append({"id": f"id.{number}", "conversations": turns} | ({"image": f"{number}.png"} if is_pair else {}))
    (folder / "d.json").write_text(json.dumps(told))
    flags = ["--rsa", f"--val={NUM_HELD_OUT}", "--shard-size=9"]
    prepare_shards.main(["pack", str(folder / "d.json"), "--out", str(folder / "shards"), *flags])
    return folder / "shards"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # --store is "features" in it
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(transformers.utils.logging, "set_verbosity_error", lambda: None)


def rows(count, width=7, seed=0, shift=0.0) -> torch.Tensor:
    x_ND = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    x_ND[:, 0] += shift
    return x_ND


def write_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """images.npy and texts.safetensors, of different numbers of rows, and with a gap between them."""
    images_ND, texts_ND = rows(50, seed=1, shift=2.0), rows(37, seed=2, shift=-1.0)
    numpy.save("images.npy", images_ND.numpy())
    save_file({"texts": texts_ND}, "texts.safetensors")
    return images_ND, texts_ND


GIVEN = ("--images", "images.npy", "--texts", "texts.safetensors")


def run(*flags) -> None:
    realign.main([*map(str, flags)])


def error(capsys, *flags) -> str:
    """What is wrong, in one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*flags)
    assert end.value.code == 2
    told = ("left out: ", "samples, ", "texts are longer than")
    lines = [line for line in capsys.readouterr().err.splitlines() if not any(words in line for words in told)]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def assert_same_operator(actual, expected) -> None:
    for field in dataclasses.fields(expected):
        one, other = getattr(actual, field.name), getattr(expected, field.name)
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(one, other, **SAME)
        elif isinstance(other, float):
            assert one == pytest.approx(other, rel=1e-12)
        elif field.name != "about":
            assert one == other


def test_fit_and_transform_are_the_operator_of_the_same_rows(capsys):
    images_ND, texts_ND = write_rows()
    run("fit", *GIVEN, "--out", "op")
    expected = ReAlign.fit(images_ND, texts_ND)
    assert_same_operator(load_operator("op"), expected)
    printed = capsys.readouterr().out
    assert f"s = {expected.scale:.6f}" in printed and "images: 50 of images.npy" in printed and "texts:  37 of texts.safetensors" in printed
    gaps = {name: float(gap) for name, gap in re.findall(r"^    (\S.*\S) +([\d.e-]+)$", printed, re.MULTILINE)}
    moved_ND = expected.transform(texts_ND.double())
    mean_D = unit_rows(images_ND).mean(0)
    by_hand = {
        "as they are": unit_rows(texts_ND).mean(0),
        "after anchor": ReAlign.fit(images_ND, texts_ND, steps=("anchor",)).transform(texts_ND.double()).mean(0),
        "after anchor and trace": ReAlign.fit(images_ND, texts_ND, steps=("anchor", "trace")).transform(texts_ND.double()).mean(0),
        "after realign": moved_ND.mean(0),
    }
    assert list(gaps) == list(by_hand)
    for name, text_D in by_hand.items():
        assert gaps[name] == pytest.approx((text_D - mean_D).norm().item(), rel=1e-5)  # six digits are printed
    # T = 1 - |mean|^2 for unit rows.
    floor = ((2 - mean_D.square().sum() - unit_rows(texts_ND).mean(0).square().sum()) / 37).sqrt().item()
    assert f"on 37 other images and texts chance alone leaves about sqrt((Tx + Ty) / n) = {floor:.6g}" in printed
    run("transform", "--operator", "op", "--texts", "texts.safetensors:texts", "--out", "moved.npy", "--out-dtype", "float64")
    torch.testing.assert_close(torch.from_numpy(numpy.load("moved.npy")), moved_ND, **SAME)
    run("transform", "--operator", "op", "--texts", "texts.safetensors", "--out", "sub/half.npy", "--out-dtype", "float16")
    half = numpy.load("sub/half.npy")
    assert half.dtype == numpy.float16 and numpy.abs(half - moved_ND.numpy()).max() < 2**-11  # half a unit in the last place of 1
    assert not list(Path().rglob("*unfinished*"))


@pytest.mark.parametrize("flags, check", [
    (("--method", "none"), lambda operator: operator.method == "none"),
    (("--method", "mean-shift"), lambda operator: operator.method == "mean-shift"),
    (("--method", "c3", "--sigma", "0.2"), lambda operator: operator.sigma == 0.2),
    (("--method", "blockwise"), lambda operator: operator.method == "blockwise"),
    (("--steps", "anchor", "centroid"), lambda operator: operator.steps == ("anchor", "centroid") and operator.scale == 1),
])  # fmt: skip
def test_other_methods(flags, check, capsys):
    write_rows()
    run("fit", *GIVEN, "--out", "op", *flags)
    operator = load_operator("op")
    assert check(operator) and operator.about["images"] == "images.npy"
    printed = capsys.readouterr().out
    assert "s = " in printed and ("after" in printed) == ("none" not in flags)
    run("transform", "--operator", "op", "--texts", "texts.safetensors", "--out", "moved.npy")
    assert numpy.linalg.norm(numpy.load("moved.npy"), axis=1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("method", ["realign", "mean-shift"])
def test_texts_that_are_all_equal_are_told(method, capsys):
    """T21: epsilon keeps s finite; what it is then says nothing of the data."""
    write_rows()
    numpy.save("equal.npy", numpy.full((9, 7), 0.3))
    run("fit", "--images", "images.npy", "--texts", "equal.npy", "--method", method, "--out", "op")
    printed = capsys.readouterr().out
    assert f"method {method}; all texts are equal" in printed and ("epsilon alone" in printed) == (method == "realign")


def run_on_a_rank(folder, flags) -> str:
    os.chdir(folder)
    run(*flags)
    return processes.output()


def test_ranks_give_the_operator_of_one_process(tmp_path):
    write_rows()
    run("fit", *GIVEN, "--out", "one")
    outputs = processes.run(run_on_a_rank, 3, tmp_path, ["fit", *GIVEN, "--out", "three"])
    assert_same_operator(load_operator("three"), load_operator("one"))
    assert [output.count("s = ") for output in outputs] == [1, 0, 0] and "after realign" in outputs[0]
    # Negative control: a rank's rows alone give another one.
    images_ND, texts_ND = torch.from_numpy(numpy.load("images.npy")), rows(37, seed=2, shift=-1.0)
    with pytest.raises(AssertionError):
        assert_same_operator(ReAlign.fit(images_ND[:16], texts_ND), load_operator("one"))


def test_what_is_wrong_on_one_rank_ends_all_and_is_said_once(tmp_path):
    write_rows()
    numpy.save("images.npy", numpy.concatenate([numpy.ones((40, 7)), numpy.zeros((3, 7))]))  # the last rank's share
    with pytest.raises(processes.Failed) as end:
        processes.run(run_on_a_rank, 3, tmp_path, ["fit", *GIVEN, "--out", "bad"])
    assert end.value.output.count("error: image embeddings: rank 2: images.npy: 3 of 15 embeddings have no direction") == 1
    assert "SystemExit: 2" in str(end.value) and not Path("bad").exists()
    with pytest.raises(processes.Failed) as end:
        processes.run(run_on_a_rank, 2, tmp_path, ["fit", "--encoder", "none", "--data", "none", "--out", "bad"])
    assert end.value.output.count("error: none is not there") == 1


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
            text_D = unit_rows(model.get_text_features(**tokens).pooler_output)[0]
            image_D = None
            for data in sample.images.values():
                pixels = processor([transformers.image_utils.load_image(_opened(data))], return_tensors="pt")
                image_D = unit_rows(model.get_image_features(**pixels).pooler_output)[0]
            found[part][content["id"]] = (content["conversations"], text_D, image_D)
    return found


def _opened(data: bytes):
    from PIL import Image

    return Image.open(io.BytesIO(data))


def read_back(folder) -> dict[str, dict[str, tuple]]:
    """part -> id -> (turns, embedding)"""
    found = {}
    for part in ("train", "val"):
        samples = [(json.loads(sample.record), sample.images["npy"]) for sample in stored_samples(folder, part)]
        rows_D = [torch.from_numpy(numpy.load(io.BytesIO(data))) for _, data in samples]
        found[part] = {content["id"]: (content["conversations"], row_D) for (content, _), row_D in zip(samples, rows_D)}
    return found


def test_an_encoder_and_shards_become_shards_of_embeddings(clip, shards, capsys):
    expected = by_hand(clip, shards)
    run("fit", "--encoder", clip, "--data", shards, "--out", "op", "--device", "cpu")
    train = expected["train"].values()
    images_ND = torch.stack([image_D for _, _, image_D in train if image_D is not None])
    texts_ND = torch.stack([text_D for _, text_D, _ in train])
    operator = load_operator("op")
    assert (operator.num_images, operator.num_texts) == (len(images_ND), len(texts_ND)) and len(images_ND) < len(texts_ND)
    # Embeddings of float32: 1e-6 of their length, and a batch is multiplied in another order than a sample alone.
    by_rows = ReAlign.fit(images_ND, texts_ND)
    assert operator.scale == pytest.approx(by_rows.scale, rel=1e-4)
    torch.testing.assert_close(operator.projected_mean_D, by_rows.projected_mean_D, atol=1e-5, rtol=0)
    assert operator.about["text_encoder"].startswith("clip sha256:") and operator.about["images"].endswith("layer embedding")

    run("transform", "--operator", "op", "--encoder", clip, "--data", shards, "--side", "text", "--out", "texts")
    assert "there already" in capsys.readouterr().err  # the texts of the part train are those of `fit`
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
    Path("c.txt").write_text("\n".join(f"{caption} {number}" for number in range(4) for caption in tiny_backbones.CAPTIONS))
    run("fit", "--encoder", clip, "--data", shards, "--text-data", "c.txt", "--num-samples", 12, "--out", "op", "--store-dtype", "float16")
    operator = load_operator("op")
    assert (operator.num_images, operator.num_texts) == (12, 12) and "c.txt-train-12x1" in operator.about["texts"]
    assert {path.name for path in Path("features").iterdir()} == {"shards-train-12x1", "c.txt-train-12x1"}
    run("transform", "--operator", "op", "--encoder", clip, "--data", "c.txt", "--side", "text", "--out", "out", "--val", 3, "--rsa")
    found = read_back("out")
    assert [len(found[part]) for part in ("train", "val")] == [21, 3]
    turns, row_D = found["train"]["c.txt, line 1"] if "c.txt, line 1" in found["train"] else found["val"]["c.txt, line 1"]
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
    unit_ND = unit_rows(x_ND)
    for folder, count in (("texts", NUM_PAIRS), ("images", NUM_PAIRS - 6)):
        found = {name: row_D for part in read_back(folder).values() for name, (_, row_D) in part.items()}
        assert len(found) == count
        for name, row_D in found.items():
            torch.testing.assert_close(row_D.double(), unit_ND[ids.index(name)], atol=1e-7, rtol=0)
    flags = ("transform", "--operator", "op", "--texts", "x.npy", "--data", shards, "--out", "no")
    assert "does not say which sample a row is of: name a file of an id a line, --keys" in error(capsys, *flags)
    Path("ids").write_text("\n".join(ids[:-1]) + "\n")
    assert "29 keys for 30 embeddings" in error(capsys, *flags, "--keys", "ids")
    Path("ids").write_text("\n".join([*ids[:-2], "x", "y"]) + "\n")
    assert re.search(r"2 keys \(id.\d+, id.\d+\) have no embedding, of 30 samples", error(capsys, *flags, "--keys", "ids"))
    Path("ids").write_text("\n".join([*ids[:-1], "id.7"]) + "\n")
    assert "1 key (id.7) has more than one embedding" in error(capsys, *flags, "--keys", "ids")
    assert not Path("no").exists() and not list(Path().rglob("*unfinished*"))


def test_broken_images_are_left_out_and_said(clip, capsys):
    Path("pairs").mkdir()
    for number, image in enumerate(tiny_backbones.pictures(8)):
        image.save(f"pairs/{number}.png")
        Path(f"pairs/{number}.txt").write_text(f"A boat {number}.")
    Path("pairs/3.png").write_bytes(b"no image")
    run("transform", "--encoder", clip, "--data", "pairs", "--side", "image", "--out", "out", "--val", 2)
    printed = capsys.readouterr()
    assert "left out: 3: " in printed.err and "left out: 1 that could not be embedded" in printed.out
    assert sum(len(part) for part in read_back("out").values()) == 7


def test_bad_rows_are_named_by_key(capsys):
    x_ND = rows(9)
    x_ND[[2, 5]] = 0
    keys = [f"scene {number}" for number in range(9)]
    store = FeatureStore.create("made", {"keys": keys, "layers": ["embedding"], "store_dtype": "float32"})
    store.append(keys, {"embedding": x_ND})
    store.finish()
    write_rows()
    said = error(capsys, "fit", "--images", "made", "--texts", "texts.safetensors", "--out", "op")
    assert "made, layer embedding: 2 of 9 embeddings have no direction" in said and "scene 2, scene 5" in said
    assert not Path("op").exists()
    numpy.save("good.npy", rows(9).numpy())
    run("fit", "--images", "good.npy", "--texts", "good.npy", "--out", "op")
    assert "scene 2, scene 5" in error(capsys, "transform", "--operator", "op", "--texts", "made", "--out", "x.npy")
    assert not list(Path().glob("x.npy*"))


def test_an_operator_of_another_encoder_is_refused(clip, shards, tmp_path, capsys):
    write_rows()
    run("fit", "--encoder", clip, "--data", shards, "--out", "op")
    siglip = tiny_dual_encoders.siglip(tmp_path / "siglip")
    flags = ("--operator", "op", "--data", shards, "--side", "text", "--out", "out", "--encoder")
    said = error(capsys, "transform", *flags, siglip)
    assert re.search("fitted on embeddings of clip sha256:.*is of siglip sha256:.*: fit one on these", said)
    said = error(capsys, "transform", "--operator", "op", "--texts", "texts.safetensors", "--out", "x.npy")
    assert "the operator moves rows of 24 numbers, and texts.safetensors, tensor texts has 7" in said
    assert not Path("out").exists() and not list(Path().glob("*unfinished*"))


def test_images_and_texts_the_other_way_round_are_seen(clip, shards, capsys):
    """Stored features say which side they are of."""
    run("fit", "--encoder", clip, "--data", shards, "--out", "op")
    images, texts = (str(next(Path("features").rglob(f"*-{side}-embedding"))) for side in ("vision", "text"))
    run("fit", "--images", images, "--texts", texts, "--out", "again")
    assert "these are of the side text" in error(capsys, "fit", "--images", texts, "--texts", images, "--out", "swapped")
    assert "these are of the side vision" in error(capsys, "transform", "--operator", "op", "--texts", images, "--out", "x.npy")
    assert not Path("swapped").exists() and not Path("x.npy").exists()


@pytest.mark.parametrize("flags, said", [
    (("fit", "--out", "o"), "name two sets of embeddings, --images and --texts, or an --encoder and its --data"),
    (("fit", "--images", "images.npy", "--out", "o"), "name two sets of embeddings"),
    (("fit", *GIVEN, "--data", "x", "--out", "o"), "name two sets of embeddings"),
    (("fit", *GIVEN, "--num-samples", "3", "--out", "o"), "--num-samples goes with --encoder"),
    (("fit", *GIVEN, "--sigma", "0.1", "--out", "o"), "--sigma is an option of --method c3"),
    (("fit", *GIVEN, "--method", "c3", "--steps", "anchor", "--out", "o"), "--steps is an option of --method realign"),
    (("fit", *GIVEN, "--steps", "trace", "anchor", "--out", "o"), "in this order"),
    (("fit", *GIVEN, "--batch-size", "0", "--out", "o"), "--batch-size must be at least 1"),
    (("fit", *GIVEN, "--device", "cuda:99", "--out", "o"), "--device cuda:99 cannot be used"),
    (("fit", *GIVEN, "--out", "there"), "there is there already"),
    (("fit", "--images", "images.npy", "--texts", "wide.npy", "--out", "o"),
     "images.npy has 7 numbers a row and wide.npy has 8: .*--encoder"),
    (("fit", "--images", "images.npy", "--texts", "none.npy", "--out", "o"), "none.npy is not there"),
    (("fit", "--images", "images.npy", "--texts", "nan.npy", "--out", "o"),
     r"nan.npy: 1 of 3 embeddings have no direction: 1 hold NaN \(row 1\);"),
    (("fit", "--encoder", "none", "--data", "images.npy", "--out", "o"), "none|images.npy"),
    (("transform", "--texts", "texts.safetensors", "--out", "x.npy"), "--operator is needed for texts"),
    (("transform", "--operator", "there", "--texts", "texts.safetensors", "--out", "x.npy"), "there.*manifest"),
    (("transform", "--operator", "there", "--texts", "texts.safetensors", "--out", "x"), "--out x: name an .npy"),
    (("transform", "--operator", "there", "--encoder", "e", "--data", "d", "--side", "image", "--out", "o"), "images stay as they are"),
    (("transform", "--images", "images.npy", "--out", "x.npy"), "there is nothing to write"),
    (("transform", "--encoder", "e", "--data", "d", "--out", "o"), "--encoder and --side go together"),
    (("transform", "--encoder", "e", "--side", "image", "--out", "o"), "--encoder needs --data"),
    (("transform", "--out", "o"), "name one of --encoder, --texts and --images"),
    (("transform", "--images", "images.npy", "--texts", "images.npy", "--out", "o"), "not --texts and --images"),
    (("transform", "--operator", "there", "--texts", "images.npy", "--keys", "k", "--out", "x.npy"), "--keys goes with"),
    (("transform", "--images", "images.npy", "--data", "mixture.yaml", "--out", "o"), "is a mixture: name each of its data sets"),
    (("fit", "--nonsense"), "nonsense|--out"),
])  # fmt: skip
def test_bad_input_is_one_line(flags, said, capsys):
    write_rows()
    numpy.save("wide.npy", rows(5, width=8).numpy())
    numpy.save("nan.npy", numpy.array([[1.0] * 7, [float("nan")] * 7, [2.0] * 7]))
    Path("there").mkdir()
    Path("there/file").write_text("")
    Path("mixture.yaml").write_text("{__module__: megatron.energon, __class__: MetadatasetV2, splits: {}}")
    assert re.search(said, error(capsys, *flags))
    assert not Path("o").exists() and not Path("x.npy").exists()


def test_help_names_every_command():
    result = subprocess.run([sys.executable, ROOT / "examples" / "realign.py", "--help"], capture_output=True, text=True,
                            env=os.environ | {"COLUMNS": "200"})  # fmt: skip
    assert result.returncode == 0 and all(name in result.stdout for name in ("fit", "transform", "report"))
