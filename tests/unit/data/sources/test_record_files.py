"""What a file of records is told by its content; what is none says what it is and what would do."""

import gzip
import json
import re
import tracemalloc

import pytest

from rsa_megatron.cli.data import main
from rsa_megatron.data.prepare import sample_checks
from rsa_megatron.data.prepare.sample_checks import check
from rsa_megatron.data.sources.open_pairs import open_pairs
from rsa_megatron.data.sources.open_records import open_records
from rsa_megatron.data.sources.record import Record, Unusable
from tests.support.pictures import picture
from tests.support.record_shapes import ANSWER, CONTAINERS, SHAPES, write_json, write_lines, write_parquet, write_table


@pytest.fixture
def root(tmp_path):
    folder = tmp_path.resolve() / "images"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.png").write_bytes(picture(n))
    return folder


def test_one_record_alone_is_a_file_of_one(root, tmp_path):
    for record in (
        SHAPES["LLaVA's"](0, root),
        SHAPES["messages"](0, root),
        {"id": 1, "image": "0.png", "caption": ["A", "B"]},
    ):
        for name, indent in (("d.json", None), ("d.json", 1), ("d.jsonl", None)):
            (tmp_path / name).write_text(json.dumps(record, indent=indent))
            assert len(open_records(tmp_path / name)) == len(open_pairs(tmp_path / name, images=root)) == 1


def test_a_yamls_files_of_the_same_name_lose_no_record(root, tmp_path):
    (tmp_path / "z").mkdir()
    for part, write, name in (
        ("x", write_json, "d.json"),
        ("y", write_json, "d.json"),
        ("z/0", write_parquet, "d.parquet"),
        ("z/1", write_parquet, "d.parquet"),
    ):
        (tmp_path / part).mkdir()
        write(tmp_path / part / name, [SHAPES["messages"](n, root) for n in range(2)])
    (tmp_path / "m.yaml").write_text("datasets: [{json_path: x/d.json}, {json_path: y/d.json}, {json_path: z}]")
    pairs = open_pairs(tmp_path / "m.yaml", images=root)
    assert len(pairs) == 8 and not pairs.left_out
    assert pairs.keys[2] == "y/d.json: d.json, record 0" and pairs.keys[6] == "z: 1/d.parquet, row 0"
    assert [record.place for record in open_records(tmp_path / "m.yaml").records()] == pairs.keys


def test_a_broken_record_of_indented_ones_loses_itself_alone(root, tmp_path):
    records = [SHAPES["LLaVA's"](n, root) for n in range(3)]
    text = "\n".join(json.dumps(record, indent=2) for record in records)
    (tmp_path / "d.json").write_text(text.replace('"value": "Number 1, plain."', '"value" "Number 1, plain."'))
    first, second, third = open_records(tmp_path / "d.json").records()
    assert check(first, root) and check(third, root)
    with pytest.raises(Unusable, match="it is broken JSON: Expecting ':' delimiter") as fault:
        check(second, root)
    assert fault.value.kind == "broken record"


def test_lines_that_are_no_records_are_told_from_a_broken_first_line(root, tmp_path):
    first, *others = (json.dumps(SHAPES["LLaVA's"](n, root)) for n in range(3))
    (tmp_path / "d.json").write_text("\n".join([first[:40], *others]))
    kinds = [
        record.content.kind if isinstance(record.content, Unusable) else ""
        for record in open_records(tmp_path / "d.json").records()
    ]
    assert kinds == ["broken line", "", ""]


