"""From a LLaVA conversation to tokens, with what is learnt and what is the caption marked on each.

A conversation is LLaVA's: [{"from": "human", "value": "<image>\\nDescribe it."}, {"from": "gpt", "value": "..."}].
Two templates:
    plain   <image>ANSWER\\n                     stage 1: the image, then its caption; all but the image is learnt
    chat    <|im_start|>user\\nQUESTION<|im_end|>\\n<|im_start|>assistant\\nANSWER<|im_end|>\\n      answers are learnt
In both, the caption is the answers' own tokens: no template, no special token, no image.
"""

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"
TEMPLATES = ("plain", "chat")
_CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")


@dataclass
class EncodedText:
    """Tokens, and two marks on each."""

    tokens: list[int] = field(default_factory=list)
    #: this token is to be predicted from those before it
    is_target: list[bool] = field(default_factory=list)
    #: this token is the caption's
    is_caption: list[bool] = field(default_factory=list)

    def add(self, tokens: list[int], *, target: bool = False, caption: bool = False) -> None:
        self.tokens += tokens
        self.is_target += [target] * len(tokens)
        self.is_caption += [caption] * len(tokens)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Raise ValueError, naming what is missing, unless the tokenizer has the special tokens of the template."""
    names = (IMAGE_TOKEN, *(_CHAT_TOKENS if template == "chat" else ()))
    missing = [name for name in names if name not in tokenizer.get_vocab()]
    if missing:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has no token {', '.join(missing)}: add it (tokenizer.add_tokens, "
            "special_tokens=True) and save the tokenizer again"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no padding token: set its pad_token and save it again")


def encode(tokenizer: PreTrainedTokenizerBase, conversation: list[dict], template: str) -> EncodedText:
    """Encode a conversation; `<image>` in its text becomes the image token.

    Raises:
        ValueError: when it is not a conversation, or has no answer.
    """
    if not all(isinstance(turn, dict) for turn in conversation):
        raise ValueError('a turn of "conversations" is no {"from": ..., "value": ...}')
    turns = [(_role(turn), turn.get("value")) for turn in conversation]
    answers = [value for role, value in turns if role == "assistant"]
    if not answers or not all(isinstance(value, str) for _, value in turns):
        raise ValueError('"conversations" needs turns {"from": "human" or "gpt", "value": text}, one of them from gpt')
    if not "".join(answers).strip():
        raise ValueError("the caption is empty")
    return _encode_plain(tokenizer, turns) if template == "plain" else _encode_chat(tokenizer, turns)


def _role(turn: dict) -> str:
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    speaker = turn.get("from", turn.get("role"))
    if not isinstance(speaker, str) or speaker not in roles:
        raise ValueError(f'a turn of "conversations" is from {speaker!r}; it must be human, gpt or system')
    return roles[speaker]


def _encode_plain(tokenizer, turns) -> EncodedText:
    text = EncodedText()
    num_images = sum(value.count(IMAGE_TOKEN) for _, value in turns)
    text.add([tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)] * num_images)
    for role, value in turns:
        if role == "assistant":
            text.add(_tokenize(tokenizer, value.strip()), target=True, caption=True)
            text.add(_tokenize(tokenizer, "\n"), target=True)
    return text


def _encode_chat(tokenizer, turns) -> EncodedText:
    # By hand, not by the tokenizer's own template: which token came from where must be known.
    text = EncodedText()
    start, end = ([tokenizer.convert_tokens_to_ids(token)] for token in _CHAT_TOKENS)
    newline = _tokenize(tokenizer, "\n")
    for role, value in turns:
        is_answer = role == "assistant"
        text.add(start + _tokenize(tokenizer, role) + newline)
        text.add(_tokenize(tokenizer, value.strip()), target=is_answer, caption=is_answer)
        text.add(end, target=is_answer)
        text.add(newline)
    return text


def _tokenize(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
