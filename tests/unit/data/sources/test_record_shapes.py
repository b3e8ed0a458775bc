"""One record in each shape that people store it in, in each container: always the same sample, or the same reason."""

import base64
import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from rsa_megatron.data.prepare.sample_checks import check
from rsa_megatron.data.records import CAPTION_PROMPT, read_record
from rsa_megatron.data.sources.open_pairs import open_pairs
from rsa_megatron.data.sources.open_records import open_records
from tests.support.pictures import picture

NAN = float("nan")
COUNT = 3
QUESTION, ANSWER = "What is it?", "Number {}, plain."


def llava(n, question=f"<image>\n{QUESTION}") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": ANSWER.format(n)}]


def openai(n, content=f"<image>\n{QUESTION}") -> list[dict]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": ANSWER.format(n)}]


def parts(n, image: dict, **nulls) -> list[dict]:
    """Both turns as lists of parts."""
    question = [{**nulls, **image}, {**nulls, "type": "text", "text": QUESTION}]
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{**nulls, "type": "text", "text": ANSWER.format(n)}]},
    ]


def columns(rows: list[dict]) -> dict:
    return {name: [row[name] for row in rows] for name in rows[0]}


def data_address(n) -> str:
    return "data:image/png;base64," + base64.b64encode(picture(n)).decode()


# By name: the n-th record. Its image is ROOT/images/N.png.
SHAPES = {
    "LLaVA's": lambda n, root: {"image": f"{n}.png", "conversations": llava(n)},
    "no <image>": lambda n, root: {"image": f"{n}.png", "conversations": llava(n, QUESTION)},
    "messages": lambda n, root: {"images": [f"{n}.png"], "messages": openai(n)},
    "null keys beside filled ones": lambda n, root: {
        "image": f"{n}.png",
        "images": None,
        "messages": [],
        "video": "",
        "audio": [None],
        "conversations": [{"role": None, "content": "", **turn} for turn in llava(n)],
    },
    "a null in the list of images": lambda n, root: {"images": [None, f"{n}.png"], "messages": openai(n)},
    "OpenAI's parts": lambda n, root: {"messages": parts(n, {"type": "image_url", "image_url": {"url": f"{n}.png"}})},
    "OpenAI's parts with data": lambda n, root: {
        "messages": parts(n, {"type": "image_url", "image_url": {"url": data_address(n), "detail": "auto"}})
    },
    "Qwen's parts": lambda n, root: {"messages": parts(n, {"type": "image", "image": f"file://{root}/{n}.png"})},
    "Qwen's parts without type": lambda n, root: {
        "messages": [
            {"role": "user", "content": [{"image": f"{n}.png"}, {"text": QUESTION}]},
            {"role": "assistant", "content": [{"text": ANSWER.format(n)}]},
        ]
    },
    "TRL's parts": lambda n, root: {
        "images": [f"{n}.png"],
        "messages": parts(n, {"type": "image", "index": 0, "text": None}, index=None),
    },
    "parts without a place": lambda n, root: {"images": [f"{n}.png"], "messages": parts(n, {"type": "image"})},
    "transformers' parts": lambda n, root: {"messages": parts(n, {"type": "image", "path": f"{root}/{n}.png"})},
    "arrow's parts": lambda n, root: {
        "messages": [
            {
                "role": turn["role"],
                "content": columns([{"image": None, "text": None} | part for part in turn["content"]]),
            }
            for turn in parts(n, {"type": "image", "image": f"{n}.png"})
        ]
    },
    "Ollama's": lambda n, root: {
        "messages": [
            {"role": "user", "content": QUESTION, "images": [f"{n}.png"]},
            {"role": "assistant", "content": ANSWER.format(n), "images": []},
        ]
    },
    "an object of lists": lambda n, root: {"image": f"{n}.png", "conversations": columns(llava(n))},
    "JSON in a text": lambda n, root: {"image": f"{n}.png", "conversations": json.dumps(llava(n))},
    "Python in a text": lambda n, root: {"image": f"{n}.png", "conversations": str(llava(n))},
    "JSON in the image's text": lambda n, root: {"image": json.dumps([f"{n}.png"]), "conversations": llava(n)},
    "absolute path": lambda n, root: {"image": f"{root}/{n}.png", "conversations": llava(n)},
    "file://": lambda n, root: {"image": f"file://{root}/{n}.png", "conversations": llava(n)},
    "address": lambda n, root: {"image_url": f"https://a.org/b/{n}.png?size=3", "conversations": llava(n)},
    "base64": lambda n, root: {"image": base64.b64encode(picture(n)).decode(), "conversations": llava(n)},
    "image_path": lambda n, root: {"image_path": f"{n}.png", "conversations": llava(n, QUESTION)},
    "img": lambda n, root: {"img": f"{n}.png", "conversations": llava(n)},
    "file_name": lambda n, root: {"file_name": f"{n}.png", "conversations": llava(n)},
    "speakers in capitals": lambda n, root: {
        "image": f"{n}.png",
        "messages": [turn | {"role": turn["role"].capitalize()} for turn in openai(n)],
    },
    "path in an object": lambda n, root: {"image": {"bytes": None, "path": f"{n}.png"}, "conversations": llava(n)},
}
CAPTION_SHAPES = {
    "image, caption": lambda n, root: {"image": f"{n}.png", "caption": ANSWER.format(n)},
    "BLIP's list": lambda n, root: {"image": f"{n}.png", "caption": [ANSWER.format(n), "Another."]},
    "imagefolder's": lambda n, root: {"file_name": f"{n}.png", "text": ANSWER.format(n)},
    "address and text": lambda n, root: {"url": f"https://a.org/{n}.png", "TEXT": ANSWER.format(n)},
    "null conversations": lambda n, root: {"image": f"{n}.png", "caption": ANSWER.format(n), "messages": None},
}


