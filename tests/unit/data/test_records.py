"""What a record names that is not read leaves it out, by the name of what was found; what only looks like it does not."""

import pytest

from rsa_megatron.data.records import read_record
from rsa_megatron.data.sources.record import Unusable

IMAGE = {"image": "a.png"}


def talk(question="What is it?", answer="A boat."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def with_parts(*parts):
    return {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": "A."},
        ]
    }


UNREAD = {
    "field video": {"video": "a.mp4"},
    "field videos": {"videos": ["a.mp4"]},
    "field video_path": {"video_path": "a"},
    "field videoPath": {"videoPath": "a/b"},
    "field video_url": IMAGE | {"video_url": "https://a.org/watch?v=3"},
    "field audio": IMAGE | {"audio": {"bytes": b"RIFF", "path": None, "sampling_rate": 16000}},
    "field audios": {"audios": '["a.wav"]'},
    "field sound": {"sound": "a.wav"},
    "field speech": {"speech": {"array": [0.1], "sampling_rate": 16000}},
    "field mp4": {"mp4": b"...."},
    "field video_id": {"video_id": "v_8Zb"},
    "field media": {"media": ["a.png", "b.mp4"]},
    "field clip": {"clip": "c/3.webm"},
    "field image_2": IMAGE | {"image_2": "b.png"},
    "field depth": IMAGE | {"depth": "b.png"},
    "field target_image": IMAGE | {"target_image": {"bytes": b"x", "path": None}},
    "field thing": {"thing": "a/b.JPG"},
    "field Image": {"Image": "a.jpg"},
    "field movie": {"movie": "data:video/mp4;base64,AAAA"},
}
UNREAD_TEXTS = {
    "<video> in its text": ["<video>\nWhat happens?", "<Video>", "Look: <video> and <b>bold</b>"],
    "<video_1> in its text": ["<video_1> or the other?"],
    "<audio> in its text": ["<audio>"],
    "<sound> in its text": ["<sound>\nWho speaks?"],
    "<speech> in its text": ["<speech>"],
    "<image_1> in its text": ["<image_1> What?"],
    "<image 2> in its text": ["See <image 2>."],
    "<|vision_start|> in its text": ["<|vision_start|><|image_pad|><|vision_end|>What?"],
    "<|image_1|> in its text": ["<|image_1|>\nWhat?"],
    "<|AUDIO|> in its text": ["<|AUDIO|>"],
    "<img>a/b.jpg</img> in its text": ["Picture 1: <img>a/b.jpg</img>\nWhat?"],
    "<img> in its text": ["<img>\nWhat?"],
}
UNREAD_PARTS = {
    "a part of type video": {"type": "video", "video": "a.mp4", "fps": 2.0},
    "a part of type video_url": {"type": "video_url", "video_url": {"url": "https://a.org/a.mp4"}},
    "a part of type input_audio": {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    "a part of type audio": {"type": "audio", "audio_url": "a.wav"},
    "a part of type file": {"type": "file", "file": {"file_id": "3"}},
    "a part with video": {"video": "a.mp4"},
    "a part with video, text": {"video": "a.mp4", "text": "See."},
}


@pytest.mark.parametrize("what", UNREAD)
def test_a_record_that_names_a_medium_in_a_field_that_is_not_read_is_left_out(what):
    with pytest.raises(Unusable, match=f"its {what} names a medium that is not read") as fault:
        read_record({"conversations": talk(), **UNREAD[what]})
    assert fault.value.kind == f"a medium that is not read ({what})"


@pytest.mark.parametrize("what", UNREAD_TEXTS)
def test_a_text_with_the_mark_of_another_medium_is_left_out(what):
    for question in UNREAD_TEXTS[what]:
        for fields in ({}, IMAGE):
            with pytest.raises(Unusable) as fault:
                read_record({"conversations": talk(question), **fields})
            assert fault.value.kind.lower() == f"a medium that is not read ({what})".lower()


@pytest.mark.parametrize("what", UNREAD_PARTS)
def test_a_part_that_is_not_read_leaves_its_record_out(what):
    with pytest.raises(Unusable) as fault:
        read_record(with_parts(UNREAD_PARTS[what]))
    assert fault.value.kind == f"a medium that is not read ({what})"
    assert "turn 0" in str(fault.value)


def test_a_medium_of_a_turn_leaves_its_record_out():
    turns = [talk()[0] | {"videos": ["a.mp4"]}, talk()[1]]
    with pytest.raises(Unusable, match="the field videos of turn 0 names a medium that is not read"):
        read_record({"conversations": turns})


NO_MEDIA = {
    "empty": {"video": "", "videos": [], "audio": None, "audios": [None], "sound": {}, "video_path": float("nan")},
    "nulls in words": {"video": "None", "audio": "nan", "image": "null"},
    "numbers and flags": {"has_video": False, "num_videos": 3, "audio_rate": 16000, "video_fps": 2.5, "video": False},
    "no samples": {"audio": {"array": None, "path": None, "sampling_rate": 16000}},
    "about": {"video_title": "A film about boats", "speech": "Four score and seven", "movie": "Ran", "music": "jazz"},
    "metadata": {"source": "sharegpt.json", "media": "newspaper", "dataset": "llava/mix.v1", "clip_score": "0.3"},
}
NO_MARKS = [
    "Is <b>this</b> bold?",
    "How do I use `<video>` in HTML?",
    "```html\n<video>\n  <source src='a.mp4'>\n```\nWhy is it blank?",
    "What does <video src='a.mp4'></video> do, and <video><source></video>?",
    "vector<int> x; a < b && audio > c",
    "<image-rendering> and <imagery>",
    "<img src='a.png'> is HTML",
]


@pytest.mark.parametrize("what", NO_MEDIA)
def test_fields_that_name_no_medium_leave_nothing_out(what):
    assert read_record({"conversations": talk(), **NO_MEDIA[what]}).images == []
    assert read_record({"conversations": talk(), **NO_MEDIA[what], **IMAGE}).images == ["a.png"]


def test_what_describes_the_image_leaves_nothing_out():
    about = {"video_id": "v_3", "source_video": "a.mp4", "image_url": "https://a.org/b.jpg", "image_id": "COCO_3.jpg"}
    about |= {"original_image": "raw/a.png", "image_path": "elsewhere/a.png", "mask_rle": "ab.png"}
    assert read_record({"conversations": talk(), **IMAGE, **about}).images == ["a.png"]


@pytest.mark.parametrize("text", NO_MARKS)
def test_texts_that_speak_of_tags_are_read(text):
    assert read_record({"conversations": talk(text)}).texts == [text, "A boat."]
    assert read_record({"conversations": talk(answer=text)}).texts[-1] == text


def test_answers_may_speak_of_tags_in_plain_words():
    answer = "The <video> and <audio> elements play media."
    assert read_record({"conversations": talk(answer=answer)}).texts[-1] == answer


@pytest.mark.parametrize(
    "given, expected",
    [(7, 7), ("7", "7"), (7.0, "7"), (7.5, "7.5"), (True, "true"), (b"x7", "x7"), (float("nan"), None), (None, None)]
    + [("", None), (1e20, "100000000000000000000")],
)
def test_an_id_is_any_scalar(given, expected):
    found = read_record({"id": given, "conversations": talk()}).id
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "others", [{"label": 3}, {"prompt": None, "answer": "", "question": "null"}, {"task": "caption"}]
)
def test_a_caption_with_a_class_or_empty_fields_is_a_caption(others):
    assert read_record(IMAGE | {"caption": "A boat."} | others).caption == "A boat."


