"""Tars of other recipes are read as their makers mean them, by training, show and measure alike; what is not read is named."""

import io
import json

import pytest
import yaml
from megatron.energon.flavors.jsonl.jsonl_prepare import JsonlPreparator
from PIL import Image

from rsa_megatron.cli.data import main
from rsa_megatron.data.cookers import read_stored_record
from rsa_megatron.data.dataset_checks import check_data
from rsa_megatron.data.raw_samples import stored_samples
from rsa_megatron.data.sources.open_pairs import open_pairs
from tests.support import broken_data, tars
from tests.support.train_loaders import make_encoder

PICTURE = broken_data.picture()
TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red boat."}]
CONVERSATION = json.dumps({"conversations": TURNS}).encode()
IMG2DATASET = json.dumps(
    {"caption": "A stale caption.", "url": "http://a/1.jpg", "key": "0", "status": "success"}
).encode()


@pytest.fixture(scope="module")
def encoder(demo):
    return make_encoder(demo)


@pytest.mark.parametrize(
    "parts, learnt",
    [
        ({"JPG": PICTURE, "json": CONVERSATION}, (1, "A red boat.")),
        ({"Png": PICTURE, "JSON": CONVERSATION}, (1, "A red boat.")),
        (
            {"0.JPEG": PICTURE, "1.jpeg": PICTURE, "json": CONVERSATION.replace(b"<image>", b"<image><image>")},
            (2, "A red boat."),
        ),
        ({"jpg": PICTURE, "txt": b"A red boat.\n", "json": IMG2DATASET}, (1, "A red boat.")),
        ({"jpg": PICTURE, "txt": b"A red boat.", "json": b'{"image": 3, "file_name": "b.png"}'}, (1, "A red boat.")),
        ({"jpg": PICTURE, "json": IMG2DATASET}, (1, "A stale caption.")),
        ({"JPG": PICTURE, "TXT": b"\xef\xbb\xbfA red boat."}, (1, "A red boat.")),
        ({"jpg": PICTURE, "txt": b"A note.", "json": CONVERSATION}, (1, "A red boat.")),
        ({"jpg": PICTURE, "json": CONVERSATION, "cls": b"3", "url": b"http://a/1.jpg"}, (1, "A red boat.")),
    ],
    ids=[
        "JPG",
        "JSON",
        "several",
        "img2dataset",
        "a number for the image",
        "its json alone",
        "TXT",
        "conversation goes first",
        "other parts",
    ],
)
def test_parts_are_read_as_they_are_meant(encoder, tmp_path, parts, learnt):
    folder = tars.write(tmp_path / "data", {"a": parts})
    assert tars.read(folder, encoder, 1) == {"a": learnt}
    if learnt[0] == 1:
        (pair,) = open_pairs(folder)
        with Image.open(io.BytesIO(PICTURE)) as picture:
            assert pair.caption == learnt[1] and pair.image().size == picture.size


def test_a_medium_in_the_json_beside_a_text_leaves_the_sample_out(encoder, tmp_path, caplog):
    parts = {"jpg": PICTURE, "txt": b"A red boat.", "json": b'{"video": "a.mp4", "caption": "A boat."}'}
    folder = tars.write(tmp_path / "data", {"bad": parts, "good": {"jpg": PICTURE, "txt": b"A red boat."}})
    assert list(tars.read(folder, encoder, 2)) == ["good"]
    assert "its field video names a medium that is not read" in caplog.text


UNREAD = {
    "heic": ({"heic": PICTURE}, ".heic"),
    "mp4": ({"mp4": b"a film"}, ".mp4"),
    "wav": ({"jpg": PICTURE, "wav": b"a sound"}, ".wav"),
    "left": ({"left.jpg": PICTURE}, ".left.jpg"),
    "img": ({"img": PICTURE}, ".img"),
    "mask": ({"jpg": PICTURE, "MASK.PNG": PICTURE}, ".mask.png"),
}


