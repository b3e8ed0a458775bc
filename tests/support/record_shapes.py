"""One record in the shapes that people store it in, and the files and tables that hold such records."""

import base64
import csv
import gzip
import json

import pyarrow
import pyarrow.parquet

from tests.support.pictures import picture

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
    "the Cauldron's": lambda n, root: {
        "images": [f"{n}.png"],
        "texts": [{"user": QUESTION, "assistant": ANSWER.format(n), "source": "made"}],
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
