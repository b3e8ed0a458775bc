"""Every format is read from any record on, sampled as LLaVA samples, and what cannot be used is named."""

import io
import json
import math
import random

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from rsa_megatron.data.prepare.sample_checks import check
from rsa_megatron.data.sources.llava_records import open_source
from rsa_megatron.data.sources.onevision_yaml import choose
from rsa_megatron.data.sources.record import Unusable


def picture(width=20, height=10, format="PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (width, height, 7)).save(out, format)
    return out.getvalue()


def record(number, **changes) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"Number {number}."}]
    return {"id": f"id.{number}", "image": "a.png", "conversations": turns} | changes


def text_alone(number) -> dict:
    return {
        "id": number,
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": f"Hello {number}."}],
    }


def write_lines(path, records):
    path.write_text("\n\n".join(json.dumps(r) for r in records) + "\n")  # an empty line between two


def parquet_row(number, image):
    return record(number) | {"image": image, "data_source": "somewhere"}


def write_parquet(path, rows, row_group_size=3):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)


def make(kind, folder):
    """A source of ten records, and what its samples say."""
    (folder / "a.png").write_bytes(picture())
    answers = [f"Number {number}." for number in range(10)]
    if kind == "json":
        (folder / "d.json").write_text(json.dumps([record(n) for n in range(10)], indent=1))
        return folder / "d.json", answers
    if kind == "jsonl":
        write_lines(folder / "d.jsonl", [record(n) for n in range(10)])
        return folder / "d.jsonl", answers
    if kind == "jsonl named json":
        write_lines(folder / "d.json", [record(n) for n in range(10)])
        return folder / "d.json", answers
    if kind == "yaml":
        write_lines(folder / "one.jsonl", [record(n) for n in range(20)])
        (folder / "two.json").write_text(json.dumps([record(100 + n) for n in range(8)]))
        (folder / "m.yaml").write_text(
            f"datasets:\n- {{json_path: one.jsonl, sampling_strategy: 'first:16%'}}\n- {{json_path: {folder}/two.json, "
            "sampling_strategy: 'end:5'}\n- {json_path: one.jsonl, sampling_strategy: 'first:0'}\n"
            "- {json_path: two.json, sampling_strategy: 'first:1'}\n"
        )
        return folder / "m.yaml", [f"Number {n}." for n in (0, 1, 2, 3, 103, 104, 105, 106, 107, 100)]
    if kind == "parquet":
        write_parquet(
            folder / "d.parquet", [parquet_row(n, {"bytes": picture(n + 1), "path": "x.png"}) for n in range(10)]
        )
        return folder / "d.parquet", answers
    if kind == "parquet folder":
        (folder / "data").mkdir()
        write_parquet(folder / "data" / "0.parquet", [parquet_row(n, picture(n + 1)) for n in range(4)])
        write_parquet(folder / "data" / "1.parquet", [parquet_row(n, picture(n + 1)) for n in range(4, 10)])
        return folder, answers
    for number in range(10):
        place = folder / "captions" / f"part{number // 4}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.JPG").write_bytes(picture(number + 1, format="JPEG"))
        (place / f"{number}.txt").write_text(f"Number {number}.\n")
    return folder / "captions", answers


KINDS = ["json", "jsonl", "jsonl named json", "yaml", "parquet", "parquet folder", "folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_is_recognised_and_read_from_any_record_on(kind, tmp_path):
    path, expected = make(kind, tmp_path)
    source = open_source(path)
    assert len(source) == 10
    for start in range(11):
        records = list(source.records(start))
        assert [r.number for r in records] == list(range(start, 10))
        samples = [check(r, source.image_root.resolve()) for r in records]
        assert [sample.texts[-1] for sample in samples] == expected[start:]
        assert all(
            len(sample.images) == 1 and sample.conversations[0]["value"].startswith("<image>\n") for sample in samples
        )


def test_images_of_a_record_keep_bytes_size_and_order(tmp_path):
    images = {"b.png": picture(30, 20), "c.jpg": picture(40, 50, "JPEG"), "said.jpg": picture(8, 9, "PNG")}
    images["d.gif"] = picture(5, 6, "GIF")
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    turns = [{"role": "user", "content": "<image><image>and<image><image>?"}, {"role": "assistant", "content": "Yes."}]
    write_lines(tmp_path / "d.jsonl", [{"images": list(images), "messages": turns}])
    (found,) = open_source(tmp_path / "d.jsonl").records()
    sample = check(found, tmp_path)
    parts = sample.in_shard()
    stored = json.loads(parts.pop("json"))
    assert parts == dict(zip(["0.png", "1.jpg", "2.png", "3.png"], images.values()))  # named for what they are
    assert [(image.width, image.height) for image in sample.images] == [(30, 20), (40, 50), (8, 9), (5, 6)]
    assert stored["conversations"][0] == {"from": "user", "value": "<image><image>and<image><image>?"}
    assert stored["id"] == sample.key == "000000"


def test_parquet_takes_lists_of_images_paths_and_none(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(50))
    two = [{"bytes": picture(3), "path": None}, {"bytes": None, "path": "a.png"}]
    turns = [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "Two."}]
    text = text_alone(0)["conversations"]
    rows = [{"id": 1, "images": two, "conversations": turns}, {"id": 2, "images": None, "conversations": text}]
    write_parquet(tmp_path / "d.parquet", rows)
    first, second = (check(r, tmp_path) for r in open_source(tmp_path / "d.parquet").records())
    assert [image.width for image in first.images] == [3, 50] and second.images == []


