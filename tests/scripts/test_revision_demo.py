"""`make revision`: what it plans, what it makes of logs, and all of it once for real on next to nothing."""

import json
import random

import numpy
import prepare_notes
import pytest
import revision
import revision_plan
import revision_results as results
import torch
import yaml
from revision_plan import ARMS, MOVED, PAIRED, UNTRAINED, Arm

from rsa_megatron.data.prepare.embedding_shards import EmbeddingInfo, EmbeddingTable, write_embedding_shards
from rsa_megatron.data.sources.open_pairs import open_pairs

pytestmark = pytest.mark.usefixtures("preloaded_commands")


@pytest.fixture
def args(tmp_path):
    return revision.parse(
        ["--demo", str(tmp_path / "demo"), "--results", str(tmp_path / "results"), "--seeds", "1", "2", "--arms", *ARMS]
    )


def test_every_job_comes_once_and_after_what_it_needs(args):
    jobs = revision_plan.plan(args)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names) and len({job.command for job in jobs}) == len(jobs)
    for place, job in enumerate(jobs):
        assert set(job.needs) <= set(names[:place])
    assert {(job.arm, job.seed) for job in jobs if isinstance(job, Arm)} == {
        (arm, seed) for arm in ARMS for seed in (1, 2)
    }


def test_an_arm_differs_from_another_by_its_data_and_by_nothing_else(args):
    bare = {}
    for job in revision_plan.plan(args):
        if isinstance(job, Arm) and job.arm != UNTRAINED and job.seed == 2:
            command = list(job.command)
            for flag in ("--data-path", "--save", "--load"):
                del command[command.index(flag) : command.index(flag) + 2]
            bare[job.arm] = command
    assert set(bare) == {*MOVED, PAIRED} and len(set(map(tuple, bare.values()))) == 1


def test_statistics_are_unpaired_and_every_arm_is_judged_on_the_same_real_images(args, demo, tmp_path):
    args = revision.parse(["--demo", str(demo), "--out", str(tmp_path)])
    revision_plan.write_mixtures(args)
    images, texts = (set(open_pairs(tmp_path / f"{name}.yaml", split="train").keys) for name in ("images", "texts"))
    assert len(images) == len(texts) == 120 and not images & texts
    splits = [yaml.safe_load(revision_plan.mixture(args, 1, arm).read_text())["splits"] for arm in (*MOVED, PAIRED)]
    assert len({split["val"]["path"] for split in splits}) == 1 and len(
        {split["train"]["path"] for split in splits}
    ) == len(splits)
    # What is trained on are the captions that the statistics of text are of.
    assert all(split["train"]["subset"] == {"range": ["50%", "100%"]} for split in splits)


def test_notes_tell_what_is_in_the_scene_and_nothing_else():
    contents = [
        "theme farm",
        "count 2",
        "word HAY",
        "thing barn",
        "colour red",
        "red barn",
        "barn on the left",
        "thing tree",
        "colour green",
        "green tree",
        "tree at the top",
    ]
    expected = {"farm.", "2.", "HAY.", "red barn.", "barn on the left.", "green tree.", "tree at the top."}
    told = [prepare_notes.notes(contents, f"sample {number}") for number in range(300)]
    assert set().union(*told) == expected
    # One caption in five has none, one note in five is left out: of 300 and some 1680, to four standard deviations.
    assert sum(not notes for notes in told) == pytest.approx(60, abs=28)
    assert sum(map(len, told)) == pytest.approx(
        300 * 0.8 * 0.8 * 7, abs=4 * (300 * 7 * 0.64 * 0.36 + 300 * 0.16 * 5.6**2) ** 0.5
    )
    assert len({tuple(notes) for notes in told if len(notes) == 7}) > 10  # in any order
    assert told[0] == prepare_notes.notes(contents, "sample 0")


def test_a_mistake_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match=f"error: {tmp_path}/data/captions is missing: `make revision` makes it"):
        revision.main(["--demo", str(tmp_path)])
    with pytest.raises(SystemExit):
        revision.parse(["--held-out", "100"])
    assert "--held-out 100 is no multiple of the batch, 32" in capsys.readouterr().err


def planted(arm: str, seed: int, images: float, own: float | None) -> dict:
    encoder = {"pairs": 1000, "R@1": 0.2, "centroid gap": 0.6, "s": 0.95}
    return {
        "kind": "revision",
        "arm": arm,
        "seed": seed,
        "images": images,
        "own": own,
        "training": own,
        "centroid gap": own,
        "curve": [] if own is None else [[10, images + 0.1], [20, images]],
        "encoder": encoder,
        "iterations": 20,
        "held out": 64,
        "seconds": 1.0,
    }


