"""Scores of answers: what greedy decoding would have said, without decoding."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from score_answers import Asked, Reader, asked, content_words, judge, score, shares, stored
from transformers import AutoImageProcessor, AutoProcessor

from tests.support import tiny_hf
from tests.support.environment import ROOT

pytestmark = pytest.mark.usefixtures("preloaded_commands")


@pytest.fixture(scope="module")
def hf(demo, tmp_path_factory) -> Path:
    return tiny_hf.write(tmp_path_factory.mktemp("hf") / "model", demo / "tokenizer", tied=True)


def pictures():
    """Of different sizes: with AnyRes their rows differ in length, and the shorter one is padded."""
    return [Image.radial_gradient("L").convert("RGB").resize(size) for size in ((58, 58), (130, 70))]


def processor_of(hf):
    processor = AutoProcessor.from_pretrained(hf)
    processor.image_processor = AutoImageProcessor.from_pretrained(hf, backend="pil")
    return processor


def base_tile(model, processor, picture) -> dict:
    """The prompt of a picture as one tile: its tokens."""
    base = processor.image_processor([picture], return_tensors="pt")["pixel_values"][0, :1]
    with torch.no_grad():
        tokens = model.model.vision_tower(base, output_hidden_states=True).hidden_states[-1]
        return {"inputs_embeds": model.model.multi_modal_projector(tokens)}


@pytest.mark.parametrize("image_aspect_ratio", ["anyres", "square"])
def test_right_is_what_transformers_generates_greedily_token_by_token(hf, image_aspect_ratio):
    reader, processor = Reader(hf, image_aspect_ratio), processor_of(hf)
    samples = []
    for picture in pictures():
        text = "<image>" if image_aspect_ratio == "square" else "<image>\nWhat colour is the boat?\n"
        inputs = (
            base_tile(reader.model, processor, picture)
            if image_aspect_ratio == "square"
            else processor(text=text, images=picture, return_tensors="pt")
        )
        output = reader.model.generate(**inputs, max_new_tokens=10, do_sample=False, eos_token_id=-1)[0].tolist()
        prompt = processor.tokenizer(text)["input_ids"]
        samples.append(Asked(picture, prompt + output[-10:], []))
    for sample, right in zip(samples, reader.right_tokens(samples)):
        assert len(right) == len(sample.tokens) and all(right[-10:])
    # Another token in the middle is wrong, and those before it stay right.
    samples[1].tokens[-5] = (samples[1].tokens[-5] + 1) % 100
    right = reader.right_tokens(samples)[1]
    assert right[-10:-5] == [True] * 5 and not right[-5]


def test_an_answer_is_its_own_tokens_and_the_end_and_right_only_as_a_whole(tokenizer):
    turns = [
        ("human", "<image>\nWhat kind of scene is this?"),
        ("gpt", "night sky"),
        ("human", "What colour is the boat?"),
        ("gpt", "red"),
    ]
    record = {"conversations": [{"from": who, "value": value} for who, value in turns]}
    sample = asked(tokenizer, pictures()[0], record)
    texts = [tokenizer.decode([sample.tokens[place] for place in answer.positions]) for answer in sample.answers]
    assert texts == ["night sky<|im_end|>", "red<|im_end|>"]
    assert [answer.question for answer in sample.answers] == ["What kind of scene is this?", "What colour is the boat?"]

    usual = {"What kind of scene is this?": "farm", "What colour is the boat?": "red"}
    right = [True] * len(sample.tokens)
    counts = sum((judge(tokenizer, sample, answer, right, usual) for answer in sample.answers), Counter())
    expected = {"answers": 2, "exact": 1.0, "base rate": 0.5, "tokens": 1.0, "content words": 1.0}
    assert shares(counts) == expected
    right[sample.answers[0].positions[-1]] = False  # it would have gone on: not the stored answer
    counts = sum((judge(tokenizer, sample, answer, right, usual) for answer in sample.answers), Counter())
    assert shares(counts) == expected | {"exact": 0.5}
    right[sample.answers[1].positions[0]] = False
    counts = sum((judge(tokenizer, sample, answer, right, usual) for answer in sample.answers), Counter())
    num_tokens = sum(len(answer.positions) - 1 for answer in sample.answers)
    assert shares(counts) == expected | {"exact": 0.0, "tokens": (num_tokens - 1) / num_tokens, "content words": 0.5}


def test_content_words_are_themes_things_colours_and_places(tokenizer):
    text = "A night sky is shown. A large red boat is at the top left, above the tree. Three things, PIER; boating in a boat's"
    tokens = tokenizer(text)["input_ids"]
    words = [
        "".join(tokenizer.decode([tokens[place]]) for place in word).strip()
        for word in content_words(tokenizer, tokens)
    ]
    found = [
        next(word for word in ("night sky", "red", "boat", "top", "left", "tree") if word in piece) for piece in words
    ]
    assert found == ["night sky", "red", "boat", "top", "left", "tree", "boat"]


def test_the_base_rate_is_the_most_frequent_answer_of_training_to_the_same_question(demo, hf):
    data = demo / "data" / "questions"
    seen = [turns_of(record) for _, record in stored(data, "train", None)]
    asked_of_all = [turn for turns in (turns_of(record) for _, record in stored(data, "val", 32)) for turn in turns]
    right = 0
    for question, answer in asked_of_all:
        answers = Counter(text for turns in seen for other, text in turns if other == question)
        right += bool(answers) and answers.most_common(1)[0][0] == answer
    scores = score(Reader(hf, "square"), data, "val", 32)
    assert scores["answers"] == len(asked_of_all) == 5 * 32
    assert scores["base rate"] == right / len(asked_of_all) > 0.2
    assert sum(kind["answers"] for kind in scores["by question"].values()) == 5 * 32 and len(scores["by question"]) == 5
    assert scores["exact"] == 0  # of random weights


def turns_of(record: dict) -> list[tuple[str, str]]:
    values = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    return list(zip(values[::2], values[1::2]))


def test_the_command_line(demo, hf, tmp_path):
    command = [
        sys.executable,
        "examples/reproduce/score_answers.py",
        "--hf",
        hf,
        "--image-aspect-ratio",
        "square",
        "--samples",
        "4",
    ]
    result = subprocess.run(
        [*command, "--data", demo / "data" / "captions", "--out", tmp_path / "s.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (
        json.loads((tmp_path / "s.json").read_text())["captions"]["answers"] == 4
        and "captions: 4 answers" in result.stdout
    )
    result = subprocess.run(
        [*command, "--data", demo / "data" / "captions", "--part", "test"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1 and "has no part 'test'" in result.stderr.splitlines()[-1]
