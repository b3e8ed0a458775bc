"""Tiny random Hugging Face models of odd sizes, and their tensors as each style of checkpoint names them."""

import functools
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from checkpoint_conversion.__main__ import main
from checkpoint_conversion.weight_map import join, table
from rsa_megatron.data.conversation import IMAGE_TOKEN
from rsa_megatron.models.hf_config import read_architecture
from rsa_megatron.models.hf_files import VIDEO_TOKEN
from tests.support import checkpoint_chunks

HIDDEN, VOCAB_SIZE = 48, 70
TOWER = dict(
    hidden_size=20, intermediate_size=27, num_hidden_layers=3, num_attention_heads=4, image_size=58, patch_size=14
)
# 6 heads of 8 in 2 groups
DECODER = dict(
    hidden_size=HIDDEN, intermediate_size=37, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2
)

# From the module tree of transformers 5.23 to each style: written by hand, apart from what is tested.
STYLES = {
    "hub": [
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.", ""),
        (r"^lm_head", "language_model.lm_head"),
    ],
    "4.52 to 5.5": [(r"^model\.vision_tower\.", "model.vision_tower.vision_model.")],
    "5.23 module tree": [],
    "5.23 from scratch": [
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.", ""),
        (r"^lm_head", "language_model.lm_head"),
    ],
    "lmms-lab": [
        (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
        (r"^model\.language_model\.", "model."),
        (r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
        (r"^model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    ],
}


@functools.cache
def tensors(tied: bool) -> dict[str, Tensor]:
    """A model's tensors by their names in the module tree, float32, all different."""
    from transformers import LlavaOnevisionForConditionalGeneration

    torch.manual_seed(1)
    model = LlavaOnevisionForConditionalGeneration(_config(tied))
    state = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if not (tied and name == "lm_head.weight")}


def _config(tied: bool):
    from transformers import LlavaOnevisionConfig

    return LlavaOnevisionConfig(
        vision_config=dict(model_type="siglip_vision_model", vision_use_head=False, **TOWER),
        text_config=dict(model_type="qwen2", vocab_size=VOCAB_SIZE, tie_word_embeddings=tied, **DECODER),
        tie_word_embeddings=tied,
        image_grid_pinpoints=[[58, 116], [116, 58]],
        image_token_index=66,
        video_token_index=67,
    )


def renamed(state: dict[str, Tensor], style: str) -> dict[str, Tensor]:
    found = {}
    for name, tensor in state.items():
        for pattern, replacement in STYLES[style]:
            new = re.sub(pattern, replacement, name)
            if new != name:
                name = new
                break
        found[name] = tensor
    return found


def write(folder: Path, *, tied=False, style="hub", dtype=torch.float32, num_files=1, change=None) -> dict[str, Tensor]:
    """A Hugging Face folder; what it holds, by name. change: a function that edits the tensors before."""
    folder.mkdir()
    _config(tied).save_pretrained(folder)
    _write_tokenizer(folder)
    state = {name: tensor.to(dtype) for name, tensor in renamed(tensors(tied), style).items()}
    if change:
        change(state)
    save(folder, state, num_files)
    return state


def _write_tokenizer(folder: Path) -> None:
    """As many words as the vocabulary has rows, and the image and the video token where the config has them."""
    words = [f"w{number}" for number in range(VOCAB_SIZE)]
    words[66:68] = IMAGE_TOKEN, VIDEO_TOKEN
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
    tokenizer.add_special_tokens([IMAGE_TOKEN, VIDEO_TOKEN])
    tokenizer.save(str(folder / "tokenizer.json"))


def save(folder: Path, state: dict[str, Tensor], num_files: int = 1) -> None:
    if num_files == 1:
        return save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    names = sorted(state)
    weight_map = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        part = names[number::num_files]
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, by name, as the library reads them."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, and tensors equal to the bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def there(hf, out, *flags):
    main(["hf-to-megatron", "--hf", str(hf), "--out", str(out), *flags])


def back(checkpoint, out, *flags):
    main(["megatron-to-hf", "--checkpoint", str(checkpoint), "--out", str(out), *flags])


def write_training_checkpoint(folder, hf, state, num_ranks, stacked, padding=5, without=()):
    stored = {"optimizer.state.exp_avg.language_model.lm_head": ((2,), [((0,), torch.zeros(2))])}
    for row in table(read_architecture(hf)):
        layers = [join([state[name] for name in row.part_names(layer)], row.groups) for layer in row.layers]
        dim = 1 if row.key.endswith(("proj.weight", "fc2.weight")) else 0
        if row.is_vocabulary:
            layers = [torch.cat([layers[0], torch.full((padding, layers[0].shape[1]), 9.0)])]
        if not row.num_layers:
            stored[row.key] = (layers[0].shape, checkpoint_chunks.cut(layers[0], num_ranks, dim))
        elif stacked:
            cut = [
                chunk
                for layer, tensor in enumerate(layers)
                for chunk in checkpoint_chunks.cut(tensor, num_ranks, dim, (layer,))
            ]
            stored[row.key] = (row.stored_shape, cut)
        else:
            for layer, tensor in enumerate(layers):
                key = row.key.replace(".layers.", f".layers.{layer}.")
                stored[key] = (tensor.shape, checkpoint_chunks.cut(tensor, num_ranks, dim))
    checkpoint_chunks.write(folder, {key: value for key, value in stored.items() if key not in without})
