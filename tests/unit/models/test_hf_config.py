"""Configs that people bring are read right or refused by their key; what is written, transformers loads as it was meant."""

import dataclasses
import json
from pathlib import Path

import pytest
import transformers
from transformers import (
    AutoConfig,
    LlavaOnevisionImageProcessor,
    SiglipConfig,
    SiglipVisionConfig,
)

from rsa_megatron.models.architectures import ARCHITECTURES, get_architecture
from rsa_megatron.models.hf_config import find_architecture, read_architecture, read_towers
from rsa_megatron.models.hf_files import make_image_processor_config, write_model_files
from tests.support.hf_configs import PINPOINTS, QWEN2, SIGLIP, TEXT, hub, unnamed, write_config

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
        (hub(vision_aspect_ratio="anyres"), ["vision_aspect_ratio is 'anyres'; only anyres_max_N"]),
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
        (
            hub(text=dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768))),
            ["text_config: rope_scaling is 'yarn'"],
        ),
        (hub(text=dict(rope_theta=10000.5)), ["text_config: rope_theta is 10000.5"]),
        (
            hub(text=dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5))),
            ["text_config: partial_rotary_factor is 0.5"],
        ),
        (hub(text=dict(attention_dropout=0.1)), ["text_config: attention_dropout is 0.1"]),
        (hub(text=dict(head_dim=128)), ["text_config: head_dim is 128; only 64"]),
        (hub(text=dict(num_attention_heads=13)), ["text_config: num_attention_heads is 13, which does not divide 896"]),
        (hub(text=dict(num_key_value_heads=3)), ["text_config: num_key_value_heads is 3, which does not divide 14"]),
        (hub(text=dict(layer_types=["linear_attention"] * 24)), ["text_config: layer_types is 'linear_attention'"]),
        (hub(text=dict(rope_scaling=dict(rope_type="default", mrope_section=[1, 2]))), ["mrope_section is [1, 2]"]),
        (
            hub(text=dict(rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=1e6)))),
            ["text_config: rope_parameters is {'full_attention'"],
        ),
        (hub(text=dict(rope_theta=None)), ["text_config: rope_theta is None"]),
        (hub(text=dict(is_causal=False)), ["text_config: is_causal is False; only True"]),
        (hub(text=dict(final_logit_softcapping=30.0)), ["text_config: final_logit_softcapping is 30.0"]),
        (hub(text=dict(qk_norm=True)), ["text_config: qk_norm is True; only False"]),
        (hub(text=dict(num_experts=60)), ["text_config: num_experts is 60"]),
        (hub(text=dict(logits_scaling=8.0)), ["text_config: logits_scaling is 8.0; only 1"]),
        (hub(text=dict(quantization_config=dict(bits=4))), ["text_config: quantization_config is {'bits': 4}"]),
        (hub(quantization_config=dict(bits=4)), ["config.json: quantization_config is {'bits': 4}"]),
        (hub(vision=dict(model_type="siglip9")), ["vision_config: model_type is 'siglip9'"]),
        (hub(text=dict(num_hidden_layers="24")), ["cannot be read", "num_hidden_layers"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_megatron_cannot_do_is_refused_by_its_key(tmp_path, config, words):
    with pytest.raises(ValueError) as refusal:
        read_architecture(write_config(tmp_path, config))
    for word in [str(tmp_path / "config.json"), *words]:
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


# Decoders that others put behind a tower, older and newer ones, as their classes save them; and one of a later transformers.
OTHERS = (
    "LlamaConfig MistralConfig MixtralConfig GemmaConfig Gemma2Config Gemma3TextConfig PhiConfig Phi3Config Qwen2MoeConfig Qwen3Config "
    "Qwen3MoeConfig Qwen3NextConfig GptOssConfig Olmo2Config GPT2Config OPTConfig FalconConfig DeepseekV3Config GraniteConfig"
).split()


@pytest.mark.parametrize("name", [*OTHERS, "Qwen9Config"])
def test_other_decoders_are_refused_in_one_line(tmp_path, name):
    """Behind a tower in one config, and as a folder of their own."""
    kind = getattr(transformers, name).model_type if name in OTHERS else "qwen9"
    config = getattr(transformers, name)().to_dict() if name in OTHERS else {"model_type": kind, "hidden_size": 64}
    config = json.loads(json.dumps(config, default=str))
    SiglipVisionConfig(**SIGLIP).save_pretrained(tmp_path / "siglip")
    alone = write_config(tmp_path / "alone", config)
    whole = write_config(tmp_path / "whole", hub() | {"text_config": config})
    for read, arguments, where in (
        (read_towers, (tmp_path / "siglip", alone), f"{alone}/config.json"),
        (read_architecture, (whole,), f"{whole}/config.json, text_config"),
    ):
        with pytest.raises(ValueError, match=f"^{where}: model_type is '{kind}'; only 'qwen2' is supported$"):
            read(*arguments)


def test_keys_of_other_decoders_that_change_nothing_are_taken(tmp_path):
    """As a config has them that lists every key."""
    keys = dict(is_causal=True, num_experts=0, qk_norm=False, logits_scaling=1.0, final_logit_softcapping=None)
    keys |= dict(quantization_config=None, hidden_act="swish", num_key_value_heads=2)
    expected = read_architecture(write_config(tmp_path / "hub", hub()))
    assert unnamed(read_architecture(write_config(tmp_path / "more", hub(text=keys)))) == unnamed(expected)


@pytest.mark.parametrize("content", ["{", "[]", "ÿ".encode("latin-1")])
def test_a_config_that_is_broken_or_missing_is_named(tmp_path, content):
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json is missing: name a folder in Hugging Face format"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json cannot be read: "):
        read_architecture(tmp_path)
    with pytest.raises(
        ValueError, match="--model nobody/nothing: neither a folder with a config.json nor one of demo, "
    ):
        find_architecture("nobody/nothing")


def test_the_grids_keep_the_order_that_the_folder_has(tmp_path):
    """Of grids as good the first is taken: a model whose list has the wide one first is served with it first."""
    for pinpoints in ([[384, 768], [768, 384]], [[768, 384], [384, 768]]):
        architecture = read_architecture(write_config(tmp_path, hub(image_grid_pinpoints=pinpoints)))
        assert [list(grid) for grid in architecture.grid_pinpoints] == pinpoints
        assert make_image_processor_config(architecture)["image_grid_pinpoints"] == pinpoints


def test_a_folder_that_prepares_images_in_another_way_is_refused(tmp_path):
    """The class defaults of transformers are CLIP's mean and deviation."""
    write_config(tmp_path, hub())
    LlavaOnevisionImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path)
    read_architecture(tmp_path)
    LlavaOnevisionImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"preprocessor_config.json: image_mean is \[0.48145466, .* only \[0.5, 0.5, 0.5\]"
    ):
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
    with pytest.raises(ValueError, match="config.json is in lmms-lab's format; convert the folder"):
        read_architecture(
            write_config(tmp_path, {"model_type": "llava", "mm_vision_tower": "google/siglip-so400m-patch14-384"})
        )


# Two towers


@pytest.fixture
def qwen2(tmp_path) -> Path:
    """Qwen2-1.5B-Instruct's sizes, its embeddings tied."""
    sizes = dict(
        hidden_size=1536,
        intermediate_size=8960,
        num_attention_heads=12,
        num_hidden_layers=28,
        num_key_value_heads=2,
        max_window_layers=28,
        sliding_window=32768,
        use_sliding_window=False,
        tie_word_embeddings=True,
        vocab_size=151936,
    )
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
        (clip, qwen2, f"{clip}/config.json: model_type is 'clip'"),
        (qwen2, qwen2, f"{qwen2}/config.json: model_type is 'qwen2'"),
        (tmp_path / "siglip", clip, f"{clip}/config.json: model_type is 'clip'"),
        (tmp_path / "siglip", tmp_path / "none", f"{tmp_path}/none/config.json is missing"),
        (Path("google/siglip-so400m-patch14-384"), qwen2, "google/siglip-so400m-patch14-384/config.json is missing"),
    ]:
        with pytest.raises(ValueError, match=words):
            read_towers(vision, language)


# Writing


# Copying
