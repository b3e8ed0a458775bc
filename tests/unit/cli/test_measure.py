"""The script as a user runs it, on tiny models of each kind, against features and mutual-kNN taken by hand."""

import json
import re
from pathlib import Path

import pytest
import torch

from rsa_megatron.alignment.metrics import METRICS
from rsa_megatron.cli import measure
from rsa_megatron.data.sources.open_pairs import open_pairs, sample
from rsa_megatron.evaluation.hf_models import HFModel
from rsa_megatron.plots.alignment_records import read_alignments
from tests.support import naive_features, tiny_backbones

NUM_PAIRS, NUM_SAMPLES, K = 30, 24, 4
SETTINGS = ("--num-samples", NUM_SAMPLES, "--k", K, "--seeds", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        kind: getattr(tiny_backbones, kind)(root / kind)
        for kind in ("llava_onevision", "internvl", "qwen2_5_vl", "bert")
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for number, image in enumerate(tiny_backbones.pictures(NUM_PAIRS)):
        image.save(folder / f"{number:02d}.png")
        words = tiny_backbones.CAPTIONS[number % 6].split()
        (folder / f"{number:02d}.txt").write_text(
            " ".join(words[number % 3 :] + ["boat"] * (number % 4) + [f"{number}"])
        )
    return folder


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # --store is "features" in it
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def run(*flags, out="out.jsonl") -> list[dict]:
    """The lines that are in the file then."""
    measure.main([*map(str, flags), "--out", out])
    return [json.loads(text) for text in Path(out).read_text().splitlines()]


def scores_by_hand(kind, folder, data) -> list:
    """[seed][row][column]"""
    model, processor = naive_features.reference(folder)
    scores = []
    for seed in (0, 1):
        chosen = sample(open_pairs(data), NUM_SAMPLES, seed)
        images = zip(*[naive_features.image_features(kind, model, processor, pair.image()) for pair in chosen])
        captions = [*zip(*[naive_features.caption_features(model, processor, pair.caption) for pair in chosen])]
        captions = [torch.stack(layer) for layer in captions]
        scores.append(
            [[naive_features.mutual_knn(torch.stack(rows), columns, K) for columns in captions] for rows in images]
        )
    return scores


@pytest.mark.parametrize("kind", ["llava_onevision", "internvl", "qwen2_5_vl"])
def test_every_pair_of_layers_has_the_score_found_by_hand(kind, models, data, capsys):
    (line,) = run("--model", models[kind], "--data", data, *SETTINGS, "--batch-size", 5)
    expected = scores_by_hand(kind, models[kind], data)
    # Counts of neighbours over N * k: equal, as no two neighbours of these random features are as near as 1e-5.
    assert torch.allclose(
        torch.tensor(line["scores"], dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), atol=1e-12
    )
    mean = torch.tensor(expected, dtype=torch.float64).mean(0)
    assert line["best"]["mean"] == pytest.approx(mean.max().item()) and line["last"]["mean"] == pytest.approx(
        mean[-1, -1].item()
    )
    assert line["chance"] == pytest.approx(K / (NUM_SAMPLES - 1)) and line["left_out"] == 0 and line["seeds"] == [0, 1]
    assert (line["rows"], line["columns"], line["row_model"], line["column_model"]) == ("vision", "text", kind, kind)
    assert line["text_reading"] == "caption-alone" and line["revision"].startswith("sha256:")
    assert line["last"]["row"] == f"{len(mean) - 1}" and line["last"]["column"] == f"{len(mean[0]) - 1}"
    (record,) = read_alignments([Path("out.jsonl")])
    assert record.label == kind and record.data == data.name
    printed = capsys.readouterr()
    assert f"{line['best']['mean']:.4f} ± {line['best']['std']:.4f}" in printed.out and "0.1739" in printed.out
    shuffled = line["shuffled"]
    assert shuffled["orders"] == 10 and torch.tensor(shuffled["mean"]).shape == mean.shape
    # Ten orders of 24 samples and two seeds: standard errors of 0.01. The best of all pairs of layers is above each.
    assert (
        shuffled["last"] == pytest.approx(K / (NUM_SAMPLES - 1), abs=0.04)
        and shuffled["last"] == shuffled["mean"][-1][-1]
    )
    assert shuffled["best"] > torch.tensor(shuffled["mean"]).max()
    pairs = mean.numel()
    assert f" {shuffled['best']:.4f} " in printed.out and f" {shuffled['last']:.4f} " in printed.out
    assert (
        f"10 random orders of the samples of one side; of the best pair: the best of all {pairs} pairs" in printed.out
    )
    assert "samples" in printed.err and "a second" in printed.err
    assert not list(Path().rglob("*unfinished*"))


def test_features_are_used_again_and_a_line_takes_the_place_of_its_like(models, data, monkeypatch, capsys):
    command = ("--model", models["internvl"], "--data", data, *SETTINGS)
    first = run(*command)
    bytes_before = {path: path.read_bytes() for path in Path("features").rglob("*") if path.is_file()}
    monkeypatch.setattr(HFModel, "module", property(lambda model: pytest.fail("weights are read")))
    assert run(*command) == first
    assert "already complete" in capsys.readouterr().err
    lines = run(*command, "--label", "other", "--metrics", "mutual-knn", "cka", "rsa")
    assert lines[0] == first[0] and [line["metric"] for line in lines] == ["mutual-knn", "mutual-knn", "cka", "rsa"]
    assert lines[1]["scores"] == first[0]["scores"] and lines[2]["chance"] is None
    assert run(*command) == [*lines[1:], first[0]]
    assert {path: path.read_bytes() for path in Path("features").rglob("*") if path.is_file()} == bytes_before
    stores = sorted(Path("features").glob("*/*"))
    assert run("--features", *reversed(stores), "--k", K, out="stored.jsonl")[0]["scores"] == first[0]["scores"]


def test_a_caption_after_its_image_is_another_reading(models, data, capsys):
    command = ("--model", models["llava_onevision"], "--data", data, *SETTINGS)
    alone, after = run(*command)[0], run(*command, "--text-reading", "multimodal")[1]
    assert after["text_reading"] == "multimodal" and after["scores"] != alone["scores"]
    # The embeddings of the caption have not met the image yet.
    assert [[row[0] for row in seed] for seed in after["scores"]] == [
        [row[0] for row in seed] for seed in alone["scores"]
    ]
    assert "each caption read AFTER ITS IMAGE" in capsys.readouterr().out
    assert len([*Path("features").glob("*/*")]) == 3  # the images' features are the same


def test_two_towers_two_language_models_and_one_of_each(models, data):
    lines = run("--vision", models["qwen2_5_vl"], "--vision", models["internvl"], "--data", data, *SETTINGS)
    lines = run("--language", models["llava_onevision"], "--language", models["bert"], "--data", data, *SETTINGS)
    lines = run(
        "--language",
        models["bert"],
        "--vision",
        models["internvl"],
        "--data",
        data,
        *SETTINGS,
        "--dtype",
        "bfloat16",
        "--store",
        "half",
        "--store-dtype",
        "float16",
        "--data-name",
        "Pairs",
    )
    assert [(line["rows"], line["columns"]) for line in lines] == [
        ("vision", "vision"),
        ("text", "text"),
        ("vision", "text"),
    ]
    assert [line["label"] for line in lines] == [
        "qwen2_5_vl and internvl",
        "llava_onevision and bert",
        "internvl and bert",
    ]
    assert [(len(line["mean"]), len(line["mean"][0])) for line in lines] == [(5, 4), (5, 3), (4, 3)]
    assert [line["text_reading"] for line in lines] == [None, "caption-alone", "caption-alone"] and lines[2][
        "data"
    ] == "Pairs"
    itself = run(
        "--vision", models["internvl"], "--vision", models["internvl"], "--data", data, *SETTINGS, out="itself.jsonl"
    )[0]
    assert [itself["mean"][layer][layer] for layer in range(4)] == [1.0] * 4 and itself["mean"][0][3] < 1


def test_random_vectors_score_by_chance():
    (line,) = run("--random", "--random-dims", 30, 40, "--num-samples", 300, "--k", 10, "--seeds", 4, "--device", "cpu")
    assert line["label"] == "Random" and line["row_layers"] == line["column_layers"] == ["standard normal"]
    assert "30 wide" in line["pooling"] and "40 wide" in line["pooling"]
    # The shares of 1200 rows scatter by sqrt(0.0334 * 0.9666 / 10) = 0.057: the mean's standard error is 0.0016.
    assert line["best"]["mean"] == pytest.approx(10 / 299, abs=0.006) and line["chance"] == pytest.approx(10 / 299)
    assert len({json.dumps(seed) for seed in line["scores"]}) > 1


def test_every_metric_of_random_vectors_has_its_chance_beside_it(capsys):
    command = ("--random", "--random-dims", 500, 700, "--num-samples", 120, "--seeds", 2, "--device", "cpu")
    lines = run(*command, "--metrics", *METRICS)
    assert [line["metric"] for line in lines] == [*METRICS]
    table = capsys.readouterr().out.splitlines()
    for line, printed in zip(lines, table[2:]):
        own, chance = line["best"]["mean"], line["shuffled"]["best"]
        assert f"{chance:.4f}" in printed and line["shuffled"]["last"] == pytest.approx(chance)
        # Unrelated: within what single orders scatter by. CKA and RSA are far from 0, and so is their chance.
        assert own == pytest.approx(chance, abs=0.05, rel=0.02), line["metric"]
    assert (
        lines[1]["best"]["mean"] > 0.7
        and table[-1] == "shuffled: the mean over 10 random orders of the samples of one side"
    )


def test_a_metric_with_too_few_pairs_is_left_out_and_named(capsys):
    command = ("--random", "--random-dims", 30, 40, "--num-samples", 8, "--seeds", 2, "--device", "cpu")
    lines = run(*command, "--k", 3, "--metrics", "svcca", "mutual-knn", "cka")
    assert [line["metric"] for line in lines] == ["mutual-knn", "cka"] and 0 < lines[0]["chance"] <= 1
    printed = capsys.readouterr()
    assert printed.err == "left out: svcca: too few pairs (8; need at least 11)\n" and "svcca" not in printed.out
    assert len(run(*command, "--metrics", "cka", out="no-k.jsonl")) == 1  # k is 10, and cka has none
    for metrics, message in (
        (["svcca"], "error: svcca: too few pairs (8; need at least 11); take more pairs\n"),
        (["cka", "mutual-knn"], "error: --k 10 needs more than 10 samples, for mutual-knn; --num-samples is 8\n"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            run(*command, "--metrics", *metrics, out="none.jsonl")
        assert capsys.readouterr().err == message and not Path("none.jsonl").exists()


def test_pairs_that_are_skipped_may_leave_too_few(models, data, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for number in range(6):
        (broken / f"{number}.txt").write_text(f"a boat {number}")
        image = (data / f"{number:02d}.png").read_bytes()
        (broken / f"{number}.png").write_bytes(b"no image" if number < 2 else image)
    command = ("--model", models["internvl"], "--data", broken, "--num-samples", 6, "--k", 5, "--seeds", 1)
    (line,) = run(*command, "--metrics", "mutual-knn", "cka")
    assert line["metric"] == "cka" and line["left_out"] == 2
    assert "left out: mutual-knn: too few pairs (4; need at least 6)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(*command, out="none.jsonl")
    assert "error: mutual-knn: too few pairs (4; need at least 6); take more" in capsys.readouterr().err


def test_broken_images_are_named_and_left_out_on_both_sides(models, data, tmp_path, capsys):
    for file in data.iterdir():
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    for number in (3, 17):
        (tmp_path / "broken" / f"{number:02d}.png").write_bytes(b"no image")
    command = (
        "--model",
        models["internvl"],
        "--data",
        tmp_path / "broken",
        "--num-samples",
        30,
        "--k",
        K,
        "--seeds",
        1,
    )
    (line,) = run(*command)
    (whole,) = run(
        "--model", models["internvl"], "--data", data, "--num-samples", 30, "--k", K, "--seeds", 1, out="whole.jsonl"
    )
    assert line["left_out"] == 2 and line["chance"] == pytest.approx(K / 27) and line["std"] is None
    assert line["scores"] != whole["scores"]
    printed = capsys.readouterr()
    assert "2 pairs skipped" in printed.out and "truncated" not in printed.err
    assert printed.err.count("skipped: 03: ") == 1 and "17.png: the image cannot be opened" in printed.err
    assert "to retry these, remove features/" in printed.err
    for number in (3, 17):
        for suffix in ("png", "txt"):
            (tmp_path / "broken" / f"{number:02d}.{suffix}").unlink()
    command = [*command[:5], 28, *command[6:]]
    assert run(*command, out="without.jsonl")[0]["scores"] == line["scores"]


def test_captions_that_are_longer_than_a_model_reads_are_counted(models, data, tmp_path, capsys):
    folder = tmp_path / "long"
    folder.mkdir()
    for file in data.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for number in (2, 5, 9):
        (folder / f"{number:02d}.txt").write_text(f"{number} boats " + "and a boat " * 100)
    run("--language", models["bert"], "--vision", models["internvl"], "--data", folder, *SETTINGS[:4], "--seeds", 3)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "truncated" in line]
    assert said == (
        "3 of 30 texts are longer than bert reads and were truncated; texts with the same beginning may have equal features"
    )


def test_what_is_wrong_is_one_line(models, data, capsys):
    internvl, bert = models["internvl"], models["bert"]
    Path("broken.jsonl").write_text("{\n")
    Path("folder").mkdir()
    wrong = {
        (): "name what to measure",
        ("--random", "--model", "x"): "name what to measure.*not --model and --random",
        ("--vision", "x"): "two backbones in total, not 1",
        ("--model", "x"): "--data is needed",
        ("--random", "--data", data): "--data needs models; it cannot be used with --random",
        ("--random", "--k", 24, "--num-samples", 24): "--k 24 needs more than 24 samples",
        ("--random", "--seeds", 0): "--seeds must be at least 1, not 0",
        ("--random", "--random-dims", 3, 0): "--random-dims must be at least 1, not 0",
        ("--random", "--metrics", "x"): "invalid choice: 'x'",
        ("--random", "--text-reading", "multimodal"): "--text-reading multimodal needs --model or --language",
        ("--random", "--device", "nothing"): "--device nothing cannot be used",
        ("--random", "--sedes", 3): "unrecognized arguments: --sedes",
        ("--random", "--out", "folder"): "--out folder is a folder",
        ("--random", "--out", "broken.jsonl"): "broken.jsonl, line 1: broken JSON",
        (
            "--model",
            bert,
            "--data",
            data,
        ): "model_type bert is not supported; supported: llava_onevision, internvl, qwen2_5_vl, llava; name",
        ("--model", "./nowhere", "--data", data): "./nowhere is not a folder",
        ("--model", "nobody/nowhere", "--data", data): "cannot be loaded from the hub",
        (
            "--vision",
            bert,
            "--language",
            bert,
            "--data",
            data,
        ): "bert has no vision tower that can be measured; supported: ",
        (
            "--vision",
            internvl,
            "--language",
            bert,
            "--text-reading",
            "multimodal",
            "--data",
            data,
        ): "needs a vision-language model",
        ("--model", internvl, "--data", data, "--num-samples", 31): "--num-samples 31: only 30 pairs",
        ("--model", internvl, "--data", "missing"): "missing does not exist",
        ("--features", "a", "b"): "a holds no features",
    }
    for flags, message in wrong.items():
        with pytest.raises(SystemExit) as end:
            measure.main([*map(str, flags), *(() if "--out" in flags else ("--out", "none.jsonl"))])
        printed = capsys.readouterr().err
        assert end.value.code == 2, flags
        assert printed.startswith("error: ") and printed.count("\n") == 1 and re.search(message, printed), (
            flags,
            printed,
        )
    assert not Path("none.jsonl").exists()


def test_features_of_another_run_are_not_mixed_in(models, data, capsys):
    command = ("--model", models["internvl"], "--data", data, *SETTINGS)
    run(*command)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(*command, "--dtype", "bfloat16")
    assert (
        "has features with dtype float32, this run has bfloat16: name another --store, or remove"
        in capsys.readouterr().err
    )
