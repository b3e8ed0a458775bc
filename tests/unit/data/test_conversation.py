"""Each token carries the right marks: what is learnt, what is the caption."""

import pytest
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
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


def marked(tokenizer, text, marks):
    return tokenizer.decode([token for token, mark in zip(text.tokens, marks) if mark])


def test_the_tokenizer_is_shaped_like_qwens(tokenizer):
    assert len(tokenizer) == 1024
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN, "<video>"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    text = "A red boat is on the left, émigré 7!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


# A tokenizer that can be read: words, single blanks aside; a newline after a full stop is one token with it, as Qwen2's.
WORDS = [
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    IMAGE_TOKEN,
    "\n",
    "\n\n",
    ".",
    ".\n",
    "system",
    "user",
    "assistant",
    "You",
    "are",
    "a",
    "helpful",
    "helpful assistant",
    "what",
    "?",
    "boat",
    "red",
    "left",
    "two",
    "é",
    "船",
    "😀",
    "hi",
    "there",
    "?\n",
]


@pytest.fixture(scope="module")
def words():
    model = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}))
    model.pre_tokenizer = Split(Regex(r"[.?]\n|\n+|[.?]|[^\s.?]+| +"), "isolated")
    model.add_special_tokens([AddedToken(word, special=True) for word in WORDS[1:4]])
    # A blank is no token of its own.
    model.model = WordLevel({**{word: index for index, word in enumerate(WORDS)}, " ": len(WORDS)})
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>")


SYSTEM = "S!system N!You are a helpful assistant . E!N!"  # the default prompt, in the style of LLaVA's labels
NAMES = {
    "S": "<|im_start|>",
    "E": "<|im_end|>",
    "I": IMAGE_TOKEN,
    "N": "\n",
    "NN": "\n\n",
    ".N": ".\n",
    "?N": "?\n",
    "_": " ",
}


def written(expected: str) -> tuple[list[str], list[bool], list[bool]]:
    """Tokens one by one; ! after one that is learnt, * after one of the caption that is learnt, nothing after the others."""
    tokens, targets, captions = [], [], []
    for word in expected.replace("!", "! ").split():
        name = word.rstrip("!*")
        tokens.append(NAMES.get(name, name))
        targets.append(word[-1] in "!*")
        captions.append(word[-1] == "*")
    return tokens, targets, captions


def turns(*values):
    return [{"from": value[0], "value": value[1]} for value in values]


