"""The script as a user runs it: on embeddings that are there and on a tiny CLIP, to operators, rows and shards."""

import re
from pathlib import Path

import numpy
import pytest
import torch

from rsa_megatron.cli import realign
from rsa_megatron.evaluation.feature_store import FeatureStore
from rsa_megatron.realign.baselines import load_operator
from rsa_megatron.realign.realign import ReAlign, normalise_rows
from tests.support import tiny_backbones, tiny_dual_encoders
from tests.support.realign_runs import GIVEN, SAME, assert_same_operator, error, read_back, rows, run, write_rows

ROOT = Path(realign.__file__).parent.parent


def test_fit_and_transform_are_the_operator_of_the_same_rows(capsys):
    images_ND, texts_ND = write_rows()
    run("fit", *GIVEN, "--out", "op")
    expected = ReAlign.fit(images_ND, texts_ND)
    assert_same_operator(load_operator("op"), expected)
    printed = capsys.readouterr().out
    assert (
        f"s = {expected.scale:.6f}" in printed
        and "images: 50 of images.npy" in printed
        and "texts:  37 of texts.safetensors" in printed
    )
    gaps = {name: float(gap) for name, gap in re.findall(r"^    (\S.*\S) +([\d.e-]+)$", printed, re.MULTILINE)}
    moved_ND = expected.transform(texts_ND.double())
    mean_D = normalise_rows(images_ND).mean(0)
    by_hand = {
        "as they are": normalise_rows(texts_ND).mean(0),
        "after anchor": ReAlign.fit(images_ND, texts_ND, steps=("anchor",)).transform(texts_ND.double()).mean(0),
        "after anchor and trace": ReAlign.fit(images_ND, texts_ND, steps=("anchor", "trace"))
        .transform(texts_ND.double())
        .mean(0),
        "after realign": moved_ND.mean(0),
    }
    assert list(gaps) == list(by_hand)
    for name, text_D in by_hand.items():
        assert gaps[name] == pytest.approx((text_D - mean_D).norm().item(), rel=1e-5)  # six digits are printed
    # T = 1 - |mean|^2 for unit rows.
    floor = ((2 - mean_D.square().sum() - normalise_rows(texts_ND).mean(0).square().sum()) / 37).sqrt().item()
    assert f"for 37 other images and texts expect about sqrt((Tx + Ty) / n) = {floor:.6g} by chance" in printed
    run(
        "transform",
        "--operator",
        "op",
        "--texts",
        "texts.safetensors:texts",
        "--out",
        "moved.npy",
        "--out-dtype",
        "float64",
    )
    torch.testing.assert_close(torch.from_numpy(numpy.load("moved.npy")), moved_ND, **SAME)
    run(
        "transform",
        "--operator",
        "op",
        "--texts",
        "texts.safetensors",
        "--out",
        "sub/half.npy",
        "--out-dtype",
        "float16",
    )
    half = numpy.load("sub/half.npy")
    assert (
        half.dtype == numpy.float16 and numpy.abs(half - moved_ND.numpy()).max() < 2**-11
    )  # half a unit in the last place of 1
    assert not list(Path().rglob("*unfinished*"))


@pytest.mark.parametrize(
    "flags, check",
    [
        (("--method", "none"), lambda operator: operator.method == "none"),
        (("--method", "mean-shift"), lambda operator: operator.method == "mean-shift"),
        (("--method", "c3", "--sigma", "0.2"), lambda operator: operator.sigma == 0.2),
        (("--method", "blockwise"), lambda operator: operator.method == "blockwise"),
        (
            ("--steps", "anchor", "centroid"),
            lambda operator: operator.steps == ("anchor", "centroid") and operator.scale == 1,
        ),
    ],
)
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
def test_texts_that_are_all_equal_are_reported(method, capsys):
    """T21: epsilon keeps s finite; what it is then says nothing of the data."""
    write_rows()
    numpy.save("equal.npy", numpy.full((9, 7), 0.3))
    run("fit", "--images", "images.npy", "--texts", "equal.npy", "--method", method, "--out", "op")
    printed = capsys.readouterr().out
    assert f"method {method}; all texts are equal" in printed and ("only from epsilon" in printed) == (
        method == "realign"
    )


def test_broken_images_are_skipped_and_reported(clip, capsys):
    Path("pairs").mkdir()
    for number, image in enumerate(tiny_backbones.pictures(8)):
        image.save(f"pairs/{number}.png")
        Path(f"pairs/{number}.txt").write_text(f"A boat {number}.")
    Path("pairs/3.png").write_bytes(b"no image")
    run("transform", "--encoder", clip, "--data", "pairs", "--side", "image", "--out", "out", "--val", 2)
    printed = capsys.readouterr()
    assert "skipped: 3: " in printed.err and "skipped: 1 that could not be embedded" in printed.out
    assert sum(len(part) for part in read_back("out").values()) == 7


def test_bad_rows_are_named_by_key(capsys):
    x_ND = rows(9)
    x_ND[[2, 5]] = 0
    keys = [f"scene {number}" for number in range(9)]
    store = FeatureStore.create("made", {"keys": keys, "layers": ["embedding"], "store_dtype": "float32"})
    store.append(keys, {"embedding": x_ND})
    store.finish()
    write_rows()
    message = error(capsys, "fit", "--images", "made", "--texts", "texts.safetensors", "--out", "op")
    assert "made, layer embedding: 2 of 9 embeddings have no direction" in message and "scene 2, scene 5" in message
    assert not Path("op").exists()
    numpy.save("good.npy", rows(9).numpy())
    run("fit", "--images", "good.npy", "--texts", "good.npy", "--out", "op")
    assert "scene 2, scene 5" in error(capsys, "transform", "--operator", "op", "--texts", "made", "--out", "x.npy")
    assert not list(Path().glob("x.npy*"))