def test_parquet_is_read_a_part_at_a_time(tmp_path):
    rows = [parquet_row(n, random.Random(n).randbytes(3000)) for n in range(200)]
    write_parquet(tmp_path / "d.parquet", rows, row_group_size=50)
    data = (tmp_path / "d.parquet").read_bytes()
    # The file's third quarter is gone: what comes before is read, what cannot be is named, the run goes on.
    broken = data[: len(data) // 2] + bytes(len(data) // 4) + data[len(data) * 3 // 4 :]
    (tmp_path / "d.parquet").write_bytes(broken)
    records = list(open_source(tmp_path / "d.parquet").records())
    faulty = [r.number for r in records if isinstance(r.content, Unusable)]
    assert [r.number for r in records] == list(range(200))
    assert set(range(100, 150)) & set(faulty) and not set(range(50)) & set(faulty)
    assert all(r.content.kind == "broken row group" for r in records if r.number in faulty)


def llava_rule(records: list, strategy: str) -> list:
    """LLaVA-NeXT, train.py, LazySupervisedDataset, as it stands there; "random" shuffles first."""
    sampling_number = None
    if ":" in strategy:
        strategy, sampling_number = strategy.split(":")
        if "%" in sampling_number:
            sampling_number = math.ceil(int(sampling_number.split("%")[0]) * len(records) / 100)
        else:
            sampling_number = int(sampling_number)
    if strategy == "first" and sampling_number is not None:
        records = records[:sampling_number]
    elif strategy == "end" and sampling_number is not None:
        records = records[-sampling_number:]
    elif strategy == "random" and sampling_number is not None:
        records = records[:sampling_number]
    return records


@pytest.mark.parametrize("count", [1, 7, 99, 100, 101, 333])
def test_sampling_strategies_are_llavas(count):
    amounts = ["1", "6", "1000", *(f"{p}%" for p in (1, 10, 33, 50, 99, 100))]
    for strategy in ["all", *(f"{which}:{amount}" for which in ("first", "end", "random") for amount in amounts)]:
        actual, expected = choose(count, strategy, seed="0"), llava_rule(list(range(count)), strategy)
        assert len(actual) == len(expected), strategy
        if strategy.startswith("random"):
            assert list(actual) == sorted(set(actual)) and all(0 <= i < count for i in actual)
        else:
            assert list(actual) == expected, strategy
    assert len(choose(count, "end:0", seed="0")) == 0  # LLaVA's [-0:] takes all of them


def test_random_sampling_depends_on_the_seed_alone():
    assert (
        choose(1000, "random:30", seed="0")
        == choose(1000, "random:30", seed="0")
        != choose(1000, "random:30", seed="1")
    )


def bad_records(folder):
    """name -> (line or record, kind, what the reason says)."""
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"this is no picture")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:45])
    (folder / "folder.png").mkdir()
    (folder.parent / "outside.png").write_bytes(picture())
    (folder / "linked").symlink_to(folder.parent / "elsewhere")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    turns = record(0)["conversations"]
    return {
        "missing": (record(0, image="none.png"), "missing image", "none.png is not in"),
        "loop": (record(0, image="loop.png"), "missing image", "loop.png"),
        "zero in the name": (record(0, image="a\0.png"), "missing image", "is not a path"),
        "long name": (record(0, image="a" * 5000), "missing image", "aaa..."),
        "above": (record(0, image="../outside.png"), "outside of the image folder", "../outside.png leads out of"),
        "absolute": (
            record(0, image=str(folder.parent / "outside.png")),
            "outside of the image folder",
            "leads out of",
        ),
        "address": (record(0, image="https://a.org/b/z.png?x=1"), "missing image", "nothing is downloaded, and"),
        "up and out": (record(0, image="sub/../../outside.png"), "outside of the image folder", "leads out of"),
        "out of a link": (record(0, image="linked/../../outside.png"), "outside of the image folder", "leads out of"),
        "empty file": (record(0, image="zero.png"), "unreadable image", "zero.png is empty (0 bytes)"),
        "no image": (
            record(0, image="text.png"),
            "unreadable image",
            "text.png cannot be decoded: not a known image format",
        ),
        "cut": (record(0, image="cut.png"), "unreadable image", "cut.png cannot be decoded: "),
        "folder": (record(0, image="folder.png"), "unreadable image", "folder.png is not a file"),
        "broken line": (b'{"id": 1, "conv', "broken line", "broken JSON"),
        "deep": (b"[" * 100_000, "broken line", "broken JSON"),
        "not UTF-8": (json.dumps(record(0)).encode().replace(b"Number", b"N\xfcmber"), "not UTF-8", "not UTF-8"),
        "half a letter": (
            record(0, conversations=[turns[0], {"from": "gpt", "value": "\ud83d"}]),
            "not UTF-8",
            "not UTF-8",
        ),
        "number": (b"7", "wrong type", "it is a int"),
        "list": (b"[1]", "wrong type", "it is a list"),
        "image of another type": (record(0, image=3), "wrong type", "its image is a int"),
        "image in an object": (record(0, image=[{"name": "a.png"}]), "wrong type", "its image is an object with name"),
        "empty path": (record(0, image=""), "number of images", "its text has 1 <image> and the record 0 image(s)"),
        "id of another type": (record(0, id=[1]), "wrong type", "its id is a list"),
        "no conversations": ({"id": 1, "image": "a.png"}, "conversation", "it has no conversations"),
        "empty conversations": (record(0, conversations=[]), "conversation", "it has no conversations"),
        "text for conversations": (
            record(0, conversations="hello"),
            "conversation",
            "the text 'hello'; it must be a list",
        ),
        "turn of text": (record(0, conversations=["hello"]), "conversation", "turn 0 of its conversation is the text"),
        "value of another type": (
            record(0, conversations=[turns[0], {"from": "gpt", "value": 3}]),
            "conversation",
            "value",
        ),
        "no answer": (record(0, conversations=turns[:1]), "conversation", "one of them from gpt"),
        "empty answer": (
            record(0, conversations=[turns[0], {"from": "gpt", "value": " \n"}]),
            "conversation",
            "caption is empty",
        ),
        "unknown role": (
            record(0, conversations=[*turns, {"from": "bob", "value": "x"}]),
            "conversation",
            "from 'bob'",
        ),
        "two told": (
            record(0, image=["a.png"] * 3),
            "number of images",
            "its text has 1 <image> and the record 3 image(s)",
        ),
        "told alone": (record(0, image=None), "number of images", "its text has 1 <image> and the record 0 image(s)"),
        "video": (record(0, video="a.mp4"), "a medium that is not read (field video)", "its field video names"),
    }