def test_the_table_compares_arms_seed_by_seed():
    lines = [planted(UNTRAINED, 1, 0.9, None), planted(UNTRAINED, 2, 1.0, None)]
    lines += [planted("raw text", 1, 0.5, 0.3), planted("raw text", 2, 0.6, 0.3)]
    lines += [planted("ReAlign", 1, 0.4, 0.35), planted("ReAlign", 2, 0.48, 0.35)]
    rows = {
        row.split(" | ")[0].strip("| "): [cell.strip() for cell in row.strip("|").split(" | ")[1:]]
        for row in results.table_of(lines).splitlines()
        if row.startswith("|")
    }
    # 0.4 - 0.5 and 0.48 - 0.6: taken seed by seed, as the seeds differ more than the arms do.
    assert rows["ReAlign"][:2] == ["0.4400 ± 0.0566 (0.400, 0.480)", "-0.1100 ± 0.0141 (-0.100, -0.120)"]
    assert rows["raw text"][1] == "–" and rows["raw text"][3] == "0.2500 ± 0.0707 (0.200, 0.300)"
    assert rows[UNTRAINED][2] == "–"
    page = results.draw(lines)
    left, right = page.axes[:2]
    drawn = sorted(
        value for line in left.lines if line.get_label() == results.IMAGES["label"] for value in line.get_xdata()
    )
    assert drawn == [0.4, 0.48, 0.5, 0.6]  # an untrained projector's would leave no room for these
    assert any(list(line.get_ydata()) == pytest.approx([0.54, 0.44]) for line in right.lines)  # ReAlign's mean


def test_the_gap_of_an_arm_is_that_of_its_held_out_rows(tmp_path):
    """Two data sets of planted rows: their means on the unit sphere are what counts, whatever the rows' lengths."""
    draw = random.Random(0)
    for name, row in (("images", [3.0, 0.0]), ("texts", [0.0, 0.5])):
        told = {
            part: [
                EmbeddingInfo(
                    f"{part}{number}", number, [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
                )
                for number in range(4)
            ]
            for part in ("train", "val")
        }
        rows = [[draw.gauss(0, 1), 1.0]] * 4 + [row] * 4  # those of train must not be taken
        keys = [sample.key for samples in told.values() for sample in samples]
        write_embedding_shards(tmp_path / name, told, EmbeddingTable(keys, numpy.array(rows)), rsa=False)
    assert results.held_out_rows(tmp_path / "texts").tolist() == [[0.0, 0.5]] * 4
    assert results.gap_of(tmp_path / "texts", tmp_path / "images") == pytest.approx(2**0.5, abs=1e-6)
    assert results.held_out_rows(tmp_path / "images").dtype == torch.float64


def test_all_of_it_on_next_to_nothing(demo, tmp_path, monkeypatch, capsys):
    """One seed and two arms of two iterations each; what is done is not done again."""
    python = revision_plan.python
    small = ("--num-samples", 64, "--num-held-out", 32, "--width", 32)
    monkeypatch.setattr(
        revision_plan,
        "python",
        lambda script, *flags: python(script, *flags, *(small if "dual" in str(script) else ())),
    )
    command = [
        "--demo",
        str(demo),
        "--out",
        str(tmp_path / "out"),
        "--results",
        str(tmp_path),
        "--seeds",
        "1",
        "--arms",
        "raw text",
        "ReAlign",
        "--iterations",
        "2",
        "--encoder-steps",
        "2",
        "--language-iterations",
        "2",
        "--held-out",
        "32",
    ]
    revision.main(command)
    lines = {line["arm"]: line for line in map(json.loads, (tmp_path / "revision.jsonl").read_text().splitlines())}
    assert list(lines) == ["raw text", "ReAlign"]
    for line in lines.values():
        assert line["curve"][-1] == [2, line["images"]] and line["own"] > 0 and line["encoder"]["pairs"] == 32
    # Both from one projector, on the same captions and the same real images; what was trained on differs.
    assert lines["raw text"]["images"] != lines["ReAlign"]["images"]
    # 120 rows fit an operator whose gap on 64 others is that of chance: sqrt((Tx + Ty)(1/64 + 1/120)) is 0.2 at T = 1.
    assert (
        lines["ReAlign"]["centroid gap"] < 0.2 and lines["ReAlign"]["centroid gap"] < lines["raw text"]["centroid gap"]
    )
    assert all((tmp_path / f"revision.{kind}").stat().st_size > 1000 for kind in ("png", "svg"))
    assert "| ReAlign | " in (tmp_path / "revision.md").read_text()
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")}
    revision.main(command)
    assert "started" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")} == before
