"""Captions are read without their images, with the keys and records that the same data has with them."""

import json

import pytest

from rsa_megatron.data.sources.captions_only import open_captions
from rsa_megatron.data.sources.open_pairs import open_pairs
from tests.support.pictures import conversation, images, pack


def records(count=6) -> list[dict]:
    """Each second one has an image, which is not there; the last has two."""
    told = [
        {"id": n, "conversations": conversation(n, "?")} | ({"image": f"{n}.png"} if n % 2 else {})
        for n in range(count)
    ]
    return [*told, {"id": count, "image": ["a.png", "b.png"], "conversations": conversation(count)}]


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_records_need_no_image(form, tmp_path):
    text = json.dumps(records()) if form == "json" else "\n".join(map(json.dumps, records()))
    (tmp_path / f"d.{form}").write_text(text)
    found = open_captions(tmp_path / f"d.{form}")
    assert [pair.caption for pair in found] == [f"Number {n}." for n in range(6)]
    assert [pair.record["id"] for pair in found] == list(range(6)) and found.left_out == {"that have several images": 1}
    with pytest.raises(ValueError, match="was read as text only"):
        found[0].image()
    with pytest.raises(ValueError, match="no image with a caption found"):
        open_pairs(tmp_path / f"d.{form}")
    images(tmp_path, [f"{n}.png" for n in range(6)])
    both = open_pairs(tmp_path / f"d.{form}")
    assert [pair.record["id"] for pair in both] == [1, 3, 5] and set(both.keys) < set(found.keys)


def test_a_text_file_is_a_caption_a_line(tmp_path):
    (tmp_path / "c.txt").write_bytes("\ufeffA boat.\n\n  Two dogs. \n".encode() + b"\xff\xfe\n" + "A 船.".encode())
    found = open_captions(tmp_path / "c.txt")
    expected = [("c.txt, line 1", "A boat."), ("c.txt, line 3", "Two dogs."), ("c.txt, line 5", "A 船.")]
    assert [(pair.key, pair.caption) for pair in found] == expected
    assert found.left_out == {"whose line is not UTF-8": 1} and found[0].record is None
    (tmp_path / "c.txt").write_text("\n")
    with pytest.raises(ValueError, match="c.txt: no caption found"):
        open_captions(tmp_path / "c.txt")


@pytest.mark.parametrize("command", ["pack", "link"])
def test_shards_and_mixtures_give_what_they_give_with_images_and_texts_alone(command, tmp_path):
    path = pack(tmp_path, command=command)
    with_images, alone = (
        {pair.key: (pair.caption, pair.record) for split in ("train", "val") for pair in opened(path, split=split)}
        for opened in (open_pairs, open_captions)
    )
    assert all(alone[key] == pair for key, pair in with_images.items()) and len(with_images) == 24
    assert sorted(record["id"] for key, (_, record) in alone.items() if key not in with_images) == [
        0,
        10,
        20,
    ]  # of no image


def test_other_forms_are_read_with_their_images(tmp_path):
    images(tmp_path, ["a.png"])
    (tmp_path / "a.txt").write_text("A boat.")
    assert [pair.caption for pair in open_captions(tmp_path)] == ["A boat."]
    coco = {"images": [{"id": 4, "file_name": "a.png"}], "annotations": [{"id": 1, "image_id": 4, "caption": "Dogs."}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    assert [(pair.key, pair.caption) for pair in open_captions(tmp_path / "coco.json")] == [("4", "Dogs.")]
    with pytest.raises(ValueError, match="does not exist; name"):
        open_captions(tmp_path / "none.txt")