def test_what_cannot_be_used_is_named_and_nothing_else_is_lost(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.png").write_bytes(picture())
    bad = bad_records(root)
    lines = [content if isinstance(content, bytes) else json.dumps(content).encode() for content, _, _ in bad.values()]
    good = [json.dumps(record(n)).encode() for n in range(len(lines))]
    (root / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(line for pair in zip(good, lines) for line in pair))
    source = open_source(root / "d.jsonl")
    assert len(source) == 2 * len(bad)
    records = list(source.records())
    assert [check(r, root.resolve()).id for r in records[::2]] == [f"id.{n}" for n in range(len(bad))]
    for (name, (_, kind, reason)), found in zip(bad.items(), records[1::2], strict=True):
        with pytest.raises(Unusable) as fault:
            check(found, root.resolve())
        assert fault.value.kind == kind and reason in str(fault.value), f"{name}: {fault.value.kind}: {fault.value}"


def test_a_list_with_bytes_that_are_no_text_loses_that_sample_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    text = json.dumps([record(0), record(1), record(2)]).encode().replace(b"Number 1", b"N\xfcmber 1")
    (tmp_path / "d.json").write_bytes(text)
    first, second, third = open_source(tmp_path / "d.json").records()
    check(first, tmp_path), check(third, tmp_path)
    with pytest.raises(Unusable, match="not UTF-8"):
        check(second, tmp_path)


def test_links_are_followed_wherever_they_lead(tmp_path):
    """images -> another disk, the hub's cache (each file a link), a folder of folders; one that leads to itself ends."""
    disk, here = tmp_path / "disk", tmp_path / "here"
    for folder in (disk / "deep", here):
        folder.mkdir(parents=True)
    (disk / "deep" / "a.png").write_bytes(picture())
    (disk / "deep" / "a.txt").write_text("Number 0.")
    (here / "images").symlink_to(disk)
    (here / "a.png").symlink_to(disk / "deep" / "a.png")
    names = ["a.png", "images/deep/a.png", "images/../a.png", str(here / "images" / "deep" / "a.png")]
    for name in names:
        sample = check(next(list_source(tmp_path, record(0, image=name)).records()), here)
        assert [image.data for image in sample.images] == [picture()], name
    # By a link as --images: its own folder counts.
    sample = check(next(list_source(tmp_path, record(0, image="deep/a.png")).records()), (here / "images").resolve())
    assert sample.images[0].path == "deep/a.png"
    # What a link leads to is no way out of both folders.
    with pytest.raises(Unusable, match="leads out of"):
        check(next(list_source(tmp_path, record(0, image="images/../../outside.png")).records()), here)
    (disk / "deep" / "round").symlink_to(here)
    assert len(open_source(here)) == 2  # a.png without a text, and the one of the linked folder
    assert [r.place for r in open_source(here).records()] == ["a", "images/deep/a"]


def list_source(folder, content):
    (folder / "d.json").write_text(json.dumps([content]))
    return open_source(folder / "d.json")


def test_faults_of_a_folder_are_named(tmp_path):
    for name in ("alone.png", "two.png", "two.jpg", "good.png", "empty.png", "latin.png"):
        (tmp_path / name).write_bytes(picture())
    for name, text in {"two": b"x", "good": b"A boat.", "empty": b"", "latin": b"\xfc", "text": b"x"}.items():
        (tmp_path / f"{name}.txt").write_bytes(text)
    (tmp_path / "notes.md").write_text("of no account")
    found = {}
    for r in open_source(tmp_path).records():
        try:
            found[r.place] = check(r, tmp_path.resolve()).texts[-1]
        except Unusable as fault:
            found[r.place] = (fault.kind, str(fault))
    assert found.pop("good") == "A boat."
    assert {place: kind for place, (kind, _) in found.items()} == {
        "alone": "no text",
        "two": "number of images",
        "empty": "conversation",
        "latin": "not UTF-8",
        "text": "missing image",
    }
    assert found["two"][1] == "two.jpg, two.png have one text between them"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("d.json", b"", "no sample found"),
        ("d.jsonl", b"\n\n", "no sample found"),
        ("d.json", b'[{"id": 1}', "d.json is broken JSON: .*in a .jsonl"),
        ("d.csv", b"1,2", "d.csv has no column conversations or messages; its columns are 1, 2"),
        ("d.txt", b"A boat.", "d.txt is not JSON, JSONL, .* it is a text that begins with 'A boat.'"),
        ("d.parquet", b"PAR1 or so", "d.parquet is not a readable parquet file: .* fetch it again"),
        ("m.yaml", b"a: [", "m.yaml cannot be read"),
        ("m.yaml", b"datasets: [{path: x}]", "needs a list `datasets:`"),
        ("m.yaml", b"datasets: [{json_path: none.json}]", "none.json"),
        (
            "m.yaml",
            b"datasets: [{json_path: good.jsonl, sampling_strategy: 'middle:3'}]",
            "good.jsonl: sampling_strategy 'middle:3'",
        ),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path, name, content, message):
    write_lines(tmp_path / "good.jsonl", [text_alone(0)])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / name)
    with pytest.raises(ValueError, match="nowhere"):
        open_source(tmp_path / "nowhere.json")


def test_folders_and_parquet_files_without_samples_are_named(tmp_path):
    with pytest.raises(
        ValueError, match="needs images with a .txt beside each, or a metadata.jsonl, or .parquet files"
    ):
        open_source(tmp_path)
    write_parquet(tmp_path / "d.parquet", [{"text": "x", "url": "y"}])
    with pytest.raises(ValueError, match="no column conversations or messages; its columns are text, url"):
        open_source(tmp_path)
