"""A folder's files of several splits or formats are neither merged nor chosen in silence."""

import json

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from rsa_megatron.cli.data import main
from rsa_megatron.data.records import read_record
from rsa_megatron.data.sources.captions_only import open_captions
from rsa_megatron.data.sources.folder_files import name_split
from rsa_megatron.data.sources.llava_records import open_source
from rsa_megatron.data.sources.open_pairs import open_pairs
from rsa_megatron.data.sources.open_records import open_records
from tests.support import broken_data
from tests.support.record_shapes import llava, write_parquet, write_table

PICTURE = broken_data.picture()


def write(path, captions, *, as_turns):
    """A parquet file of pictures with captions, or with conversations."""
    path.parent.mkdir(parents=True, exist_ok=True)
    turns = [[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": text}] for text in captions]
    column = {"conversations": turns} if as_turns else {"caption": list(captions)}
    images = [{"bytes": PICTURE, "path": f"{text}.png"} for text in captions]
    parquet.write_table(pyarrow.table({"image": images, **column}), path)


def write_texts(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(path.with_suffix(".png"))
        path.with_suffix(".txt").write_text(path.stem)


def answers(folder, split="train"):
    source = open_records(folder, split=split)
    return sorted(record.content["conversations"][-1]["value"] for record in source.records()), dict(source.left_out)


@pytest.mark.parametrize(
    "path, split",
    [
        ("train-00000-of-00005.parquet", "train"),
        ("data/train-00000-of-00005.parquet", "train"),
        ("data/train_sft-00000-of-00005.parquet", "train_sft"),  # two of them are not one
        ("data/validation-00000-of-00001-1a2b.parquet", "val"),
        ("en/dev.parquet", "val"),
        ("Test/0001.png", "test"),
        ("my_training_set.csv", "train"),
        ("train2017/0.jpg", "train"),
        ("evaluation 1.parquet", "test"),
        ("trainer.parquet", None),
        ("constrain.parquet", None),
        ("latest.parquet", None),
        ("valley/0.jpg", None),
        ("a.parquet", None),
    ],
)
def test_names_say_a_split_by_the_words_of_datasets(path, split):
    assert name_split(path) == split


@pytest.mark.parametrize("as_turns", [True, False], ids=["conversations", "captions"])
@pytest.mark.parametrize(
    "names",
    [
        (
            "data/train-00000-of-00001.parquet",
            "data/validation-00000-of-00001.parquet",
            "data/test-00000-of-00001.parquet",
        ),
        ("train/0.parquet", "valid/0.parquet", "test/0.parquet"),
        ("a_train.parquet", "a-dev.parquet", "a.test.parquet"),
    ],
)
def test_one_split_of_a_folder_is_read_and_the_others_are_said(tmp_path, capsys, names, as_turns):
    for name, text in zip(names, ("one", "two", "three")):
        write(tmp_path / "in" / name, [text], as_turns=as_turns)
    said = {"file(s) of another split than 'train' (--split selects it; found: test (1), val (1))": 2}
    got, left_out = answers(tmp_path / "in")
    assert got == ["one"] and {reason: left_out[reason] for reason in said} == said
    assert answers(tmp_path / "in", "validation")[0] == answers(tmp_path / "in", "val")[0] == ["two"]
    for read in (open_pairs, open_captions):
        (pair,) = read(tmp_path / "in", split="test")
        assert pair.caption == "three"
    write(tmp_path / "in" / names[0], ["one", "four"], as_turns=as_turns)
    main(["pack", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--val", "1"])
    found = capsys.readouterr()
    assert "skipped: 2 file(s) of another split than 'train' (--split selects it; found: " in found.err
    assert "2 samples: 1 train, 1 val" in found.out


def test_a_split_that_no_file_names_is_refused_and_a_single_one_needs_no_choice(tmp_path):
    write(tmp_path / "one" / "data" / "train-00000-of-00001.parquet", ["one"], as_turns=True)
    assert [pair.caption for pair in open_pairs(tmp_path / "one", split="val")] == ["one"]
    write(tmp_path / "two" / "train.parquet", ["one"], as_turns=True)
    write(tmp_path / "two" / "other.parquet", ["two"], as_turns=True)
    message = r"two has no files of the split 'val', but by their names of none \(1\), train \(1\): --split selects one, or name"
    with pytest.raises(ValueError, match=message):
        open_pairs(tmp_path / "two", split="val")
    got, left_out = answers(tmp_path / "two")
    assert got == ["one"] and any("found: none (1)" in reason for reason in left_out)
    # Without any name all are one.
    write(tmp_path / "all" / "a.parquet", ["one"], as_turns=True)
    write(tmp_path / "all" / "b.parquet", ["two"], as_turns=True)
    assert answers(tmp_path / "all") == (["one", "two"], {})


def test_shards_with_a_name_of_their_own_go_first(tmp_path):
    for name, text in (
        ("data/train_sft-00000-of-00001", "one"),
        ("data/train_gen-00000-of-00001", "two"),
        ("train", "three"),
    ):
        write(tmp_path / f"{name}.parquet", [text], as_turns=True)
    assert answers(tmp_path, "train_gen")[0] == ["two"]
    with pytest.raises(ValueError, match=r"of none \(1\), train_gen \(1\), train_sft \(1\)|--split selects one"):
        answers(tmp_path)


def test_files_of_another_format_are_said_or_more_of_them_refused(tmp_path):
    write(tmp_path / "a.parquet", ["one"], as_turns=True)
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": []}]))
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "b.json").write_text("{}")
    assert answers(tmp_path) == (
        ["one"],
        {"file(s) of another format than .parquet (name one to read it; found: a.json)": 1},
    )
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(ValueError, match=r"has 1 files .parquet and 2 .json \(a.json, b.json\): name the one to read"):
        answers(tmp_path)


def test_tables_of_different_columns_are_not_one(tmp_path):
    write(tmp_path / "a.parquet", ["one"], as_turns=False)
    table = pyarrow.table({"image": [{"bytes": PICTURE, "path": "x"}], "text": ["a text"]})
    parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(
        ValueError, match=r"b.parquet and .*a.parquet are tables of different columns .*: name one of them"
    ):
        open_pairs(tmp_path)


def test_folders_of_images_with_texts_are_split_by_their_folders_names(tmp_path):
    write_texts(tmp_path, ["train/a", "train/test", "test/b", "val/c"])
    (tmp_path / "captions.json").write_text("[]")
    got, left_out = answers(tmp_path)
    assert got == ["a", "test"] and sum(left_out.values()) == 2 + 1
    assert "file(s) of another split than 'train' (--split selects it; found: test (1), val (1))" in left_out
    assert any(reason.endswith("found: captions.json)") for reason in left_out)
    assert answers(tmp_path, "test")[0] == ["b"]
    # Of files' own names none counts: they are what is in the pictures.
    write_texts(tmp_path / "flat", ["train", "test", "dog"])
    assert answers(tmp_path / "flat")[0] == ["dog", "test", "train"]


def test_an_imagefolders_metadata_is_that_of_the_split(tmp_path):
    for split in ("train", "test"):
        write_texts(tmp_path / split, ["a"])
        (tmp_path / split / "a.txt").unlink()
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": f"of {split}"}))
    for split, other in (("train", "test"), ("test", "train")):
        said = {f"file(s) of another split than {split!r} (--split selects it; found: {other} (1))": 1}
        for read in (open_pairs, open_captions):
            pairs = read(tmp_path, split=split)
            assert [pair.caption for pair in pairs] == [f"of {split}"] and pairs.left_out == said
        for read in (open_records, open_source):
            source = read(tmp_path, split=split)
            assert len(source) == 1 and source.left_out == said


def test_files_whose_names_say_no_split_are_chosen_by_none(tmp_path):
    write_texts(tmp_path, ["0001/a", "val/b"])
    with pytest.raises(ValueError, match=r"by their names of none \(1\), val \(1\): --split selects one"):
        answers(tmp_path)
    assert answers(tmp_path, "val")[0] == ["b"]
    said = "file(s) of another split than 'none' (--split selects it; found: val (1))"
    assert answers(tmp_path, "none") == (["a"], {said: 1})


def test_a_yamls_folders_are_of_the_split(tmp_path):
    for part in ("x", "y"):
        for split in ("train", "test"):
            write(tmp_path / part / split / "0.parquet", [f"{part} {split}"], as_turns=True)
    (tmp_path / "m.yaml").write_text("datasets: [{json_path: x}, {json_path: y}]")
    for split, other in (("train", "test"), ("test", "train")):
        said = {f"file(s) of another split than {split!r} (--split selects it; found: {other} (1))": 2}
        assert answers(tmp_path / "m.yaml", split) == ([f"x {split}", f"y {split}"], said)
        pairs = open_pairs(tmp_path / "m.yaml", split=split)
        assert [pair.caption for pair in pairs] == [f"x {split}", f"y {split}"] and pairs.left_out == said


@pytest.mark.parametrize("kind", ["d.csv", "d.parquet", "folder of parquet"])
def test_rows_of_conversations_are_those_of_the_split(tmp_path, kind):
    """Alike in what packs and in what measures; `language` may be that of a program, and selects captions alone."""
    write_texts(tmp_path, ["a"])
    (tmp_path / "a.txt").unlink()
    rows = [
        {"image": "a.png", "conversations": llava(n), "split": ("train", "val", None)[n % 3], "language": "python"}
        for n in range(7)
    ]
    path = tmp_path / kind
    if kind == "d.csv":
        write_table(path, rows)
    elif kind == "d.parquet":
        write_parquet(path, rows)  # in groups of two rows
    else:
        path = tmp_path
        write_parquet(path / "0.parquet", rows[:3])
        write_parquet(path / "1.parquet", rows[3:])
    null = "''" if kind == "d.csv" else "None"
    for split, numbers, other in (("train", (0, 3, 6), "val"), ("val", (1, 4), "train")):
        counts = sorted({"train": 3, "val": 2, null: 2}.items(), key=lambda kind: -kind[1])
        found = ", ".join(f"{name} ({count})" for name, count in counts if name != split)
        said = {f"of another split than {split!r} (--split selects it; found: {found})": 7 - len(numbers)}
        source, pairs = open_records(path, split=split), open_pairs(path, split=split)
        expected = [llava(n)[-1]["value"] for n in numbers]
        assert [pair.caption for pair in pairs] == expected and pairs.left_out == said == source.left_out
        for start in range(len(source) + 1):
            records = list(source.records(start))
            assert [record.number for record in records] == [*range(start, len(numbers))]
            assert [read_record(record.content).caption for record in records] == expected[start:]
        assert len({record.place for record in source.records()}) == len(numbers)
    with pytest.raises(ValueError, match=r"7 of another split than 'x' \(--split selects it; found: train \(3\), "):
        open_records(path, split="x")
