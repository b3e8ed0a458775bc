"""What docs/data.md says is read, is packed; what it says is left out, is, for the reason that it gives."""

import json
import re

import pytest

from rsa_megatron.cli import data
from tests.support.environment import ROOT
from tests.support.pictures import conversation, images, picture
from tests.support.record_shapes import write_indented, write_json, write_lines, write_parquet, write_table


def rows_below(heading: str) -> list[list[str]]:
    """The rows of the table below a heading, each as its cells."""
    page = (ROOT / "docs" / "data.md").read_text()
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)[1]
    table = [line for line in section.splitlines() if line.startswith("| ")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def example(cell: str) -> dict:
    return json.loads(re.fullmatch("`(.*)`", cell)[1])


def pack(source, out, *flags) -> tuple[list[dict], dict]:
    """What was skipped, and the summary."""
    data.main(["pack", str(source), "--out", str(out), "--val", "0", *map(str, flags)])
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    return skipped, json.loads((out / "summary.json").read_text())


@pytest.fixture
def root(tmp_path):
    images(tmp_path, ["a.png", "b.png"])
    return tmp_path


def test_records_that_are_read(root):
    rows = rows_below("Records that are read")
    write_lines(root / "d.jsonl", [example(record) for record, *_ in rows])
    skipped, summary = pack(root / "d.jsonl", root / "out")
    assert skipped == [] and summary["parts"] == {"train": len(rows)} and len(rows) > 10
    counts = [int(number) for _, number, _ in rows]
    assert summary["histograms"]["images of a sample"] == {f"{n}": counts.count(n) for n in sorted(set(counts))}


def test_records_that_are_left_out(root):
    rows = rows_below("What is left out")
    good = {"id": "good", "image": "a.png", "caption": "A boat."}
    write_lines(root / "d.jsonl", [good, *({"id": n} | example(record) for n, (record, _) in enumerate(rows))])
    skipped, summary = pack(root / "d.jsonl", root / "out")
    assert [fault["id"] for fault in skipped] == [*range(len(rows))] and summary["parts"] == {"train": 1}
    for fault, (_, reason) in zip(skipped, rows):
        assert reason.strip("`") in fault["reason"]


TALK = [{"id": n, "image": f"{n}.png", "conversations": conversation(n)} for n in range(2)]
CAPTIONS = [{"file_name": f"{n}.png", "caption": f"Number {n}."} for n in range(2)]
COCO = {"images": [], "annotations": []}
for n in range(2):
    COCO["images"].append({"id": n, "file_name": f"{n}.png"})
    COCO["annotations"].append({"id": n, "image_id": n, "caption": f"Number {n}."})
KARPATHY = [
    {"filename": f"{n}.png", "split": "val" if n == 2 else "train", "sentences": [{"raw": "A."}]} for n in range(3)
]


def write_yaml(path):
    write_json(path.with_name("one.json"), TALK)
    path.write_text("datasets: [{json_path: one.json, sampling_strategy: all}]")


def write_texts(folder):
    for n in range(2):
        (folder / f"{n}.txt").write_text(f"Number {n}.")


def with_images(rows):
    return [row | {"image": {"bytes": picture(n), "path": None}} for n, row in enumerate(rows)]


# By what the page calls it: a name in the folder of images 0.png and 1.png, and what writes it.
FILES = {
    "a list of records in JSON": ("d.json", lambda path: write_json(path, TALK)),
    "JSONL, a record a line": ("d", lambda path: write_lines(path, TALK)),
    "JSON records one after another": ("d.json", lambda path: write_indented(path, TALK)),
    "one JSON object of records": ("d.json", lambda path: write_json(path, {"version": 1, "data": TALK})),
    "COCO's captions JSON": ("d.json", lambda path: write_json(path, COCO)),
    "Karpathy's `dataset_*.json`": ("d.json", lambda path: write_json(path, {"images": KARPATHY, "dataset": "coco"})),
    "CSV or TSV of captions": ("d.tsv", lambda path: write_table(path, CAPTIONS)),
    "CSV or TSV of conversations": ("d.txt", lambda path: write_table(path, TALK)),
    "parquet of conversations": ("d.parquet", lambda path: write_parquet(path, TALK)),
    "parquet of captions": ("d.parquet", lambda path: write_parquet(path, with_images(CAPTIONS))),
    "LLaVA-OneVision's YAML": ("d.yaml", write_yaml),
    "a folder of images with texts": ("", write_texts),
    "a folder with metadata": ("", lambda path: write_lines(path / "metadata.jsonl", CAPTIONS)),
}


def test_the_page_names_each_kind_of_file():
    assert [what for what, _ in rows_below("Files that are read")] == [*FILES]


@pytest.mark.parametrize("what", FILES)
def test_files_that_are_read(what, tmp_path):
    images(tmp_path / "images", ["0.png", "1.png"])
    name, write = FILES[what]
    write(tmp_path / "images" / name)
    skipped, summary = pack(tmp_path / "images" / name, tmp_path / "out")
    assert skipped == [] and summary["parts"] == {"train": 2}
    assert summary["histograms"]["images of a sample"] == {"1": 2}
