"""Small pictures that tell their number, and what pairs of them say."""

import io
import json

from PIL import Image

from rsa_megatron.cli import data
from rsa_megatron.data.sources.open_pairs import open_pairs


def picture(number: int, format="PNG") -> bytes:
    """A picture whose width and colour tell its number."""
    out = io.BytesIO()
    Image.new("RGB", (number + 1, 3), (number, 10, 20)).save(out, format)
    return out.getvalue()


def images(folder, names) -> None:
    """The n-th name is picture n."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))


def captions(pairs) -> dict[str, str]:
    return {pair.key: pair.caption for pair in pairs}


def widths(pairs) -> list[int]:
    return [pair.image().width for pair in pairs]


def conversation(number, question="<image>\nWhat is it?") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": f"Number {number}."}]


def pack(folder, records=30, command="pack"):
    """The project's own shards (or links) of records of one, two and no images."""
    source = folder / "source"
    images(source, [f"{number}.png" for number in range(records)])
    told = []
    for number in range(records):
        names = [f"{number}.png"] * (1 if number % 5 else number % 2 * 2)
        image = {"image": names[0] if len(names) == 1 else names} if names else {}
        told.append({"id": number, "conversations": conversation(number, "<image>" * len(names) + "?")} | image)
    (source / "d.json").write_text(json.dumps(told))
    out = folder / command
    flags = ["--shard-size=5"] if command == "pack" else []
    data.main([command, str(source / "d.json"), "--out", str(out), "--rsa", "--val=12", *flags])
    return out if command == "pack" else out / "mixture.yaml"


def table(folder, count, order=None):
    images(folder, [f"{number}.png" for number in range(count)])
    lines = [f"{number}.png,Number {number}." for number in order or range(count)]
    (folder / "d.csv").write_text("\n".join(["file_name,caption", *lines]))
    return open_pairs(folder / "d.csv")
