"""One record in each shape that people store it in, in each container: always the same sample, or the same reason."""

import json

import pytest

from rsa_megatron.data.prepare.sample_checks import check
from rsa_megatron.data.records import CAPTION_PROMPT, read_record
from rsa_megatron.data.sources.open_pairs import open_pairs
from rsa_megatron.data.sources.open_records import open_records
from rsa_megatron.data.sources.record import Unusable
from tests.support.pictures import picture
from tests.support.record_shapes import (
    ANSWER,
    CAPTION_SHAPES,
    CONTAINERS,
    COUNT,
    QUESTION,
    SHAPES,
    llava,
    openai,
    parts,
)


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


# What a record is left out for, and one of its kind; and the same of whole files.
LEFT_OUT = {
    "a medium that is not read (field videos)": {"videos": ["a.mp4"], "messages": openai(0, "<video>\nWhat happens?")},
    "a medium that is not read (<video> in its text)": {"messages": openai(0, "<video>\nWhat happens?")},
    "a medium that is not read (a part of type video)": {"messages": parts(0, {"type": "video", "video": "a.mp4"})},
    "number of images": {"image": ["0.png", "1.png"], "conversations": llava(0)},
    "missing image": {"image": "none.png", "conversations": llava(0)},
    "outside of the image folder": {"image": "/etc/none.png", "conversations": llava(0)},
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", LEFT_OUT)
def test_the_same_reason_comes_of_every_container(kind, container, root, tmp_path):
    records = [{"id": f"n{n}"} | LEFT_OUT[kind] for n in range(2)]
    CONTAINERS[container](tmp_path / container, records)
    source = open_records(tmp_path / container, images=root)
    for record in source.records():
        with pytest.raises(Unusable) as fault:
            check(record, root)
        assert fault.value.kind == kind
    assert len(source) == 2
    with pytest.raises(ValueError, match="no image with a caption found: 2 "):
        open_pairs(tmp_path / container, images=root)
