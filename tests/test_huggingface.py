"""Configs that people bring are read right or refused by their key; what is written, transformers loads as it was meant."""

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
    SiglipConfig,
    SiglipVisionConfig,
)

from checkpoint_conversion import model_parts
from rsa_megatron.anyres import ImageLayout, choose_grid
from rsa_megatron.data import demo_tokenizer
from rsa_megatron.data.conversation import IMAGE_TOKEN, encode
from rsa_megatron.huggingface import find_architecture, read_architecture, read_towers
from rsa_megatron.huggingface_files import copy_model_files, write_chat_template, write_model_files
from rsa_megatron.llava.architectures import ARCHITECTURES, Architecture, get_architecture
from tests.support import tiny_hf

PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
SIGLIP = dict(hidden_size=1152, image_size=384, intermediate_size=4304, model_type="siglip_vision_model",
              num_attention_heads=16, num_hidden_layers=26, patch_size=14, vision_use_head=False)  # fmt: skip
QWEN2 = dict(architectures=["Qwen2ForCausalLM"], bos_token_id=151643, eos_token_id=151645, model_type="qwen2",
             rope_theta=1000000.0, torch_dtype="bfloat16")  # fmt: skip
# What a llava-hf repository's config.json holds: transformers 4.45 left out what its config classes have as defaults.
HUB = dict(
    architectures=["LlavaOnevisionForConditionalGeneration"], ignore_index=-100, image_grid_pinpoints=PINPOINTS,
    image_token_index=151646, model_type="llava_onevision", projector_hidden_act="gelu", tie_word_embeddings=False,
    torch_dtype="float16", transformers_version="4.45.0.dev0", use_image_newline_parameter=True, video_token_index=151647,
    vision_aspect_ratio="anyres_max_9", vision_feature_layer=-1, vision_feature_select_strategy="full", vision_config=SIGLIP,
)  # fmt: skip
TEXT = {
    "llava-ov-0.5b": dict(QWEN2, hidden_size=896, intermediate_size=4864, max_window_layers=24, num_attention_heads=14,
                          num_hidden_layers=24, num_key_value_heads=2, tie_word_embeddings=True, vocab_size=152000),
    "llava-ov-7b": dict(QWEN2, hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_hidden_layers=28,
                        num_key_value_heads=4, vocab_size=152128),
}  # fmt: skip
CONVERSATION = [
    {"from": "human", "value": "<image>\nHow many things are there?"},
    {"from": "gpt", "value": "three"},
    {"from": "human", "value": "Where is the boat?"},
    {"from": "gpt", "value": "on the left"},
]
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many things are there?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "three"}]},
    {"role": "user", "content": "Where is the boat?"},
    {"role": "assistant", "content": "on the left"},
]


