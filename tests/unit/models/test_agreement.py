"""Two files that say one thing are compared: each difference is one line with both values and both files."""

import dataclasses
import json

import pytest
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from checkpoint_conversion import __main__ as conversion
from rsa_megatron.models.agreement import check_checkpoint_files, check_files, compare_chat_template
from rsa_megatron.models.hf_files import write_model_files
from rsa_megatron.models.trained_files import Training, fit_to_training
from tests.support import hf_checkpoints, tiny_hf

MODEL = tiny_hf.architecture(tied=True)
OTHER = "{{ messages[0]['content'] }}"


@pytest.fixture
def folder(tokenizer, tmp_path):
    write_model_files(tmp_path / "model", MODEL, tokenizer)
    return tmp_path / "model"


def change(folder, name: str, **values) -> None:
    """Set keys of a JSON file; text_config__key is one within text_config."""
    content = json.loads((folder / name).read_text())
    for key, value in values.items():
        *outer, key = key.split("__")
        for part in outer:
            content.setdefault(part, {})
        (content[outer[0]] if outer else content)[key] = value
    (folder / name).write_text(json.dumps(content))


def complaints(folder) -> tuple[list[str], str]:
    """The warnings and the error about a folder."""
    warnings = []
    try:
        check_files(folder, say=warnings.append)
    except ValueError as error:
        return warnings, str(error)
    return warnings, ""


def test_what_we_write_agrees_in_every_form(folder, tmp_path):
    assert complaints(folder) == ([], "")
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert complaints(tmp_path / "saved") == ([], "")
    for number, training in enumerate(
        [Training("1", "plain", "square"), Training("1.5", "qwen_1_5", "anyres", [[1, 2]])]
    ):
        write_model_files(tmp_path / str(number), MODEL, AutoTokenizer.from_pretrained(folder))
        fit_to_training(tmp_path / str(number), MODEL, training)
        assert complaints(tmp_path / str(number)) == ([], "")


CONFIG, PROCESSOR, PIXELS = "config.json", "processor_config.json", "preprocessor_config.json"


