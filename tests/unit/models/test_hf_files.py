"""What is written for Hugging Face loads there, counts the same tokens, and serves the template of training."""

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    PreTrainedTokenizerFast,
)

from checkpoint_conversion import forward_comparison
from rsa_megatron.anyres import ImageLayout, choose_grid
from rsa_megatron.data.conversation import IMAGE_TOKEN, encode
from rsa_megatron.data.synthetic import tokenizer as demo_tokenizer
from rsa_megatron.models.architectures import get_architecture
from rsa_megatron.models.hf_config import read_architecture
from rsa_megatron.models.hf_files import copy_model_files, write_chat_template, write_model_files
from tests.support import tiny_hf
from tests.support.hf_configs import CONVERSATION, MESSAGES, unnamed


@pytest.fixture(scope="module")
def written(demo, tmp_path_factory) -> Path:
    """A tiny model's files."""
    folder = tmp_path_factory.mktemp("written") / "model"
    write_model_files(folder, tiny_hf.architecture(tied=True), AutoTokenizer.from_pretrained(demo / "tokenizer"))
    return folder


def test_everything_written_loads_in_transformers(written):
    config, processor = AutoConfig.from_pretrained(written), AutoProcessor.from_pretrained(written)
    assert type(config) is LlavaOnevisionConfig and type(processor).__name__ == "LlavaOnevisionProcessor"
    for what in (AutoImageProcessor.from_pretrained(written), processor.image_processor, processor.video_processor):
        assert list(what.image_mean) == list(what.image_std) == [0.5] * 3
        assert (what.size["height"], what.size["width"], int(what.resample)) == (58, 58, 3)
    assert LlavaOnevisionImageProcessor().image_mean[0] != 0.5
    ids = AutoTokenizer.from_pretrained(written).convert_tokens_to_ids([IMAGE_TOKEN, "<video>"])
    assert ids == [config.image_token_index, config.video_token_index] == [3, 4]
    assert processor.chat_template == processor.tokenizer.chat_template


def test_the_rope_base_is_not_lost(written, tmp_path, tokenizer):
    assert AutoConfig.from_pretrained(written).text_config.rope_parameters["rope_theta"] == 1e6
    assert LlavaOnevisionConfig().text_config.rope_parameters["rope_theta"] == 1e4
    model = tiny_hf.architecture(tied=True)
    model = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, rotary_base=500_000))
    write_model_files(tmp_path, model, tokenizer)
    assert AutoConfig.from_pretrained(tmp_path).text_config.rope_parameters["rope_theta"] == 500_000


def expected_tokens(size: tuple[int, int]) -> int:
    """What the tiny model makes of an image."""
    model = tiny_hf.architecture(tied=True)
    layout = ImageLayout(*size, *choose_grid(*size, model.grid_pinpoints, model.vision.image_size))
    return layout.num_tokens(model.vision.tokens_per_side, model.max_tiles)


@pytest.mark.parametrize("size", tiny_hf.IMAGE_SIZES)
def test_the_processor_makes_as_many_image_tokens_as_the_model(written, size):
    assert num_image_tokens(AutoProcessor.from_pretrained(written), size) == expected_tokens(size)


def test_the_number_of_image_tokens_hangs_on_max_tiles(written):
    processor = AutoProcessor.from_pretrained(written)
    before = [num_image_tokens(processor, size) for size in tiny_hf.IMAGE_SIZES]
    processor.vision_aspect_ratio = "anyres_max_9"
    assert before != [num_image_tokens(processor, size) for size in tiny_hf.IMAGE_SIZES]


def test_the_hubs_sizes_give_known_numbers_of_image_tokens(tmp_path, tokenizer):
    write_model_files(tmp_path, get_architecture("llava-ov-0.5b"), tokenizer)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert [num_image_tokens(processor, size) for size in ((384, 384), (336, 500), (100, 1000))] == [1485, 1836, 1467]


def num_image_tokens(processor, size: tuple[int, int]) -> int:
    inputs = processor(images=[forward_comparison.make_picture(*size)], text=[IMAGE_TOKEN], return_tensors="pt")
    return int((inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).sum())


@pytest.mark.parametrize("size", [(60, 80), (200, 20)])
def test_a_served_conversation_has_the_tokens_of_training(written, size):
    processor = AutoProcessor.from_pretrained(written)

    def served(**options):
        text = processor.apply_chat_template(MESSAGES, tokenize=False, **options)
        return processor(images=[forward_comparison.make_picture(*size)], text=[text], return_tensors="pt")[
            "input_ids"
        ][0].tolist()

    training = encode(processor.tokenizer, CONVERSATION, "qwen_1_5").tokens
    expected = [token for token in training for _ in range(expected_tokens(size) if token == 3 else 1)]
    assert served() == expected
    # A template that leaves out the newline after the image gives others; a text model's own does not know images.
    assert served(chat_template=processor.chat_template.replace("<image>\n", "<image>")) != expected
    text = processor.apply_chat_template(MESSAGES, tokenize=False, chat_template=demo_tokenizer.CHAT_TEMPLATE)
    assert IMAGE_TOKEN not in text and "'type': 'image'" in text