def test_a_medium_that_is_not_read_leaves_the_sample_out_by_name(encoder, demo, tmp_path, caplog, capsys):
    """Text alone, which it would otherwise be trained on."""
    stored = {"good": {"jpg": PICTURE, "json": CONVERSATION}}
    for key, (parts, _) in UNREAD.items():
        text = CONVERSATION.replace(b"<image>\\n", b"") if "jpg" not in parts else CONVERSATION
        stored[key] = {"json": text, **parts}
    folder = tars.write(tmp_path / "data", stored)
    assert list(tars.read(folder, encoder, len(stored))) == ["good"]
    lines = {}
    for key, (_, named) in UNREAD.items():
        (line,) = {record.message for record in caplog.records if record.message.startswith(f"skipped sample {key} ")}
        assert f"it has media that are not read, {named}: rename or convert" in line and "part_filter: [json" in line
        lines[key] = line
    # show gives the same line (of one of each kind: it takes two seconds), and measure counts the sample by it.
    for key in ("heic", "img"):
        index = str(list(stored).index(key))
        with pytest.raises(SystemExit, match=f"error: skipped sample {key} .*not read") as shown:
            main(["show", str(folder), "--tokenizer", str(demo / "tokenizer"), "--part", "val", "--index", index])
        assert str(shown.value) == f"error: {lines[key]}"
    left_out = {f"that cannot be used (medium not read: part {named})": 1 for _, named in UNREAD.values()}
    assert open_pairs(folder).left_out.items() >= {item for item in left_out.items() if ".img)" not in item[0]}
    # The remedy that the line names, of each alone.
    settings = yaml.safe_load((folder / ".nv-meta" / "dataset.yaml").read_text())
    for key, line in lines.items():
        kept = line.rpartition("part_filter: [")[2].partition("]")[0].split(", ")
        (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(settings | {"part_filter": kept}))
        assert key in tars.read(folder, encoder, len(stored))


def test_one_part_in_two_cases_is_named(encoder, tmp_path, caplog):
    samples = {
        "bad": {"jpg": PICTURE, "JPG": PICTURE, "json": CONVERSATION},
        "good": {"jpg": PICTURE, "json": CONVERSATION},
    }
    assert list(tars.read(tars.write(tmp_path / "data", samples), encoder, 2)) == ["good"]
    assert "bad" in caplog.text and "the part .jpg twice, in upper and in lower case" in caplog.text.lower()


TYPED = {
    "megatron-lm": (
        "VQAWebdataset",
        {"image": "jpg", "context": "json[0][value]", "answers": "json[1][value]"},
        {"jpg": PICTURE, "json": json.dumps(TURNS).encode()},
        "A red boat.",
    ),
    "weighted answers": (
        "VQAWebdataset",
        {"image": "jpg", "context": "json[q]", "answers": "json[a]", "answer_weights": "json[w]"},
        {
            "JPG": PICTURE,
            "json": json.dumps({"q": "What?", "a": ["no", "a boat", "boat"], "w": [0.3, 0.6, 0.6]}).encode(),
        },
        "a boat",
    ),
    "choices": (
        "MultiChoiceVQAWebdataset",
        {"image": "png", "context": "json[q]", "choices": "json[c]", "correct_choice_idx": "json[n]"},
        {"png": PICTURE, "json": json.dumps({"q": "Which?", "c": ["a car", "a boat"], "n": 1}).encode()},
        "B",
    ),
    "captions": (
        "CaptioningWebdataset",
        {"image": "jpg,png", "caption": "txt"},
        {"png": PICTURE, "txt": b"A red boat."},
        "A red boat.",
    ),
}


