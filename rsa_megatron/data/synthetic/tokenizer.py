"""A small tokenizer in Hugging Face format, shaped like Qwen2's, trained on given texts: no download needed."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rsa_megatron.data.conversation import IMAGE_TOKEN, SYSTEM_PROMPT

# <video> is in no text: Hugging Face's processor for LLaVA-OneVision asks the tokenizer for it.
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN, "<video>"]
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM_PROMPT + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of exactly vocab_size ids and save it to the folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Few texts give few merges: spare ids keep the size a multiple that tensor parallelism can split.
    spare = [f"<|spare_{i}|>" for i in range(vocab_size - tokenizer.get_vocab_size())]
    tokenizer.add_special_tokens(spare)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
    )
    wrapped.save_pretrained(folder)
    return wrapped
