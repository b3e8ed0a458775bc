"""An exported folder's files fit the run's training, and can be put back. (Losses and generation: scripts/test_trained_export.py.)"""

import json
import shutil

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerFast

from checkpoint_conversion import forward_comparison
from rsa_megatron.anyres import ImageLayout, choose_grid
from rsa_megatron.data.conversation import encode
from rsa_megatron.models.hf_config import read_architecture
from rsa_megatron.models.hf_files import REPLACED_FILES, copy_model_files, write_model_files
from rsa_megatron.models.trained_files import Training, find_line_ends, fit_to_training, read_training, shows_one_tile
from tests.support import tiny_hf
from tests.support.hf_configs import MESSAGES, unnamed

MODEL = tiny_hf.architecture(tied=True)


@pytest.fixture
def folder(tokenizer, tmp_path):
    write_model_files(tmp_path / "export", MODEL, tokenizer)
    return tmp_path / "export"


def texts(folder) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


@pytest.mark.parametrize(
    "content, training",
    [
        (None, None),
        ("{", None),
        ({"model": "x"}, None),
        ({"stage": "1"}, Training("1", "plain", "square")),  # as runs have it from before
        ({"stage": "revision"}, Training("revision", "plain", "square")),
        ({"stage": "2"}, Training("2", "qwen_1_5", "anyres")),
        ({"stage": "1", "template": "qwen_1_5", "image_aspect_ratio": "anyres"}, Training("1", "qwen_1_5", "anyres")),
        ({"stage": "1.5", "image_grids": [[1, 2]]}, Training("1.5", "qwen_1_5", "anyres", [[1, 2]])),
    ],
)
def test_how_a_run_was_trained_is_read_from_its_run_json(tmp_path, content, training):
    if content is not None:
        (tmp_path / "run.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert read_training(tmp_path) == training


def test_what_llava_onevisions_own_files_fit_is_left_as_it_is(folder):
    before = texts(folder)
    assert fit_to_training(folder, MODEL, Training("2", "qwen_1_5", "anyres")) is None and texts(folder) == before


@pytest.mark.parametrize("template", ["plain", "qwen_1_5"])
@pytest.mark.parametrize("shown", ["square", "anyres"])
def test_each_half_of_a_training_is_fitted_for_itself_and_undone_by_a_copy(folder, tmp_path, template, shown):
    before = texts(folder)
    said = fit_to_training(folder, MODEL, Training("1", template, shown))
    assert shows_one_tile(folder) == (shown == "square")
    config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert config.model_type == ("llava" if shown == "square" else "llava_onevision")
    assert (processor.apply_chat_template(MESSAGES[:1]) == "<image>") == (template == "plain")
    if shown == "anyres" and template == "qwen_1_5":
        assert said is None
        return
    assert ("LlavaForConditionalGeneration" in said) == (shown == "square") and "README.md" not in before
    assert ("generation ends with the line" in said) == (template == "plain")
    assert unnamed(read_architecture(folder)) == unnamed(MODEL)
    copy_model_files(folder, tmp_path / "copy")
    assert texts(tmp_path / "copy") == before


@pytest.mark.parametrize("sizes", [[(60, 80)], [(58, 58)], [(20, 200)], [(60, 80), (58, 58)]])
def test_the_chat_template_gives_the_tokens_of_plain(folder, sizes):
    fit_to_training(folder, MODEL, Training("1", "plain", "square"))
    processor = AutoProcessor.from_pretrained(folder)
    answer, pictures = "A red boat.", [forward_comparison.make_picture(*size) for size in sizes]
    turns = [{"from": "human", "value": "<image>\n" * len(sizes) + "What is it?"}, {"from": "gpt", "value": answer}]
    tokens = encode(processor.tokenizer, turns, "plain").tokens
    expected = [token for token in tokens for _ in range(16 if token == 3 else 1)]
    parts = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": "What is it?"}]
    for content in (parts, "<image>\n" * len(sizes) + "What is it?"):
        for reply in (answer, [{"type": "text", "text": answer}]):
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
            inputs = processor(text=processor.apply_chat_template(messages), images=pictures)
            assert inputs["input_ids"][0] == expected


def test_a_readme_is_added_to(folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The model\n")
    fit_to_training(folder, MODEL, Training("1", "plain", "square"))
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\n---\n# The model\n\n## How this model was trained\n")
    assert "as stage 1 (template plain, images square)" in text


def test_the_grids_of_a_training_are_the_processors(folder):
    grids = [[1, 2], [2, 1]]
    said = fit_to_training(folder, MODEL, Training("1.5", "qwen_1_5", "anyres", grids))
    assert said.endswith("image_grid_pinpoints are the 2 grids of its training")
    pinpoints = ((58, 116), (116, 58))
    assert read_architecture(folder).grid_pinpoints == pinpoints != MODEL.grid_pinpoints
    processor = AutoProcessor.from_pretrained(folder)
    for size in tiny_hf.IMAGE_SIZES:
        inputs = processor(images=[forward_comparison.make_picture(*size)], text=["<image>"])
        layout = ImageLayout(*size, *choose_grid(*size, pinpoints, 58))
        assert inputs["input_ids"][0].count(3) == layout.num_tokens(4, MODEL.max_tiles)


def test_a_token_that_ends_a_word_and_the_line_is_an_end():
    """Of byte-level BPE, as Qwen2's; there ".\\n" is one token."""
    vocab = {token: number for number, token in enumerate([*"ab.", "Ċ", ".Ċ", "ĊĊ", "Ċa"])}
    merges = [(".", "Ċ"), ("Ċ", "Ċ"), ("Ċ", "a")]
    made = Tokenizer(BPE(vocab, merges))
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")
    ends = find_line_ends(tokenizer)
    assert tokenizer.convert_ids_to_tokens(ends) == ["Ċ", ".Ċ", "ĊĊ"]
    for caption in ("a", "ab.", "a\n"):
        assert tokenizer(caption + "\n")["input_ids"][-1] in ends


def test_a_folder_that_names_files_elsewhere_is_not_copied(folder, tmp_path):
    (folder / REPLACED_FILES).write_text('{"../x": "text"}')
    with pytest.raises(ValueError, match="replaced_files.json names '../x', which is not a file of its folder"):
        copy_model_files(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy")
    (folder / REPLACED_FILES).write_text('{"chat_template.jinja": 3}')
    with pytest.raises(ValueError, match="replaced_files.json names 'chat_template.jinja', which is not"):
        copy_model_files(folder, tmp_path / "copy")