@pytest.mark.parametrize("as_class", [True, False], ids=["class", "sample_type"])
@pytest.mark.parametrize("kind", TYPED)
def test_samples_of_energons_types_are_read_by_their_field_map(encoder, tmp_path, kind, as_class):
    name, field_map, parts, answer = TYPED[kind]
    settings = {"field_map": field_map}
    if as_class:
        folder = tars.write(tmp_path / "data", {"a": parts}, settings | {"__class__": name})
    else:
        settings["sample_type"] = {"__module__": "megatron.energon", "__class__": name.replace("Webdataset", "Sample")}
        folder = tars.write(tmp_path / "data", {"a": parts})
        (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(settings))
    check_data(str(folder), ["train", "val"], num_readers=1, micro_batch_size=1)
    assert tars.read(folder, encoder, 1) == {"a": (1, answer)}
    assert open_pairs(folder)[0].caption == answer


def test_the_question_of_a_choice_is_llavas(tmp_path):
    name, field_map, parts, _ = TYPED["choices"]
    folder = tars.write(tmp_path / "data", {"a": parts}, {"__class__": name, "field_map": field_map})
    (sample,) = stored_samples(folder, "val")
    question = "Which?\nA. a car\nB. a boat\nAnswer with the option's letter from the given choices directly."
    turns = read_stored_record(sample.record, 1)["conversations"]
    assert turns[0]["value"] == f"<image>\n{question}" and turns[1]["value"] == "B"


def test_a_field_map_that_does_not_fit_is_one_line_a_sample(encoder, tmp_path, caplog, capfd):
    _, field_map, parts, _ = TYPED["megatron-lm"]
    wrong = {"jpg": PICTURE, "json": json.dumps({"conversations": TURNS}).encode()}
    settings = {"__class__": "VQAWebdataset", "field_map": field_map}
    folder = tars.write(tmp_path / "data", {"bad": wrong, "good": parts}, settings)
    assert list(tars.read(folder, encoder, 2)) == ["good"]
    (line,) = {record.message for record in caplog.records if record.message.startswith("skipped sample bad ")}
    assert "the field_map of its .nv-meta/dataset.yaml does not fit its parts jpg, json: " in line and "\n" not in line
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_type_that_is_not_read_is_named_with_the_remedy(demo, tmp_path):
    settings = {"__class__": "OCRWebdataset", "field_map": {"image": "jpg", "text": "txt"}}
    folder = tars.write(tmp_path / "data", {"a": {"jpg": PICTURE, "txt": b"A text."}}, settings)
    message = "data: its samples are of Energon's type OCRSample; CrudeWebdataset .* and CaptioningSample, VQASample, .* are read"
    with pytest.raises(ValueError, match=message) as refused:
        check_data(str(folder), ["train"], num_readers=1, micro_batch_size=1)
    with pytest.raises(SystemExit, match=message) as shown:
        main(["show", str(folder), "--tokenizer", str(demo / "tokenizer")])
    assert str(shown.value) == f"error: {refused.value}" and "\n" not in str(shown.value)
    with pytest.raises(ValueError, match=message):
        open_pairs(folder)


def test_a_broken_line_of_a_linked_data_set_is_a_sample_that_is_skipped(encoder, tmp_path, caplog, capfd):
    """Of Energon's own accord it would be a traceback, and missing in an epoch."""
    lines = [
        {"image": [], "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": f"boat {n}"}]}
        for n in range(3)
    ]
    path = tmp_path / "val.jsonl"
    path.write_text("\n".join([json.dumps(lines[0]), '{"broken}', json.dumps(lines[1])]) + "\n")
    JsonlPreparator.prepare_dataset(path)
    mixture = tmp_path / "mixture.yaml"
    content = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"val": {"path": "val.jsonl"}}}
    mixture.write_text(yaml.safe_dump(content))
    assert list(tars.read(mixture, encoder, 2)) == ["val.jsonl/0", "val.jsonl/2"]
    assert f"skipped sample val.jsonl/1 of {path}: its line is broken JSON" in caplog.text
    assert "Traceback" not in "".join(capfd.readouterr())