def write_config(folder: Path, config: dict, name: str = "config.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(config))
    return folder


def hub(name: str = "llava-ov-0.5b", *, vision=(), text=(), **changes) -> dict:
    """The hub's config, changed."""
    return HUB | dict(text_config=TEXT[name] | dict(text), vision_config=SIGLIP | dict(vision)) | changes


def unnamed(architecture: Architecture) -> Architecture:
    return dataclasses.replace(architecture, name="")


@pytest.fixture
def tokenizer(demo):
    return AutoTokenizer.from_pretrained(demo / "tokenizer")


@pytest.fixture(scope="module")
def written(demo, tmp_path_factory) -> Path:
    """A tiny model's files."""
    folder = tmp_path_factory.mktemp("written") / "model"
    write_model_files(folder, tiny_hf.architecture(tied=True), AutoTokenizer.from_pretrained(demo / "tokenizer"))
    return folder


# Reading


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_written_is_read_again(tmp_path, tokenizer, name):
    write_model_files(tmp_path, get_architecture(name), tokenizer)
    assert unnamed(find_architecture(str(tmp_path))) == unnamed(get_architecture(name))
    assert read_architecture(tmp_path).name == tmp_path.name


@pytest.mark.parametrize("name", TEXT)
def test_the_hubs_models_are_those_of_the_table(tmp_path, name):
    """0.5b is tied by its text_config alone, which tells the two apart."""
    assert unnamed(read_architecture(write_config(tmp_path, hub(name)))) == unnamed(get_architecture(name))
    other = {"llava-ov-0.5b": "llava-ov-7b", "llava-ov-7b": "llava-ov-0.5b"}[name]
    assert unnamed(read_architecture(tmp_path)) != unnamed(get_architecture(other))


@pytest.mark.parametrize("name", TEXT)
def test_configs_are_read_as_this_transformers_saves_them(tmp_path, name):
    config = AutoConfig.from_pretrained(write_config(tmp_path, hub(name, dtype="bfloat16")))
    config.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert "rope_theta" not in text and text["rope_parameters"]["rope_theta"] == 1e6
    assert unnamed(read_architecture(tmp_path)) == unnamed(get_architecture(name))


@pytest.mark.parametrize(
    "text, changed",
    [
        (dict(rope_theta=500000), dict(rotary_base=500_000)),
        (dict(rope_theta=None, rope_parameters=dict(rope_type="default", rope_theta=1e4)), dict(rotary_base=10_000)),
        (dict(rms_norm_eps=1e-5), dict(rmsnorm_epsilon=1e-5)),
        (dict(max_position_embeddings=131072), dict(max_position_embeddings=131072)),
        (dict(head_dim=64, rope_scaling=None, attention_dropout=0.0), {}),
        (dict(use_sliding_window=True, max_window_layers=24), {}),  # no layer is beyond the 24th
        (dict(sliding_window=32768, use_sliding_window=False, max_window_layers=2), {}),
    ],
)
def test_what_a_decoder_may_have_of_its_own(tmp_path, text, changed):
    decoder = get_architecture("llava-ov-0.5b").decoder
    expected = dataclasses.replace(decoder, **changed)
    assert read_architecture(write_config(tmp_path, hub(text=text))).decoder == expected
    assert bool(changed) == (expected != decoder)


@pytest.mark.parametrize(
    "config, words",
    [
        (hub(vision_feature_layer=-2), ["vision_feature_layer is -2; only -1"]),
        (hub(vision_feature_layer=[-2, -1]), ["vision_feature_layer is [-2, -1]"]),
        (hub(vision_feature_select_strategy="default"), ["vision_feature_select_strategy is 'default'"]),
        (hub(vision_feature_select_strategy="cls"), ["vision_feature_select_strategy", "cls"]),
        (hub(projector_hidden_act="relu"), ["projector_hidden_act is 'relu'"]),
        (hub(multimodal_projector_bias=False), ["multimodal_projector_bias is False"]),
        (hub(vision_aspect_ratio="anyres"), ["vision_aspect_ratio is 'anyres'; anyres_max_N"]),
        (hub(vision_aspect_ratio="anyres_max_0"), ["vision_aspect_ratio is 'anyres_max_0'"]),
        (hub(image_grid_pinpoints=[[384, 384], [336, 672]]), ["image_grid_pinpoints has [336, 672]", "image_size 384"]),
        (hub(image_grid_pinpoints=[[0, 384]]), ["image_grid_pinpoints has [0, 384]"]),
        (hub(image_grid_pinpoints=[]), ["image_grid_pinpoints is empty"]),
        (hub(model_type="llava_next"), ["model_type is 'llava_next'", "--vision DIR --language DIR"]),
        (hub(vision=dict(model_type="clip_vision_model")), ["vision_config: model_type is 'clip_vision_model'"]),
        (hub(vision=dict(hidden_act="gelu")), ["vision_config: hidden_act is 'gelu'; only 'gelu_pytorch_tanh'"]),
        (hub(vision=dict(num_channels=1)), ["vision_config: num_channels is 1"]),
        (hub(vision=dict(attention_dropout=0.1)), ["vision_config: attention_dropout is 0.1"]),
        (hub(vision=dict(image_size=[384, 768])), ["vision_config: image_size is [384, 768]"]),
        (hub(vision=dict(image_size=336)), ["image_grid_pinpoints has [384, 384]", "image_size 336"]),
        (hub(text=dict(model_type="llama")), ["text_config: model_type is 'llama'; only 'qwen2'"]),
        (hub(text=dict(hidden_act="gelu")), ["text_config: hidden_act is 'gelu'; only 'silu'"]),
        (hub(text=dict(use_sliding_window=True, max_window_layers=2)), ["text_config: use_sliding_window is True"]),
        (hub(text=dict(rope_scaling=dict(type="linear", factor=2.0))), ["text_config: rope_scaling is 'linear'"]),
        (hub(text=dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768))),
         ["text_config: rope_scaling is 'yarn'"]),
        (hub(text=dict(rope_theta=10000.5)), ["text_config: rope_theta is 10000.5"]),
        (hub(text=dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5))),
         ["text_config: partial_rotary_factor is 0.5"]),
        (hub(text=dict(attention_dropout=0.1)), ["text_config: attention_dropout is 0.1"]),
        (hub(text=dict(head_dim=128)), ["text_config: head_dim is 128; only 64.0"]),
        (hub(text=dict(num_hidden_layers="24")), ["cannot be read", "num_hidden_layers"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_megatron_cannot_do_is_refused_by_its_key(tmp_path, config, words):
    with pytest.raises(ValueError) as refusal:
        read_architecture(write_config(tmp_path, config))
    for word in [str(tmp_path / "config.json"), *words]:
        assert word in str(refusal.value)


@pytest.mark.parametrize("content", ["{", "[]", "ÿ".encode("latin-1")])
def test_a_config_that_is_broken_or_missing_is_named(tmp_path, content):
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json is missing: name a folder in Hugging Face format"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json cannot be read: "):
        read_architecture(tmp_path)
    with pytest.raises(ValueError, match="--model nobody/nothing: neither a folder with a config.json nor one of demo, "):
        find_architecture("nobody/nothing")


def test_a_folder_that_prepares_images_in_another_way_is_refused(tmp_path):
    """The class defaults of transformers are CLIP's mean and deviation."""
    write_config(tmp_path, hub())
    LlavaOnevisionImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path)
    read_architecture(tmp_path)
    LlavaOnevisionImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"preprocessor_config.json: image_mean is \[0.48145466, .* only \[0.5, 0.5, 0.5\]"):
        read_architecture(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    write_config(tmp_path, {"image_processor": saved | {"image_mean": [0.5] * 3}}, "processor_config.json")
    with pytest.raises(ValueError, match="/processor_config.json: image_std is "):
        read_architecture(tmp_path)
    write_config(tmp_path, hub(image_grid_pinpoints=PINPOINTS[:4]))
    write_config(tmp_path, {"image_grid_pinpoints": PINPOINTS}, "preprocessor_config.json")
    with pytest.raises(ValueError, match="preprocessor_config.json: image_grid_pinpoints is "):
        read_architecture(tmp_path)


def test_an_original_of_lmms_lab_is_sent_to_conversion(tmp_path):
    with pytest.raises(ValueError, match="config.json is lmms-lab's own; convert the folder"):
        read_architecture(write_config(tmp_path, {"model_type": "llava", "mm_vision_tower": "google/siglip-so400m-patch14-384"}))


# Two towers


@pytest.fixture
def qwen2(tmp_path) -> Path:
    """Qwen2-1.5B-Instruct's sizes, its embeddings tied."""
    sizes = dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_hidden_layers=28,
                 num_key_value_heads=2, max_window_layers=28, sliding_window=32768, use_sliding_window=False,
                 tie_word_embeddings=True, vocab_size=151936)  # fmt: skip
    return write_config(tmp_path / "qwen2", QWEN2 | sizes)


