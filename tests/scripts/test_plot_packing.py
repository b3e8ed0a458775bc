"""Packed and unpacked runs come out of their metrics.jsonl: losses against samples, scores after each stage."""

import json

import plot_packing
import pytest
from PIL import Image

from tests.support import command

SCORES = {"lm loss validation": 0.5, "mutual-knn validation": 0.12, "mutual-knn chance validation": 0.01}


def run(*arguments):
    return command.run(plot_packing.main, *arguments)


def write(folder, losses, samples, **scores):
    folder.mkdir(parents=True)
    lines = [{"iteration": step, "lm loss": loss, "samples": samples} for step, loss in enumerate(losses, 1)]
    lines.append({"iteration": len(losses), **SCORES, **scores})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_seed(folder, shift):
    write(folder / "stage1", [2.0], 32)
    for stage, knn in (("stage1_5", 0.13), ("stage2", 0.14)):
        write(
            folder / "unpacked" / stage, [1.0 - step / 24 for step in range(24)], 32, **{"mutual-knn validation": knn}
        )
        score = {"mutual-knn validation": knn + shift}
        write(folder / "packed" / stage, [1.0 - step / 12 for step in range(12)], 64, **score)


@pytest.fixture
def seeds(tmp_path):
    for seed, shift in ((1, 0.01), (2, 0.03)):
        write_seed(tmp_path / f"seed-{seed}", shift)
    write(tmp_path / "before", [], 0, **{"mutual-knn validation": 0.11})
    return [tmp_path / "seed-1", tmp_path / "seed-2"]


def test_losses_are_drawn_against_samples_and_scores_told(seeds, tmp_path):
    before, out, jsonl = tmp_path / "before" / "metrics.jsonl", tmp_path / "p.png", tmp_path / "p.jsonl"
    result = run("--runs", *seeds, "--before", before, "--out", out, "--jsonl", jsonl)
    assert result.returncode == 0, result.stderr
    first, second = map(json.loads, jsonl.read_text().splitlines())
    # 24 steps of 32 samples, two a point; 12 of 64, one a point: at the same samples.
    unpacked, packed = (first["curves"][arm]["stage 2"] for arm in ("unpacked", "packed"))
    assert (
        [samples for samples, _ in unpacked] == [samples for samples, _ in packed] == [32 + 64 * n for n in range(12)]
    )
    assert unpacked[0][1] == pytest.approx(1 - 0.5 / 24) and packed[0][1] == 1.0
    assert (first["seed"], second["seed"]) == ("seed-1", "seed-2")
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("  ")]
    assert rows[0][:3] == ["unpacked,", "2", "seeds"]
    means = [float(word) for word in rows[1] if word[0] == "0"]  # mean and spread of each column
    assert means[::2] == [0.11, 0.12, 0.15, 0.16] and means[1::2] == pytest.approx([0, 0, 0.0141, 0.0141])
    assert Image.open(out).width > 1000
    again = run("--from-jsonl", jsonl, "--out", tmp_path / "again.png")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.png").read_bytes() == out.read_bytes()
    assert again.stdout.splitlines()[:-1] == result.stdout.splitlines()[:-1]


def test_a_run_without_samples_is_named(seeds, tmp_path):
    file = seeds[0] / "packed" / "stage2" / "metrics.jsonl"
    file.write_text('{"iteration": 1, "lm loss": 1.0}\n')
    result = run("--runs", seeds[0], "--out", tmp_path / "p.png")
    assert "seed-1/packed: metrics.jsonl has iterations without `samples`" in result.stderr
    file.unlink()
    assert "error: [Errno 2]" in run("--runs", seeds[0], "--out", tmp_path / "p.png").stderr
