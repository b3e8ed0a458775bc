"""Each token carries the right marks: what is learnt, what is the caption."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rsa_megatron.data import conversation
from rsa_megatron.data.conversation import IMAGE_TOKEN, encode

CAPTION = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "A red boat is on the left."}]
TALK = [
    {"from": "human", "value": "<image>\nHow many things are there?"},
    {"from": "gpt", "value": "three"},
    {"from": "human", "value": "Where is the boat?"},
    {"from": "gpt", "value": "on the left"},
]


@pytest.fixture(scope="module")
def tokenizer(demo):
    return AutoTokenizer.from_pretrained(demo / "tokenizer")


def marked(tokenizer, text, marks):
    return tokenizer.decode([token for token, mark in zip(text.tokens, marks) if mark])


def test_the_tokenizer_is_shaped_like_qwens(tokenizer):
    assert len(tokenizer) == 1024
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN, "<video>"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    text = "A red boat is on the left, émigré 7!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_plain_is_the_image_then_the_caption(tokenizer):
    text = encode(tokenizer, CAPTION, "plain")
    assert tokenizer.decode(text.tokens) == "<image>A red boat is on the left.\n"
    assert marked(tokenizer, text, text.is_caption) == "A red boat is on the left."
    assert marked(tokenizer, text, text.is_target) == "A red boat is on the left.\n"


def test_chat_learns_the_answers_alone(tokenizer):
    text = encode(tokenizer, TALK, "chat")
    messages = [{"role": {"human": "user", "gpt": "assistant"}[t["from"]], "content": t["value"]} for t in TALK]
    assert tokenizer.decode(text.tokens) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert marked(tokenizer, text, text.is_target) == "three<|im_end|>on the left<|im_end|>"
    assert marked(tokenizer, text, text.is_caption) == "threeon the left"
    assert text.tokens.count(3) == 1


@pytest.mark.parametrize("conversation, message", [
    ([{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "  "}], "the caption is empty"),
    ([{"from": "human", "value": "<image>"}], "one of them from gpt"),
    ([{"from": "robot", "value": "hello"}], "from 'robot'; it must be human, gpt or system"),
    ([{"from": "gpt", "value": None}], "turns"),
])  # fmt: skip
def test_what_is_no_conversation_is_named(tokenizer, conversation, message):
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, conversation, "plain")


def test_a_tokenizer_that_lacks_a_token_is_named(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo / "tokenizer")
    for template in conversation.TEMPLATES:
        conversation.check_tokenizer(tokenizer, template)
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<image>": 0, "a": 1}, unk_token="a")))
    with pytest.raises(ValueError, match="no padding token"):
        conversation.check_tokenizer(plain, "plain")
    with pytest.raises(ValueError, match=r"no token <\|im_start\|>, <\|im_end\|>"):
        conversation.check_tokenizer(plain, "chat")
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 1}, unk_token="a")), unk_token="a")
    with pytest.raises(ValueError, match="no token <image>: add it"):
        conversation.check_tokenizer(other, "plain")