@pytest.mark.parametrize("text", ["{{}}", "{[1]}", "{{1}: 2}", "[" * 9999, "{" * 9999])
def test_a_text_that_only_looks_like_an_object_is_a_text(text):
    assert read_record({"conversations": talk(), "template": text}).caption == "A boat."
    assert read_record(IMAGE | {"caption": text}).caption == text


def test_a_file_name_in_latin_1_can_be_an_id():
    assert read_record({"id": "caf\udce9.png", "conversations": talk()}).id == "caf\\udce9.png"


def test_images_go_where_the_text_has_them():
    parts = [{"type": "text", "text": "Between"}, {"type": "image", "image": "b.png"}, {"type": "text", "text": "and"}]
    read = read_record(with_parts(*parts, {"type": "image", "image": "a.png"}))
    assert read.texts[0] == "Between\n<image>\nand\n<image>\n?" and read.images == ["b.png", "a.png"]
    # By their place in images, in whichever order.
    placed = with_parts({"type": "image", "index": 1}, {"type": "image", "index": 0}) | {"images": ["a.png", "b.png"]}
    assert read_record(placed).images == ["b.png", "a.png"]
    with pytest.raises(Unusable, match="in another order than theirs"):
        read_record(placed, images_beside=2)
    # Without any <image> all come first.
    read = read_record({"images": ["a.png", "b.png"], "conversations": talk()})
    assert read.texts[0] == "<image>\n<image>\nWhat is it?"
    assert read_record({"conversations": talk()}, images_beside=2).texts == read.texts


