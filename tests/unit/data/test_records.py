"""What a record names that is not read leaves it out, by the name of what was found; what only looks like it does not."""

import base64
import json

import pytest

from rsa_megatron.data.records import read_record
from rsa_megatron.data.sources.record import Unusable

IMAGE = {"image": "a.png"}
PNG_IN_BASE64 = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(90)).decode()


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
    "field video_link": {"video_link": "https://a.org/watch?v=3"},
    "field youtube_id": {"youtube_id": "dQw4"},
    "field frames_dir": {"frames_dir": "frames/0001"},
    "field frame_paths": {"frame_paths": ["a/1", "a/2"]},
    "field thumbnail": {"thumbnail": "t/1"},
    "field media_list": {"media_list": ["c/1"]},
    "field screenshot": {"screenshot": PNG_IN_BASE64},
    "field page": {"page": PNG_IN_BASE64},
    "field image_id": {"image_id": "COCO_train2014_000000000042"},
    "field photo_of": {"photo_of": ["x", None]},
    "field reference_video": IMAGE | {"reference_video": "b.mp4"},
    "field question_speech": IMAGE | {"question_speech": "b.wav"},
    "field speech_path": IMAGE | {"speech_path": "s/0001"},
    "field voice": IMAGE | {"voice": [0.1, -0.2]},
    "field attachments": IMAGE | {"attachments": ["b.png"]},
    "field attachment": IMAGE | {"attachment": [{"name": "b.png", "kind": "picture"}]},
    "field mediaItems": IMAGE | {"mediaItems": [{"type": "video", "path": "x"}]},
    "field mask_image": IMAGE | {"mask_image": "masks/a.png"},
    "field movie": {"movie": "data:video/mp4;base64,AAAA"},
}
UNREAD_TEXTS = {
    "<video> in its text": ["<video>\nWhat happens?", "<Video>", "<b>bold</b>\nLook: <video>"],
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
    "<point> in its text": ["<point>\nWhat is it?"],
    "<SpeechHere> in its text": ["<Speech><SpeechHere></Speech>"],
    "[img]a.png[/img] in its text": ["See [img]a.png[/img]"],
    "![](a.png) in its text": ["What is ![](a.png)?"],
    "![a boat](b/c d.JPG) in its text": ["![a boat](b/c d.JPG)"],
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


@pytest.mark.parametrize("field, value", [("videos", ["a.mp4"]), ("attachments", ["a.png"]), ("file", "a.png")])
def test_a_medium_of_a_turn_leaves_its_record_out(field, value):
    turns = [talk()[0] | {field: value}, talk()[1]]
    with pytest.raises(Unusable, match=f"the field {field} of turn 0 names a medium that is not read"):
        read_record({"conversations": turns})
    if field != "videos":  # unless it is the record's own image
        assert read_record({"conversations": turns} | IMAGE).images == ["a.png"]


def test_a_tag_within_a_line_counts_where_the_record_names_a_medium():
    question = "Look: <video> and <b>bold</b>"
    assert read_record({"conversations": talk(question)}).texts[0] == question
    with pytest.raises(Unusable, match="has <video>, the mark of a medium"):
        read_record({"conversations": talk(question), **IMAGE})


def test_a_system_prompt_in_a_field_is_read_as_a_turn():
    read = read_record({"conversations": talk(), "system": "See <image>.", **IMAGE})
    assert read.texts == ["See <image>.", "What is it?", "A boat."] and read.images == ["a.png"]
    with pytest.raises(Unusable, match="its text has 1 <image> and the record 0 image"):
        read_record({"conversations": talk(), "system": "See <image>."})
    with pytest.raises(Unusable, match="has <video>, the mark of a medium"):
        read_record({"conversations": talk(), "system": "<video>"})


NO_MEDIA = {
    "empty": {"video": "", "videos": [], "audio": None, "audios": [None], "sound": {}, "video_path": float("nan")},
    "nulls in words": {"video": "None", "audio": "nan", "image": "null"},
    "no": {"video": "no", "image_3": "no"},
    "files in prose": {"note": "compare a.jpg and b.jpg", "title": "Why is my photo.jpg"},
    "said of media": {
        "image_caption": "A boat.",
        "image_type": "none at all",
        "media_type": "text",
        "photo_credit": "Ann",
    },
    "words of several meanings": {
        "depth": "3",
        "speech": "A. b.",
        "frames": "2",
        "movie_id": "tt0111161",
        "data_frame": "df",
        "voice": "calm",
    },
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
    "What does the <img> tag do in HTML?",
    "Which of <audio> and <video> is older?",
    "Is [img] a mark? And x[i](a.png)? And ![a](https://a.org/b.svg)?",
]


@pytest.mark.parametrize("what", NO_MEDIA)
def test_fields_that_name_no_medium_leave_nothing_out(what):
    assert read_record({"conversations": talk(), **NO_MEDIA[what]}).images == []
    assert read_record({"conversations": talk(), **NO_MEDIA[what], **IMAGE}).images == ["a.png"]


def test_what_describes_the_image_leaves_nothing_out():
    about = {"video_id": "v_3", "source_video": "a.mp4", "image_url": "https://a.org/b.jpg", "image_id": "COCO_3.jpg"}
    about |= {"original_image": "raw/a.png", "image_path": "elsewhere/a.png", "mask_rle": "ab.png"}
    assert read_record({"conversations": talk(), **IMAGE, **about}).images == ["a.png"]


@pytest.mark.parametrize(
    "name", ["img_name", "img_file", "image_key", "image_filename", "img_file_name", "file", "media", "imageFile"]
)
def test_a_second_name_of_the_image_leaves_nothing_out(name):
    fields = {"image": "sub/a.png", name: "a.png"}
    assert read_record({"conversations": talk(), **fields}).images == ["sub/a.png"]


@pytest.mark.parametrize(
    "name", [f"{a}_{b}" for a in ("image", "img") for b in ("name", "file", "filename", "file_name", "path")]
)
def test_an_image_has_many_names(name):
    assert read_record({"conversations": talk(), name: "a.png"}).images == ["a.png"]


@pytest.mark.parametrize(
    "fields",
    [
        {"image": "a.png", "img": "b.png"},
        {"image": "a.png", "image_paths": ["a.png", "b.png"]},
        {"image": "a.png", "file_name": "b.png"},
    ],
)
def test_fields_that_name_different_images_are_refused(fields):
    with pytest.raises(Unusable, match=f"its image and its {list(fields)[1]} name different images"):
        read_record({"conversations": talk(), **fields})


def test_a_flag_in_place_of_an_image_is_none():
    for flag in (False, True, "no"):
        assert read_record({"image": flag, "images": ["a.png"], "conversations": talk()}).images == ["a.png"]


def test_an_image_in_other_letters_or_minicpms_is_an_image():
    for question in ("<Image>\nWhat?", "<IMAGE>\nWhat?", "(<image>./</image>)\nWhat?"):
        read = read_record({"conversations": talk(question), **IMAGE})
        assert read.texts[0] == "<image>\nWhat?" and read.images == ["a.png"]
    assert read_record({"conversations": talk("What is <Image>?")}).texts[0] == "What is <Image>?"
    with pytest.raises(Unusable, match="its text has 2 <image>, in other letters, for 1 image"):
        read_record({"conversations": talk("<Image> or <Image>?"), **IMAGE})


def test_parts_in_a_text_are_parts():
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": json.dumps(parts)}, {"role": "assistant", "content": "[1, 2]"}]
    read = read_record({"messages": messages})
    assert read.texts == ["<image>\nWhat?", "[1, 2]"] and read.images == ["a.png"]
    answer = '[{"type": "car", "text": "x"}]'
    assert read_record({"conversations": talk(answer=answer)}).caption == answer


def test_a_null_text_of_a_part_is_empty():
    read = read_record(with_parts({"type": "text", "text": None}, {"type": "image", "image": "a.png"}))
    assert read.texts[0] == "<image>\n?"


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"loss": False}])
def test_an_answer_that_is_not_to_be_trained_leaves_its_record_out(flag):
    question, answer = talk()
    with pytest.raises(Unusable, match="turn 1 of its conversation says that it is not to be trained") as fault:
        read_record({"conversations": [question, answer | flag]})
    assert fault.value.kind == "an answer that is not to be trained"
    name = next(iter(flag))
    assert read_record({"conversations": [question | flag, answer | {name: 1}]}).caption == "A boat."


def test_objects_that_are_filled_in_by_other_code_leave_their_record_out():
    objects = {"ref": ["boat"], "bbox": [[1, 2, 3, 4]]}
    with pytest.raises(Unusable, match="its text has <ref-object>, <bbox>, which stands for what its field objects"):
        read_record({"conversations": talk("Find <ref-object>.", "<bbox>"), "objects": objects, **IMAGE})
    assert read_record({"conversations": talk(), "objects": objects, **IMAGE}).images == ["a.png"]


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
    "others", [{"label": 3}, {"prompt": None, "answer": ""}, {"task": "caption", "num_questions": 3}]
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
            IMAGE | {"text": "What is it?", "multiple_choice_answer": "a boat"},
            "a question or label beside a caption",
            "it has multiple_choice_answer beside text",
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
