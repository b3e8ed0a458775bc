"""Every way in which checkpoints name the tensors is read as the same model."""

import pytest

from checkpoint_conversion.key_aliases import to_hub_name
from checkpoint_conversion.weight_map import expected_shapes, table
from rsa_megatron.models.hf_config import read_architecture
from tests.support import hf_checkpoints


@pytest.mark.parametrize("style", hf_checkpoints.STYLES)
@pytest.mark.parametrize("tied", [False, True])
def test_each_style_becomes_the_hubs_names(style, tied):
    state = hf_checkpoints.tensors(tied)
    names = {to_hub_name(name) for name in hf_checkpoints.renamed(state, style)}
    assert names == set(hf_checkpoints.renamed(state, "hub"))


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_has_the_names_and_shapes_of_transformers(tmp_path, tied):
    state = hf_checkpoints.write(tmp_path / "hf", tied=tied)
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert expected_shapes(table(read_architecture(tmp_path / "hf"))) == expected


@pytest.mark.parametrize(
    "name",
    [
        "text_model.head.weight",
        "logit_scale",
        "logit_bias",
        "vision_model.head.probe",
        "vision_tower.vision_model.head.mlp.fc1.bias",
        "head.layernorm.weight",
        "vision_model.embeddings.position_ids",
    ],
)
def test_what_is_no_part_of_the_model_is_dropped(name):
    assert to_hub_name(name) is None


def test_siglip_and_qwen2_names_are_read():
    layer = "encoder.layers.3.mlp.fc1.bias"
    assert to_hub_name("vision_model." + layer) == to_hub_name(layer) == "vision_tower.vision_model." + layer
    assert to_hub_name("model.layers.3.mlp.up_proj.weight") == "language_model.model.layers.3.mlp.up_proj.weight"
    assert to_hub_name("lm_head.weight") == "language_model.lm_head.weight"
    assert to_hub_name("model.norm.weight") == "language_model.model.norm.weight"


def test_an_unknown_name_is_left_as_it_is():
    assert to_hub_name("adapter.weight") == "adapter.weight"