def test_an_image_that_is_named_and_does_not_lie_beside_its_record_is_missed():
    with pytest.raises(Unusable, match="it names 1 image.s. and the sample has 0 image") as fault:
        read_record({"conversations": talk(), **IMAGE}, images_beside=0)
    assert fault.value.kind == "number of images"
    assert read_record({"conversations": talk(), **IMAGE}, images_beside=1).texts[0].startswith("<image>")


def test_a_system_prompt_stays():
    system = {"role": "system", "content": "Be brief."}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert read_record({"messages": [system, *messages]}).turns[0] == {"from": "system", "value": "Be brief."}
    assert read_record({"messages": messages, "system": "Be brief."}).turns[0] == {
        "from": "system",
        "value": "Be brief.",
    }
    read = read_record({"messages": [system, *messages], **IMAGE})
    assert read.texts == ["Be brief.", "<image>\nHi", "Ho"]


@pytest.mark.parametrize(
    "content, kind, reason",
    [
        ({"conversations": talk("<image>")}, "number of images", "its text has 1 <image> and the record 0 image"),
        (
            IMAGE | {"images": ["b.png"], "conversations": talk()},
            "number of images",
            "its image is not one of its images",
        ),
        (
            with_parts({"type": "image", "index": 1}) | {"images": ["a.png"]},
            "number of images",
            "1 <image> and the record 1",
        ),
        (
            {"caption": "A boat."},
            "number of images",
            r"it has a caption \(caption\) and no image; its fields are caption",
        ),
        (
            {"question": "?", "answer": "!"},
            "conversation",
            "no conversations, messages or caption; its fields are question",
        ),
        ({"role": "user", "content": "Hi"}, "conversation", "it is one turn; a record has a list of them"),
        ({"conversations": [["Hi", "Ho"]]}, "conversation", "turn 0 of its conversation is a list; it must be"),
        (
            {"conversations": [{"from": "human"}]},
            "conversation",
            "turn 0 .* has no value or content; its fields are from",
        ),
        ({"conversations": [{"from": "human", "value": 3}]}, "conversation", "the value of turn 0 is a int"),
        ({"conversations": "Hi"}, "conversation", "its conversation is the text 'Hi'"),
        (
            {"conversations": [*talk(), {"from": "tool", "value": "3"}]},
            "conversation",
            "is from 'tool'; it must be human",
        ),
        (IMAGE | {"id": [1], "conversations": talk()}, "wrong type", "its id is a list"),
        ({"image": 3, "conversations": talk()}, "wrong type", "its image is a int; it must be a path"),
        ({"image": {"base64": "?"}, "conversations": talk()}, "unreadable image", "not the base64 that it says"),
        ("Hi", "wrong type", "it is a str, not an object"),
        (
            IMAGE | {"question_id": 1, "text": "Is there a snowboard?", "label": "yes"},  # POPE's
            "a question or label beside a caption",
            "it has question_id, label beside text, which is then no caption alone",
        ),
        (
            IMAGE | {"question": "What?", "answer": 3, "caption": "A boat."},
            "a question or label beside a caption",
            "it has question, answer beside caption",
        ),
        (
            with_parts({"type": "image", "index": float("inf")}) | {"images": ["a.png"]},
            "number of images",
            "has the index inf, not a whole number",
        ),
    ],
)
def test_a_refusal_says_what_was_found(content, kind, reason):
    with pytest.raises(Unusable, match=reason) as fault:
        read_record(content)
    assert fault.value.kind == kind