@pytest.mark.parametrize("num_layers, used", [(27, 26), (26, 26), (12, 12)])
@pytest.mark.parametrize("whole", [True, False], ids=["SiglipModel", "SiglipVisionModel"])
def test_siglip_and_a_tied_qwen2_are_the_papers_model_but_tied(tmp_path, qwen2, num_layers, used, whole):
    vision = {key: value for key, value in SIGLIP.items() if key not in ("model_type", "vision_use_head")}
    vision["num_hidden_layers"] = num_layers
    config = SiglipConfig(vision_config=vision) if whole else SiglipVisionConfig(**vision)
    config.save_pretrained(tmp_path / "siglip")
    actual, papers = read_towers(tmp_path / "siglip", qwen2), get_architecture("llava-ov-1.5b")
    assert actual.name == "siglip+qwen2" and actual.vision == dataclasses.replace(papers.vision, num_layers=used)
    assert not papers.decoder.tie_word_embeddings
    assert actual.decoder == dataclasses.replace(papers.decoder, tie_word_embeddings=True)
    assert unnamed(dataclasses.replace(actual, vision=papers.vision, decoder=papers.decoder)) == unnamed(papers)


def test_an_untied_qwen2_stays_untied(tmp_path, qwen2):
    SiglipVisionConfig(**SIGLIP | {"num_hidden_layers": 27}).save_pretrained(tmp_path / "siglip")
    write_config(qwen2, json.loads((qwen2 / "config.json").read_text()) | {"tie_word_embeddings": False})
    assert unnamed(read_towers(tmp_path / "siglip", qwen2)) == unnamed(get_architecture("llava-ov-1.5b"))