@pytest.mark.parametrize(
    "file, values, says",
    [
        (CONFIG, dict(image_token_index=5), "the id of <image> is 5 in {}/config.json and 3 in {}/tokenizer.json"),
        (CONFIG, dict(image_token_index=None, image_token_id=5), "the id of <image> is 5 in {}/config.json and 3 in"),
        (CONFIG, dict(video_token_index=9), "the id of <video> is 9 in {}/config.json and 4 in {}/tokenizer.json"),
        (
            CONFIG,
            dict(text_config__vocab_size=1023),
            "the size of the vocabulary is 1023 in {}/config.json and 1024 in {}/tok",
        ),
        (
            CONFIG,
            dict(text_config__rope_parameters=dict(rope_type="default", rope_theta=1e4)),
            "text_config's rope_theta, and that of its rope_parameters, is 1000000.0 in {}/config.json and 10000.0 in {}/config.json",
        ),
        (
            PROCESSOR,
            dict(num_image_tokens=729),
            "num_image_tokens is 729 in {}/processor_config.json and 16 in {}/config.json",
        ),
        (PROCESSOR, dict(patch_size=16), "patch_size is 16 in {}/processor_config.json and 14 in {}/config.json"),
        (
            PROCESSOR,
            dict(vision_aspect_ratio="anyres_max_9"),
            "vision_aspect_ratio is anyres_max_9 in {}/processor_config.json and anyres_max_4",
        ),
        (
            PROCESSOR,
            dict(vision_feature_select_strategy="default"),
            "vision_feature_select_strategy is default in {}/proc",
        ),
        (
            PIXELS,
            dict(size=dict(height=60, width=60)),
            "{}/preprocessor_config.json: size is {{'height': 60, 'width': 60}}, and image_size in {}/config.json means {{'height': 58",
        ),
        (
            PIXELS,
            dict(image_grid_pinpoints=[[58, 58]]),
            "{}/preprocessor_config.json: image_grid_pinpoints is [[58, 58]], and image_grid_pinpoints in {}/config.json",
        ),
        (PIXELS, dict(do_resize=False), "{}/preprocessor_config.json: do_resize is False; only True is supported"),
        (
            PIXELS,
            dict(do_center_crop=True, crop_size=dict(height=30, width=30)),
            "{}/preprocessor_config.json: do_center_crop is True",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_must_agree_is_an_error(folder, file, values, says):
    if values.get("image_token_index", 0) is None:
        content = json.loads((folder / file).read_text())
        del content["image_token_index"], values["image_token_index"]
        (folder / file).write_text(json.dumps(content))
    change(folder, file, **values)
    warnings, error = complaints(folder)
    assert error.startswith(says.format(folder, folder)) and not warnings
    assert "\n" not in error and ("correct one of the two files" in error or "is supported" in error or "only" in error)


def test_a_key_that_is_missing_has_the_default_of_its_class(folder):
    """The processor's is anyres_max_9; the model counts 4 tiles."""
    content = json.loads((folder / PROCESSOR).read_text())
    del content["vision_aspect_ratio"]
    (folder / PROCESSOR).write_text(json.dumps(content))
    assert complaints(folder)[1].startswith(
        f"vision_aspect_ratio is anyres_max_9 in {folder}/processor_config.json and any"
    )


@pytest.mark.parametrize(
    "file, values, says",
    [
        (
            "generation_config.json",
            dict(eos_token_id=[0]),
            "eos_token_id is [0] in {}/generation_config.json and 2 in {}/tokenizer_config.json",
        ),
        ("generation_config.json", dict(pad_token_id=7), "pad_token_id is 7 in {}/generation_config.json and 0 in"),
        (CONFIG, dict(text_config__eos_token_id=9), "eos_token_id is 9 in {}/config.json and 2 in"),
        (CONFIG, dict(dtype="float32"), "torch_dtype and dtype is bfloat16 in {}/config.json and float32 in"),
        (
            "chat_template.json",
            dict(chat_template=OTHER),
            f"the chat template is {OTHER.replace('{', '{{').replace('}', '}}')} in {{}}/chat_template.json and ",
        ),
        (PROCESSOR, dict(chat_template=OTHER), "the chat template is "),
        ("video_preprocessor_config.json", dict(size=dict(height=9, width=9)), "the size of a video's frames is "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_only_serving_reads_is_a_warning(folder, file, values, says):
    change(folder, file, **values)
    warnings, error = complaints(folder)
    assert error == "" and len(warnings) == 1 and "\n" not in warnings[0]
    assert warnings[0].startswith("WARNING: " + says.format(folder, folder)) and warnings[0].endswith(
        ": make them agree"
    )


def test_several_are_named_in_one_line(folder):
    change(folder, CONFIG, image_token_index=5, video_token_index=9)
    error = complaints(folder)[1]
    assert "the id of <image> is 5" in error and "; the id of <video> is 9" in error


def test_a_tokenizer_that_is_broken_is_an_error_and_none_is_no_matter(folder):
    (folder / "tokenizer.json").write_text("{")
    assert complaints(folder)[1].startswith(f"{folder}: its tokenizer cannot be read: ")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert complaints(folder) == ([], "")


def test_each_command_of_conversion_compares(tmp_path, capsys):
    hf_checkpoints.write(tmp_path / "hf")
    hf_checkpoints.there(tmp_path / "hf", tmp_path / "megatron")
    for place in (tmp_path / "hf", tmp_path / "megatron" / "hf"):
        change(place, CONFIG, image_token_index=5)
    checkpoint = ["--checkpoint", str(tmp_path / "megatron")]
    for command, place in (
        (["hf-to-megatron", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "out")], tmp_path / "hf"),
        (["megatron-to-hf", *checkpoint, "--out", str(tmp_path / "out")], tmp_path / "megatron" / "hf"),
        (["verify", "--hf", str(tmp_path / "hf"), *checkpoint], tmp_path / "hf"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            conversion.main(command)
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert end.value.code == 2 and not (tmp_path / "out").exists()
        assert f"the id of <image> is 5 in {place}/config.json and 66 in {place}/tokenizer.json" in error


def test_a_checkpoint_of_another_model_is_an_error(folder, tokenizer):
    def complaint(model=MODEL, tokenizer=tokenizer, **decoder):
        model = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, **decoder))
        try:
            check_checkpoint_files(folder, model, tokenizer, "mine", "TOKENIZER")
        except ValueError as error:
            return str(error)
        return ""

    assert complaint() == complaint(max_position_embeddings=9999) == ""
    file = f"{folder}/config.json"
    assert complaint(rotary_base=10_000).startswith(
        f"rotary_base is 1000000 in {file} and 10000 by --model mine: name the"
    )
    assert complaint(rmsnorm_epsilon=1e-5).startswith(f"rmsnorm_epsilon is 1e-06 in {file} and 1e-05 by --model mine")
    fewer = dataclasses.replace(MODEL, max_tiles=9)
    assert complaint(fewer).startswith(f"max_tiles is 4 in {file} and 9 by --model mine")
    # A tokenizer with a token more is taken, and one in which ids are exchanged is not.
    more = AutoTokenizer.from_pretrained(folder)
    more.add_tokens(["another"])
    content = json.loads((folder / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    (first, a), (second, b) = list(words.items())[300:302]
    words |= {first: b, second: a}
    exchanged = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    assert complaint(tokenizer=more) == ""
    assert complaint(tokenizer=exchanged).startswith(
        f"the id of {first!r} is {a} in the tokenizer {folder} and {b} in TOKENIZER, and"
    )
    change(folder, CONFIG, image_token_index=5)
    assert complaint().startswith(f"the id of <image> is 5 in {file} and 3 in the tokenizer TOKENIZER: name the")


def test_a_chat_template_that_is_not_the_trained_one_is_told(folder, tokenizer):
    assert compare_chat_template(folder, tokenizer) is None
    change(folder, "chat_template.json", chat_template=OTHER)
    said = compare_chat_template(folder, tokenizer)
    assert f"by the chat template of {folder}/chat_template.json and '<|im_start|>system" in said and "\n" not in said
    change(folder, "chat_template.json", chat_template="{{")
    assert "error: unexpected" in compare_chat_template(folder, tokenizer)
