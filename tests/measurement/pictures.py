"""Small pictures that tell their number, and what pairs of them say."""

import io

from PIL import Image


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