def test_other_towers_are_refused(tmp_path, qwen2):
    SiglipVisionConfig(**SIGLIP).save_pretrained(tmp_path / "siglip")
    clip = write_config(tmp_path / "clip", {"model_type": "clip"})
    for vision, language, words in [
        (clip, qwen2, f"{clip}/config.json: model_type is 'clip_vision_model'"),
        (qwen2, qwen2, f"{qwen2}/config.json: model_type is 'qwen2'"),
        (tmp_path / "siglip", clip, f"{clip}/config.json: model_type is 'clip'"),
        (tmp_path / "siglip", tmp_path / "none", f"{tmp_path}/none/config.json is missing"),
        (Path("google/siglip-so400m-patch14-384"), qwen2, "google/siglip-so400m-patch14-384/config.json is missing"),
    ]:
        with pytest.raises(ValueError, match=words):
            read_towers(vision, language)


# Writing


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
    inputs = processor(images=[model_parts.picture(*size)], text=[IMAGE_TOKEN], return_tensors="pt")
    return int((inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).sum())


@pytest.mark.parametrize("size", [(60, 80), (200, 20)])
def test_a_served_conversation_has_the_tokens_of_training(written, size):
    processor = AutoProcessor.from_pretrained(written)

    def served(**options):
        text = processor.apply_chat_template(MESSAGES, tokenize=False, **options)
        return processor(images=[model_parts.picture(*size)], text=[text], return_tensors="pt")["input_ids"][0].tolist()

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
        assert AutoTokenizer.from_pretrained(folder).apply_chat_template(MESSAGES[2:], tokenize=False).startswith(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n" if trained else "<|im_start|>user W"
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
    assert (vocabulary[IMAGE_TOKEN], vocabulary["<video>"]) == (config.image_token_index, config.video_token_index) == (4, 5)
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


# Copying


def test_no_weights_are_copied(written, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    copy_model_files(written, source)
    (source / "onnx").mkdir()
    weights = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "a.onnx_data",
               "model.safetensors.index.fp16.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "optimizer.pt",
               "training_args.bin", "model.00.pth", "model.gguf", "tf_model.h5", "model.msgpack", "x.ckpt"]  # fmt: skip
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
        }  # fmt: skip

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