@pytest.mark.parametrize(
    "before, between, after",
    [
        ('{"data": [\n', ",\n", "\n]}\n"),
        ('{\n"data": [\n', "\n,", "\n]\n}"),
        ('{"version": 1, "data": [\n', "\n,\n", "\n]}"),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_object_with_an_entry_a_line_is_an_object(before, between, after, count, root, tmp_path):
    records = [SHAPES["LLaVA's"](n, root) for n in range(count)]
    (tmp_path / "d.json").write_text(before + between.join(map(json.dumps, records)) + after)
    assert [record.content for record in open_records(tmp_path / "d.json").records()] == records


@pytest.mark.parametrize(
    "name",
    ["https://[x/a.png", "https://a.org/" + "a" * 300 + ".png", "file://[x/a.png", "a\0.png", "a" * 300 + ".png"],
)
def test_what_cannot_be_a_path_is_a_missing_image(name, root):
    with pytest.raises(Unusable, match="is not a path or address|[.]{3}$|too long") as fault:
        check(Record(0, "d.json, record 0", {"image": name, "caption": "A boat."}), root)
    assert fault.value.kind == "missing image"


def test_whatever_else_happens_to_a_record_is_counted_and_named(root, tmp_path, monkeypatch):
    def check_all_but_one(record, image_root):
        if record.number == 1:
            raise RuntimeError("it\nis odd")
        return check(record, image_root)

    monkeypatch.setattr(sample_checks, "check", check_all_but_one)
    write_lines(tmp_path / "d.jsonl", [{"id": n, "image": "0.png", "caption": "A boat."} for n in range(3)])
    main(["pack", str(tmp_path / "d.jsonl"), "--images", str(root), "--out", str(tmp_path / "out"), "--val", "0"])
    (fault,) = map(json.loads, (tmp_path / "out" / "skipped.jsonl").read_text().splitlines())
    assert (fault["id"], fault["kind"], fault["reason"]) == (
        1,
        "cannot be read",
        "it cannot be read: RuntimeError: it is odd",
    )


@pytest.mark.parametrize("name", ["lines.json", "indented.json"])
def test_records_are_read_one_at_a_time(name, root, tmp_path):
    """Of a file of 12 MB less than 6 MB are in memory: a chunk of 1 MB, a few times while it is parsed."""
    record = SHAPES["LLaVA's"](0, root) | {"notes": ["plain words"] * 400}
    CONTAINERS[name](tmp_path / name, [record] * 2000)
    assert (tmp_path / name).stat().st_size > 12e6
    tracemalloc.start()
    source = open_records(tmp_path / name)
    assert sum(1 for _ in source.records(1999)) == 1 and len(source) == 2000
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 6e6


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("d.json", json.dumps({"a": {"root": "img", "annotation": "x.jsonl", "repeat_time": 1, "length": 4}}), "InternVL's list of data sets (a); name each annotation of it, with its root as the folder of images: x.jsonl --images img"),
        ("d.json", json.dumps({"train": [{"a": 1}], "val": [{"a": 2}]}), "holds several lists of records (train, val); save the records"),
        ("d.json", json.dumps({"a": 1, "b": "x"}), "is an object with a, b; save the records"),
        ("d.jsonl", b"PK\x03\x04....", "is a zip archive: unpack it"),
        ("d.tar", b"\0" * 257 + b"ustar", "is a tar: index its folder by `energon prepare --non-interactive"),
        ("d.arrow", b"ARROW1..", "is an Arrow file: save the data set by to_parquet"),
        ("d.jsonl", "\ufeff{}".encode("utf-16-le"), "is text in UTF-16: save it as UTF-8"),
        ("d.json", b"\x89PNG", "is a picture: name the file or folder that says what is in it"),
        ("d.json", b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer: fetch the file itself"),
        ("d.parquet", b"<!DOCTYPE html><html>", "is a web page: fetch the file itself"),
        ("d.txt", b"A boat.\nA house.\n", "it is a text that begins with 'A boat."),
        ("d.md", b"# Records", "it is a text that begins with '# Records'"),
        ("d.json.gz", gzip.compress(json.dumps([*range(999)]).encode(), mtime=0)[:300], "is truncated or broken: "),
        ("d.yaml", "__module__: megatron.energon\n__class__: MetadatasetV2\n", "is a mixture of Energon's: --data-path"),
        ("d.yaml", "datasets: [{json_path: x.json, sampling_stratgy: all}]", "x.json: key 'sampling_stratgy' is not read: did you mean sampling_strategy?"),
        ("d.yaml", "datasets: [{json_path: x.json, image_folder: y}]", "x.json: key 'image_folder' is not read: the keys are json_path, sampling_strategy; remove it"),
        ("d.yaml", "datasets: [{json_path: x.json}]\ndataset: []", "d.yaml: key 'dataset' is not read: did you mean datasets?"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_read_says_what_it_is_and_what_would_do(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        open_records(tmp_path / name)


def test_a_folder_of_images_with_metadata(tmp_path):
    """Hugging Face's imagefolder, of each kind of file; other files of that name do not count."""
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
    (tmp_path / "metadata.csv").write_text("version,date\n1,2\n")
    for name, write in (("metadata.jsonl", write_lines), ("metadata.csv", write_table)):
        write(tmp_path / name, [{"file_name": f"{n}.png", "text": ANSWER.format(n)} for n in range(3)])
        source = open_records(tmp_path)
        found = [check(record, source.image_root.resolve()) for record in source.records()]
        assert [(s.texts[-1], s.images[0].data) for s in found] == [(ANSWER.format(n), picture(n)) for n in range(3)]
        assert [pair.caption for pair in open_pairs(tmp_path)] == [ANSWER.format(n) for n in range(3)]
        (tmp_path / name).unlink()
    (tmp_path / "part").mkdir()
    for place in (tmp_path, tmp_path / "part"):
        write_lines(place / "metadata.jsonl", [{"file_name": "0.png", "text": "A"}])
    with pytest.raises(ValueError, match="has several files of metadata .*; name one of them"):
        open_records(tmp_path)
    (tmp_path / ".nv-meta").mkdir()
    with pytest.raises(ValueError, match="is a prepared data set: --data-path"):
        open_records(tmp_path)


def test_karpathys_json_gives_a_splits_first_sentences(root, tmp_path):
    entries = [
        {"filepath": "images", "filename": f"{n}.png", "imgid": n, "split": split, "sentences": [{"tokens": [], "raw": ANSWER.format(n)}, {"raw": "Another."}]}
        for n, split in enumerate(("train", "val", "train"))
    ]  # fmt: skip
    write_json(tmp_path / "dataset_coco.json", {"images": entries, "dataset": "coco"})
    found = open_records(tmp_path / "dataset_coco.json", images=root.parent)
    assert [check(record, root.parent).texts[-1] for record in found.records()] == [ANSWER.format(n) for n in (0, 2)]
    assert found.left_out == {"of another split than 'train' (--split selects it; found: val (1))": 1}
    pairs = open_pairs(tmp_path / "dataset_coco.json", images=root.parent)
    assert [(pair.key, pair.caption, pair.image().width) for pair in pairs] == [("1", ANSWER.format(1), 2)]
