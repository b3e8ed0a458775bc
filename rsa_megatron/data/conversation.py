"""From a LLaVA conversation to tokens, each marked as target or not, and as caption or not.

A conversation is LLaVA's: [{"from": "human", "value": "<image>\\nDescribe it."}, {"from": "gpt", "value": "..."}].
Two templates of LLaVA's, token for token:
    plain       <image>ANSWER\\n                     stage 1: the image, then its caption; all but the image are targets
    qwen_1_5    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
                <|im_start|>user\\nQUESTION<|im_end|>\\n<|im_start|>assistant\\nANSWER<|im_end|>\\n
and two styles of labels for the second:
    llava         the answers with "<|im_start|>assistant\\n" before and "\\n" after them; and wherever else they stand, also
                  in questions, the tokens "\\n", <|im_start|> and <|im_end|>: so LLaVA-OneVision was trained
    answer_only   the answers, each with its <|im_end|>
In all, the caption is the answers' own tokens: no template, no image. The only image of a turn comes first in it.

(LLaVA-NeXT, llava/train/train.py: preprocess_plain, preprocess_qwen, preprocess_multimodal.)
"""

import bisect
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # only for annotations: importing it takes a second
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"
TEMPLATES = ("plain", "qwen_1_5")
LABEL_STYLES = ("llava", "answer_only")
SYSTEM_PROMPT = "You are a helpful assistant."
_START, _END = _CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass
class EncodedText:
    """Tokens, and two marks on each."""

    tokens: list[int] = field(default_factory=list)
    #: this token is to be predicted from those before it
    is_target: list[bool] = field(default_factory=list)
    #: this token is the caption's
    is_caption: list[bool] = field(default_factory=list)

    def truncate(self, length: int) -> "EncodedText":
        """Return the first `length` tokens."""
        return EncodedText(self.tokens[:length], self.is_target[:length], self.is_caption[:length])


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", template: str) -> None:
    """Raise ValueError, naming what is missing, unless the tokenizer has what the template needs."""
    names = (IMAGE_TOKEN, *(_CHAT_TOKENS if template == "qwen_1_5" else ()))
    missing = [name for name in names if name not in tokenizer.get_vocab()]
    if missing:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has no token {', '.join(missing)}: add it (tokenizer.add_tokens, "
            "special_tokens=True) and save the tokenizer again"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has no padding token: set its pad_token and save it again"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} is a slow one, which gives no token offsets: "
            "save its fast version (tokenizer.json)"
        )


def check_conversation(conversation: list) -> list[tuple[str, str]]:
    """Return the turns as (role, text), role being system, user or assistant.

    Raises:
        ValueError: it is not a conversation, or has no answer.
    """
    if not isinstance(conversation, list) or not all(isinstance(turn, dict) for turn in conversation):
        raise ValueError('a turn of "conversations" is not {"from": ..., "value": ...}')
    turns = [(_get_role(turn), turn.get("value", turn.get("content"))) for turn in conversation]
    answers = [value for role, value in turns if role == "assistant"]
    if not answers or not all(isinstance(value, str) for _, value in turns):
        raise ValueError('"conversations" needs turns {"from": "human" or "gpt", "value": text}, one of them from gpt')
    if not "".join(answers).strip():
        raise ValueError("the caption is empty")
    return turns


def encode(
    tokenizer: "PreTrainedTokenizerBase", conversation: list[dict], template: str, *, label_style: str = "llava"
) -> EncodedText:
    """Encode a conversation; `<image>` in its text becomes the image token, which is never a target.

    Args:
        label_style: of the template qwen_1_5; plain has only one.

    Raises:
        ValueError: when it is not a conversation, or has no answer.
    """
    turns = [(role, _move_image_first(value)) for role, value in check_conversation(conversation)]
    pieces = _format_plain(turns) if template == "plain" else _format_qwen_1_5(turns, label_style)
    text = _tokenize(tokenizer, pieces)
    if template == "qwen_1_5" and label_style == "llava":
        always = _get_always_trained(tokenizer)
        text.is_target = [target or token in always for token, target in zip(text.tokens, text.is_target)]
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text.is_target = [target and token != image for token, target in zip(text.tokens, text.is_target)]
    text.is_caption = [caption and token != image for token, caption in zip(text.tokens, text.is_caption)]
    return text


@functools.lru_cache(maxsize=8)
def _get_always_trained(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Return the tokens that the style llava trains wherever they stand; cached, not looked up for each sample."""
    return frozenset(
        [*tokenizer.convert_tokens_to_ids(_CHAT_TOKENS), *tokenizer("\n", add_special_tokens=False)["input_ids"]]
    )


def _get_role(turn: dict) -> str:
    speaker = turn.get("from", turn.get("role"))
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise ValueError(f'a turn of "conversations" is from {speaker!r}; it must be human, gpt or system')
    return _ROLES[speaker]


#: A stretch of text, whether it is a target, and whether it is the caption.
_Piece = tuple[str, bool, bool]


def _format_plain(turns: list[tuple[str, str]]) -> list[_Piece]:
    num_images = sum(value.count(IMAGE_TOKEN) for role, value in turns if role != "assistant")
    pieces = [(IMAGE_TOKEN * num_images, False, False)]
    for role, value in turns:
        if role == "assistant":
            pieces += [(value, True, True), ("\n", True, False)]
    return pieces


def _format_qwen_1_5(turns: list[tuple[str, str]], label_style: str) -> list[_Piece]:
    if turns[0][0] != "system":
        turns = [("system", SYSTEM_PROMPT), *turns]
    if turns[1][0] == "assistant":
        # LLaVA drops an answer to nothing.
        turns = [turns[0], *turns[2:]]
        if not any(role == "assistant" and value.strip() for role, value in turns):
            raise ValueError("its only answer comes before any question, where LLaVA drops it")
    pieces = []
    for role, value in turns:
        is_answer = role == "assistant"
        whole_turn = is_answer and label_style == "llava"
        pieces += [
            (f"{_START}{role}\n", whole_turn, False),
            (value, is_answer, is_answer),
            (_END, is_answer, False),
            ("\n", whole_turn, False),
        ]
    return pieces


def _move_image_first(value: str) -> str:
    """Put a turn's only image first, on a line of its own."""
    if value.count(IMAGE_TOKEN) != 1 or value.startswith(IMAGE_TOKEN):
        return value
    return f"{IMAGE_TOKEN}\n{value.replace(IMAGE_TOKEN, '').strip()}".strip()


def _tokenize(tokenizer: "PreTrainedTokenizerBase", pieces: list[_Piece]) -> EncodedText:
    # The text as a whole: where a word ends and the template goes on, separate pieces would be other tokens (".\n").
    text, starts = "", []
    for piece, _, _ in pieces:
        starts.append(len(text))
        text += piece
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # A token over two pieces is of the one that it begins in. (Of empty pieces that begin at one place the last has text.)
    origins = [pieces[bisect.bisect_right(starts, start) - 1] for start, _ in encoded["offset_mapping"]]
    return EncodedText(encoded["input_ids"], [target for _, target, _ in origins], [caption for *_, caption in origins])