def test_an_operator_of_another_encoder_is_rejected(clip, shards, tmp_path, capsys):
    write_rows()
    run("fit", "--encoder", clip, "--data", shards, "--out", "op")
    siglip = tiny_dual_encoders.siglip(tmp_path / "siglip")
    flags = ("--operator", "op", "--data", shards, "--side", "text", "--out", "out", "--encoder")
    message = error(capsys, "transform", *flags, siglip)
    assert re.search("fitted on embeddings of clip sha256:.*is of siglip sha256:.*: fit one on these", message)
    message = error(capsys, "transform", "--operator", "op", "--texts", "texts.safetensors", "--out", "x.npy")
    assert "the operator moves rows of 24 numbers, and texts.safetensors, tensor texts has 7" in message
    assert not Path("out").exists() and not list(Path().glob("*unfinished*"))


def test_images_and_texts_the_other_way_round_are_seen(clip, shards, capsys):
    """Stored features say which side they are of."""
    run("fit", "--encoder", clip, "--data", shards, "--out", "op")
    images, texts = (str(next(Path("features").rglob(f"*-{side}-embedding"))) for side in ("vision", "text"))
    run("fit", "--images", images, "--texts", texts, "--out", "again")
    assert "these are of the side text" in error(
        capsys, "fit", "--images", texts, "--texts", images, "--out", "swapped"
    )
    assert "these are of the side vision" in error(
        capsys, "transform", "--operator", "op", "--texts", images, "--out", "x.npy"
    )
    assert not Path("swapped").exists() and not Path("x.npy").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (("fit", "--out", "o"), "name two sets of embeddings, --images and --texts, or an --encoder and its --data"),
        (("fit", "--images", "images.npy", "--out", "o"), "name two sets of embeddings"),
        (("fit", *GIVEN, "--data", "x", "--out", "o"), "name two sets of embeddings"),
        (("fit", *GIVEN, "--num-samples", "3", "--out", "o"), "--num-samples needs --encoder"),
        (("fit", *GIVEN, "--sigma", "0.1", "--out", "o"), "--sigma is an option of --method c3"),
        (
            ("fit", *GIVEN, "--method", "c3", "--steps", "anchor", "--out", "o"),
            "--steps is an option of --method realign",
        ),
        (("fit", *GIVEN, "--steps", "trace", "anchor", "--out", "o"), "in this order"),
        (("fit", *GIVEN, "--batch-size", "0", "--out", "o"), "--batch-size must be at least 1"),
        (("fit", *GIVEN, "--device", "cuda:99", "--out", "o"), "--device cuda:99 cannot be used"),
        (("fit", *GIVEN, "--out", "there"), "there already exists"),
        (
            ("fit", "--images", "images.npy", "--texts", "wide.npy", "--out", "o"),
            "images.npy has 7 numbers a row and wide.npy has 8: .*--encoder",
        ),
        (("fit", "--images", "images.npy", "--texts", "none.npy", "--out", "o"), "none.npy not found"),
        (
            ("fit", "--images", "images.npy", "--texts", "nan.npy", "--out", "o"),
            r"nan.npy: 1 of 3 embeddings have no direction: 1 hold NaN \(row 1\);",
        ),
        (("fit", "--encoder", "none", "--data", "images.npy", "--out", "o"), "none|images.npy"),
        (("transform", "--texts", "texts.safetensors", "--out", "x.npy"), "--operator is needed for texts"),
        (("transform", "--operator", "there", "--texts", "texts.safetensors", "--out", "x.npy"), "there.*manifest"),
        (("transform", "--operator", "there", "--texts", "texts.safetensors", "--out", "x"), "--out x: name an .npy"),
        (
            ("transform", "--operator", "there", "--encoder", "e", "--data", "d", "--side", "image", "--out", "o"),
            "images are unchanged",
        ),
        (("transform", "--images", "images.npy", "--out", "x.npy"), "so there is nothing to write"),
        (("transform", "--encoder", "e", "--data", "d", "--out", "o"), "--encoder needs --side text or --side image"),
        (("transform", "--encoder", "e", "--side", "image", "--out", "o"), "--encoder needs --data"),
        (("transform", "--out", "o"), "name one of --encoder, --texts and --images"),
        (("transform", "--images", "images.npy", "--texts", "images.npy", "--out", "o"), "not --texts and --images"),
        (
            ("transform", "--operator", "there", "--texts", "images.npy", "--keys", "k", "--out", "x.npy"),
            "--keys needs --texts or --images and --data",
        ),
        (
            ("transform", "--images", "images.npy", "--data", "mixture.yaml", "--out", "o"),
            "is a mixture: name each of its data sets",
        ),
        (("fit", "--nonsense"), "nonsense|--out"),
    ],
)
def test_bad_input_is_one_line(flags, message, capsys):
    write_rows()
    numpy.save("wide.npy", rows(5, width=8).numpy())
    numpy.save("nan.npy", numpy.array([[1.0] * 7, [float("nan")] * 7, [2.0] * 7]))
    Path("there").mkdir()
    Path("there/file").write_text("")
    Path("mixture.yaml").write_text("{__module__: megatron.energon, __class__: MetadatasetV2, splits: {}}")
    assert re.search(message, error(capsys, *flags))
    assert not Path("o").exists() and not Path("x.npy").exists()
