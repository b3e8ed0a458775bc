"""A model from a SigLIP and a Qwen2 that have never met."""

import json
import math

import pytest
import torch

from checkpoint_conversion.__main__ import main
from tests.support import hf_checkpoints
from tests.support.hf_checkpoints import back

VISION, HIDDEN = 16, 24


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Folders of SigLIPs of 27 and 26 layers and of Qwen2s, tied and not, as transformers saves them."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipConfig, SiglipModel
    from transformers.models.qwen2 import Qwen2Tokenizer

    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(2)
    sizes = dict(hidden_size=VISION, intermediate_size=10, num_attention_heads=2)
    for num_layers in (26, 27):
        vision = dict(num_hidden_layers=num_layers, image_size=29, patch_size=14, **sizes)
        text = dict(num_hidden_layers=1, vocab_size=12, **sizes)
        SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).save_pretrained(
            folder / f"siglip-{num_layers}"
        )
    for tied in (True, False):
        config = Qwen2Config(
            hidden_size=HIDDEN,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            vocab_size=100,
            tie_word_embeddings=tied,
        )
        out = folder / f"qwen2-{'tied' if tied else 'untied'}"
        Qwen2ForCausalLM(config).bfloat16().save_pretrained(out)
        vocab = {
            token: number for number, token in enumerate(["a", "b", "<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        }
        Qwen2Tokenizer(vocab=vocab, merges=[]).save_pretrained(out)
    return folder


def convert(towers, tmp_path, siglip, qwen2, *flags, name="megatron"):
    """What comes of it, in Hugging Face's names."""
    out = tmp_path / name
    main(
        [
            "hf-to-megatron",
            "--vision",
            str(towers / siglip),
            "--language",
            str(towers / qwen2),
            "--out",
            str(out),
            *flags,
        ]
    )
    back(out, tmp_path / f"{name}-hf")
    return hf_checkpoints.read(tmp_path / f"{name}-hf")


@pytest.mark.parametrize("num_layers", [26, 27])
def test_a_tower_of_27_layers_loses_the_last_once(towers, tmp_path, num_layers):
    state = convert(towers, tmp_path, f"siglip-{num_layers}", "qwen2-tied")
    source = hf_checkpoints.read(towers / f"siglip-{num_layers}")
    prefix = "vision_tower.vision_model."
    expected = {
        "vision_tower." + name: tensor
        for name, tensor in source.items()
        if name.startswith("vision_model.") and ".head." not in name and ".layers.26." not in name
    }
    hf_checkpoints.assert_equal({name: tensor for name, tensor in state.items() if name.startswith(prefix)}, expected)
    assert any(".layers.25." in name for name in state) and not any(".layers.26." in name for name in state)


@pytest.mark.parametrize("tied", [True, False])
def test_new_vocabulary_rows_are_the_mean_of_the_others(towers, tmp_path, tied):
    qwen2 = f"qwen2-{'tied' if tied else 'untied'}"
    state, source = convert(towers, tmp_path, "siglip-26", qwen2), hf_checkpoints.read(towers / qwen2)
    names = ["model.embed_tokens.weight"] if tied else ["model.embed_tokens.weight", "lm_head.weight"]
    assert ("language_model.lm_head.weight" in state) == (not tied)
    for name in names:
        actual, own = state["language_model." + name], source[name]
        assert actual.shape == (128, HIDDEN) and torch.equal(actual[:100], own)
        assert torch.equal(actual[100:], own.double().mean(0).bfloat16().expand(28, -1))


def test_a_tied_language_model_can_be_untied(towers, tmp_path):
    state = convert(towers, tmp_path, "siglip-26", "qwen2-tied", "--untie-embeddings-and-output-weights")
    assert torch.equal(state["language_model.lm_head.weight"], state["language_model.model.embed_tokens.weight"])
    config = json.loads((tmp_path / "megatron-hf" / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False


def test_projector_and_newline_are_drawn_by_seed(towers, tmp_path):
    first = convert(towers, tmp_path, "siglip-26", "qwen2-tied")
    again = convert(towers, tmp_path, "siglip-26", "qwen2-tied", "--seed", "1234", name="again")
    other = convert(towers, tmp_path, "siglip-26", "qwen2-tied", "--seed", "5", name="other")
    hf_checkpoints.assert_equal(again, first)
    for name, deviation in (
        ("multi_modal_projector.linear_1.weight", 0.02),
        ("multi_modal_projector.linear_2.weight", 0.02),
        ("image_newline", 1 / math.sqrt(HIDDEN)),
    ):
        assert first[name].dtype == torch.bfloat16 and not torch.equal(other[name], first[name])
        # of n values the deviation is off by a part of 1 / sqrt(2 n): three of these
        allowed = 3 / math.sqrt(2 * first[name].numel())
        assert abs(first[name].float().std() / deviation - 1) < allowed
    assert (
        not first["multi_modal_projector.linear_1.bias"].any()
        and not first["multi_modal_projector.linear_2.bias"].any()
    )


def test_the_new_model_loads_in_transformers(towers, tmp_path):
    from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

    convert(towers, tmp_path, "siglip-27", "qwen2-untied")
    loaded = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "megatron-hf", output_loading_info=True)
    assert not any(loaded[1][what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {"<image>", "<video>"} <= AutoTokenizer.from_pretrained(tmp_path / "megatron-hf").get_vocab().keys()


@pytest.mark.parametrize(
    "flags",
    [
        ["--vision", "siglip-26"],
        ["--hf", "x", "--language", "qwen2-tied"],
        [],
        ["--hf", "x", "--seed", "1"],
        ["--vision", "qwen2-tied", "--language", "qwen2-tied"],
    ],
)
def test_sources_that_make_no_model_are_refused(towers, tmp_path, flags, capsys):
    flags = [str(towers / flag) if (towers / flag).is_dir() else flag for flag in flags]
    with pytest.raises(SystemExit):
        main(["hf-to-megatron", *flags, "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "out").exists()