# name: (template, style, conversation, what must come out), by hand from LLaVA-NeXT's preprocess_plain, preprocess_qwen and
# preprocess_multimodal. Blanks between words are left out on both sides.
CASES = {
    "plain, a caption": (
        "plain",
        "llava",
        turns(("human", "<image>\nwhat?"), ("gpt", "a red boat")),
        "I a* red* boat* N!",
    ),
    "plain, a full stop takes the newline along": (
        "plain",
        "llava",
        turns(("human", "<image>"), ("gpt", "a boat.")),
        "I a* boat* .N*",
    ),
    "plain, no image": ("plain", "llava", turns(("human", "what?"), ("gpt", "two")), "two* N!"),
    "plain, two images": ("plain", "llava", turns(("human", "<image><image>"), ("gpt", "two")), "I I two* N!"),
    "plain, unicode": ("plain", "llava", turns(("human", "<image>"), ("gpt", "é 船 😀")), "I é* 船* 😀* N!"),
    "plain, a caption with the image token": (
        "plain",
        "llava",
        turns(("human", "<image>"), ("gpt", "a<image> boat")),
        "I I N* a* boat* N!",
    ),
    "plain, answers alone, whoever begins": (
        "plain",
        "llava",
        turns(("gpt", "two"), ("human", "hi"), ("gpt", "left")),
        "two* N! left* N!",
    ),
    "a question with an image": (
        "qwen_1_5",
        "llava",
        turns(("human", "<image>\nwhat?"), ("gpt", "a boat")),
        SYSTEM + "S!user N!I N!what ? E!N!S!assistant! N!a* boat* E!N!",
    ),
    "a question with an image, answers alone learnt": (
        "qwen_1_5",
        "answer_only",
        turns(("human", "<image>\nwhat?"), ("gpt", "a boat")),
        "S system N You are a helpful assistant . E N S user N I N what ? E N S assistant N a* boat* E!N",
    ),
    "the image in the middle comes first": (
        "qwen_1_5",
        "llava",
        turns(("human", "what <image>?"), ("gpt", "a boat")),
        SYSTEM + "S!user N!I N!what ? E!N!S!assistant! N!a* boat* E!N!",
    ),
    "two images stay where they are": (
        "qwen_1_5",
        "llava",
        turns(("human", "<image> left <image> ?"), ("gpt", "two")),
        SYSTEM + "S!user N!I left I ? E!N!S!assistant! N!two* E!N!",
    ),
    "two turns, the first answer empty": (
        "qwen_1_5",
        "llava",
        turns(("human", "hi"), ("gpt", ""), ("human", ""), ("gpt", "two")),
        SYSTEM + "S!user N!hi E!N!S!assistant! N!E!N!S!user N!E!N!S!assistant! N!two* E!N!",
    ),
    "a system prompt of its own": (
        "qwen_1_5",
        "llava",
        turns(("system", "hi"), ("human", "what?"), ("gpt", "two")),
        "S!system N!hi E!N!S!user N!what ? E!N!S!assistant! N!two* E!N!",
    ),
    "the answer that comes first is dropped": (
        "qwen_1_5",
        "llava",
        turns(("gpt", "left"), ("human", "what?"), ("gpt", "two")),
        SYSTEM + "S!user N!what ? E!N!S!assistant! N!two* E!N!",
    ),
    "two answers in a row": (
        "qwen_1_5",
        "answer_only",
        turns(("system", "hi"), ("human", "what"), ("gpt", "two"), ("gpt", "left")),
        "S system N hi E N S user N what E N S assistant N two* E!N S assistant N left* E!N",
    ),
    "newlines of a question are learnt too, but not one with more to it": (
        "qwen_1_5",
        "llava",
        turns(("system", "hi"), ("user", "a\nboat?\nhi\n\nthere"), ("assistant", "two")),
        "S!system N!hi E!N!S!user N!a N!boat ?N hi NN there E!N!S!assistant! N!two* E!N!",
    ),
    "an answer with the image token": (
        "qwen_1_5",
        "answer_only",
        turns(("system", "hi"), ("human", "what"), ("gpt", "a<image> boat")),
        "S system N hi E N S user N what E N S assistant N I N* a* boat* E!N",
    ),
    "unicode": (
        "qwen_1_5",
        "answer_only",
        turns(("system", "船"), ("human", "é 😀"), ("gpt", "😀 船 é")),
        "S system N 船 E N S user N é 😀 E N S assistant N 😀* 船* é* E!N",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_marks_are_those_written_by_hand(words, name):
    template, style, talk, expected = CASES[name]
    text = encode(words, talk, template, label_style=style)
    blank = WORDS.index("?\n") + 1
    kept = [row for row in zip(text.tokens, text.is_target, text.is_caption) if row[0] != blank]
    tokens, targets, captions = written(expected)
    assert [row[0] for row in kept] == [WORDS.index(token) for token in tokens]
    assert [row[1] for row in kept] == targets
    assert [row[2] for row in kept] == captions


def test_one_of_them_in_numbers(words):
    text = encode(words, turns(("human", "<image>\nwhat?"), ("gpt", "a boat.")), "plain")
    assert text.tokens == [3, 13, 28, 18, 7]
    assert text.is_target == text.is_caption == [False, True, True, True, True]


def preprocess_qwen(tokenizer, talk):
    """LLaVA's rule, turn by turn as it is written there: input ids, and labels with None where nothing is learnt."""
    ids, labels = [], []
    for role, value in [("system", conversation.SYSTEM_PROMPT), *((t["from"], t["value"]) for t in talk)]:
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        turn = tokenizer(f"<|im_start|>{role}\n{value}<|im_end|>\n", add_special_tokens=False)["input_ids"]
        ids += turn
        labels += turn if role == "assistant" else [None] * len(turn)
    always = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) + tokenizer("\n")["input_ids"]
    return ids, [token if token in always else label for token, label in zip(ids, labels)]


@pytest.mark.parametrize("talk", [CAPTION, TALK])
def test_labels_are_llavas_on_a_byte_level_tokenizer(tokenizer, talk):
    ids, labels = preprocess_qwen(tokenizer, talk)
    text = encode(tokenizer, talk, "qwen_1_5", label_style="llava")
    assert text.tokens == ids
    assert [token if target else None for token, target in zip(text.tokens, text.is_target)] == labels
    # The other style is another, in what is learnt alone.
    other = encode(tokenizer, talk, "qwen_1_5", label_style="answer_only")
    assert (other.tokens, other.is_caption) == (text.tokens, text.is_caption) and other.is_target != text.is_target


def test_plain_is_the_image_then_the_caption(tokenizer):
    text = encode(tokenizer, CAPTION, "plain")
    assert tokenizer.decode(text.tokens) == "<image>A red boat is on the left.\n"
    assert marked(tokenizer, text, text.is_caption) == "A red boat is on the left."
    assert marked(tokenizer, text, text.is_target) == "A red boat is on the left.\n"


def test_answer_only_learns_the_answers_alone(tokenizer):
    text = encode(tokenizer, TALK, "qwen_1_5", label_style="answer_only")
    messages = [{"role": {"human": "user", "gpt": "assistant"}[t["from"]], "content": t["value"]} for t in TALK]
    assert tokenizer.decode(text.tokens) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert marked(tokenizer, text, text.is_target) == "three<|im_end|>on the left<|im_end|>"
    assert marked(tokenizer, text, text.is_caption) == "threeon the left"
    assert text.tokens.count(3) == 1


@pytest.mark.parametrize("template", conversation.TEMPLATES)
@pytest.mark.parametrize(
    "talk, message",
    [
        (turns(("human", "<image>"), ("gpt", "  ")), "the caption is empty"),
        (turns(("human", "<image>")), "one of them from gpt"),
        (turns(("robot", "hello")), "from 'robot'; it must be human, gpt or system"),
        (turns(("gpt", None)), "turns"),
        ("a red boat", 'a turn of "conversations" is no'),
    ],
)
def test_what_is_no_conversation_is_named(tokenizer, template, talk, message):
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, talk, template)


def test_a_lone_answer_that_llava_drops_is_named(tokenizer):
    for talk in (turns(("gpt", "two")), turns(("system", "hi"), ("gpt", "two"), ("human", "what?"))):
        with pytest.raises(ValueError, match="its only answer comes before any question"):
            encode(tokenizer, talk, "qwen_1_5")


def test_a_tokenizer_that_lacks_a_token_is_named(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo / "tokenizer")
    for template in conversation.TEMPLATES:
        conversation.check_tokenizer(tokenizer, template)
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<image>": 0, "a": 1}, unk_token="a")))
    with pytest.raises(ValueError, match="no padding token"):
        conversation.check_tokenizer(plain, "plain")
    with pytest.raises(ValueError, match=r"no token <\|im_start\|>, <\|im_end\|>"):
        conversation.check_tokenizer(plain, "qwen_1_5")
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 1}, unk_token="a")), unk_token="a")
    with pytest.raises(ValueError, match="no token <image>: add it"):
        conversation.check_tokenizer(other, "plain")