def test_a_model_trained_with_our_template_is_served_with_it(written, tmp_path):
    """The hub's llava-hf folders have another, with other blanks between the same words."""
    other = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    for trained in (False, True):
        folder = tmp_path / str(trained)
        copy_model_files(written, folder)
        (folder / "chat_template.jinja").write_text(other)
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": other}))
        if trained:
            write_chat_template(folder)
        expected = AutoProcessor.from_pretrained(written).apply_chat_template(MESSAGES)
        assert (AutoProcessor.from_pretrained(folder).apply_chat_template(MESSAGES) == expected) == trained
        assert (
            AutoTokenizer.from_pretrained(folder)
            .apply_chat_template(MESSAGES[2:], tokenize=False)
            .startswith(
                "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                if trained
                else "<|im_start|>user W"
            )
        )


def test_a_prompt_ends_where_the_answer_begins(written):
    processor = AutoProcessor.from_pretrained(written)
    whole, prompt = (
        processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompting)
        for messages, prompting in ((MESSAGES, False), (MESSAGES[:3], True))
    )
    assert whole == prompt + "on the left<|im_end|>\n"


def test_a_tokenizer_gets_the_tokens_that_it_lacks(tmp_path):
    tokenizer = text_tokenizer()
    write_model_files(tmp_path, tiny_hf.architecture(tied=True), tokenizer)
    config, vocabulary = AutoConfig.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert (
        (vocabulary[IMAGE_TOKEN], vocabulary["<video>"])
        == (config.image_token_index, config.video_token_index)
        == (4, 5)
    )
    assert AutoTokenizer.from_pretrained(tmp_path)("a<image>a")["input_ids"] == [0, 4, 0]


def text_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {word: number for number, word in enumerate(["a", "<|endoftext|>", "<|im_start|>", "<|im_end|>"])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="a")), eos_token="<|im_end|>")


def test_a_tokenizer_with_too_many_ids_is_refused(tmp_path, tokenizer):
    model = dataclasses.replace(tiny_hf.architecture(tied=True), vocab_size=1023)
    with pytest.raises(ValueError, match=r"has 1024 ids \(none added\), the model 1023 word embeddings"):
        write_model_files(tmp_path, model, tokenizer)
    model = dataclasses.replace(model, vocab_size=5)
    with pytest.raises(ValueError, match=r"has 6 ids \(<image> and <video> added\), the model 5 word embeddings"):
        write_model_files(tmp_path, model, text_tokenizer())
    assert not list(tmp_path.iterdir())


def test_no_weights_are_copied(written, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    copy_model_files(written, source)
    (source / "onnx").mkdir()
    weights = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "a.onnx_data",
        "model.safetensors.index.fp16.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "optimizer.pt",
        "training_args.bin",
        "model.00.pth",
        "model.gguf",
        "tf_model.h5",
        "model.msgpack",
        "x.ckpt",
    ]
    for name in weights:
        (source / name).write_bytes(b"weights")
    (source / "README.md").write_text("kept")
    copy_model_files(source, target)
    kept = {file.name for file in written.iterdir()} | {"README.md"}
    assert {file.name for file in target.iterdir()} == kept and "config.json" in kept
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in kept)


def test_a_folder_of_this_transformers_gets_the_names_of_4_45_in_the_copy(written, tmp_path):
    saved, copy = tmp_path / "saved", tmp_path / "copy"
    AutoConfig.from_pretrained(written).save_pretrained(saved)
    AutoProcessor.from_pretrained(written).save_pretrained(saved)
    copy_model_files(saved, copy)

    def content(folder, name):
        return json.loads((folder / name).read_text()) if (folder / name).is_file() else {}

    def old_names(folder):
        tokenizer = content(folder, "tokenizer_config.json")
        return {
            "rope_theta": content(folder, "config.json")["text_config"].get("rope_theta"),
            "image_mean": content(folder, "preprocessor_config.json").get("image_mean"),
            "video": content(folder, "video_preprocessor_config.json").get("image_mean"),
            "template": content(folder, "chat_template.json").get("chat_template"),
            "tokenizer_class": tokenizer["tokenizer_class"],
            "special": tokenizer.get("additional_special_tokens"),
            "tokenizer's template": tokenizer.get("chat_template"),
        }

    expected = old_names(written)
    assert old_names(copy) == expected and None not in expected.values()
    assert all(old_names(saved)[key] != value for key, value in expected.items())
    # This version reads the copy as it read the folder.
    assert unnamed(read_architecture(copy)) == unnamed(read_architecture(saved)) == unnamed(read_architecture(written))
    processors = [AutoProcessor.from_pretrained(folder) for folder in (saved, copy)]
    assert processors[0].to_dict() == processors[1].to_dict()
    assert processors[0].chat_template == processors[1].chat_template == expected["template"]
    inputs = [AutoTokenizer.from_pretrained(folder)("a <image> b<|im_end|>")["input_ids"] for folder in (saved, copy)]
    assert inputs[0] == inputs[1] and {2, 3} <= set(inputs[0])