def write_json(path, records):
    path.write_text(json.dumps(records))


def write_lines(path, records):
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(map(json.dumps, records)).encode())


def write_indented(path, records):
    path.write_text("\n".join(json.dumps(record, indent=2) for record in records))


def write_table(path, records):
    """As pandas writes a table whose cells are lists or objects."""
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        for record in records:
            writer.writerow({k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in record.items()})


def write_parquet(path, records):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)


CONTAINERS = {
    "list.json": write_json,
    "list.jsonl": write_json,
    "lines.jsonl": write_lines,
    "lines.json": write_lines,
    "lines.jsonl.gz": lambda path, records: path.write_bytes(
        gzip.compress("\n".join(map(json.dumps, records)).encode())
    ),
    "lines.txt": write_lines,
    "indented.json": write_indented,
    "commas.json": lambda path, records: path.write_text(",\n".join(map(json.dumps, records))),
    "under-a-key.json": lambda path, records: write_json(path, {"version": 1, "data": records}),
    "columns.json": lambda path, records: write_json(path, columns(records)),
    "pandas.json": lambda path, records: write_json(
        path, {name: dict(zip("012", values)) for name, values in columns(records).items()}
    ),
    "by-id.json": lambda path, records: write_json(path, {f"{n}": record for n, record in enumerate(records)}),
    "table.csv": write_table,
    "table.tsv": write_table,
    "table.txt": write_table,
    "rows.parquet": write_parquet,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records").resolve()
    (folder / "images").mkdir()
    for n in range(COUNT):
        (folder / "images" / f"{n}.png").write_bytes(picture(n))
    return folder / "images"


def as_said(turns: list[dict]) -> list[tuple[str, str]]:
    """Speakers by one name: LLaVA's and OpenAI's stay as they were."""
    return [({"user": "human", "assistant": "gpt"}.get(turn["from"], turn["from"]), turn["value"]) for turn in turns]


def expected_of(shape: str) -> list:
    question = CAPTION_PROMPT if shape in CAPTION_SHAPES else f"<image>\n{QUESTION}"
    return [([("human", question), ("gpt", ANSWER.format(n))], [picture(n)]) for n in range(COUNT)]


def needs_nested_cells(shape: str, container: str) -> bool:
    """Whether the shape is no table's: a cell of it is several records' cells, or the writer cannot write it."""
    # Arrow has one type a column: Python's text of a list and such is covered by the others.
    return container in ("columns.json", "pandas.json") and shape == "Python in a text"


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("shape", [*SHAPES, *CAPTION_SHAPES])
def test_the_same_sample_comes_of_every_shape_in_every_container(shape, container, root, tmp_path):
    make = (SHAPES | CAPTION_SHAPES)[shape]
    records = [{"id": f"n{n}"} | make(n, root) for n in range(COUNT)]
    CONTAINERS[container](tmp_path / container, records)
    source = open_records(tmp_path / container, images=root)
    samples = [check(record, root) for record in source.records()]
    assert [(as_said(s.conversations), [image.data for image in s.images]) for s in samples] == expected_of(shape)
    assert [record.number for record in source.records(1)] == [1, 2]
    pairs = open_pairs(tmp_path / container, images=root)
    assert [(pair.caption, pair.image().width) for pair in pairs] == [(ANSWER.format(n), n + 1) for n in range(COUNT)]
    assert not pairs.left_out
    # What a link's JSONL names lies below the folder of images.
    for sample in samples:
        assert all(
            image.path is None or image.path == f"{sample.images[0].width - 1}.png" or "://" in image.path
            for image in sample.images
        )


@pytest.mark.parametrize("shape", [*SHAPES, *CAPTION_SHAPES])
def test_a_tar_gives_the_same_text_with_its_image_beside(shape, root):
    for n, (turns, _) in enumerate(expected_of(shape)):
        content = json.loads(json.dumps((SHAPES | CAPTION_SHAPES)[shape](n, root)))
        read = read_record(content, images_beside=1)
        assert as_said(read.turns) == turns and read.images == []
