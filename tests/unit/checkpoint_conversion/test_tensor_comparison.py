"""verify's comparison of tensors sees what no sample's outputs may show, however the checkpoint was split."""

import pytest
import torch

from checkpoint_conversion import hf_weights
from checkpoint_conversion.verify import compare_folder
from tests.support import hf_checkpoints
from tests.support.hf_checkpoints import there, write_training_checkpoint

EMBEDDINGS = "language_model.model.embed_tokens.weight"
KEY = "language_model.model.layers.1.self_attn.k_proj.weight"


def change_folder(folder, name: str, change) -> None:
    state = hf_checkpoints.read(folder)
    state[name] = change(state[name].clone()).contiguous()
    hf_checkpoints.save(folder, state)


def flip_sign(tensor):
    tensor[69] *= -1
    return tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def state(folder):
    return hf_checkpoints.write(folder / "hf")


@pytest.mark.parametrize("num_ranks, stacked", [(1, True), (2, True), (2, False)])
def test_a_checkpoint_of_any_layout_is_the_same_bit_for_bit(folder, state, num_ranks, stacked):
    run = folder / f"{num_ranks} {stacked}"
    write_training_checkpoint(run, folder / "hf", state, num_ranks, stacked)
    found = compare_folder(folder / "hf", run)
    assert found.num_tensors == len(state) and not found.differences
    assert found.list_lines() == [
        "language_model.embedding.word_embeddings.weight: 5 rows of padding in the checkpoint, not compared",
        "language_model.output_layer.weight: 5 rows of padding in the checkpoint, not compared",
        f"tensors: {len(state)} of {len(state)} the same, bit for bit",
    ]


@pytest.mark.parametrize(
    "name, change, says",
    [
        (
            KEY,
            lambda k: k.roll(1, 0),
            f"{KEY} (language_model.decoder.layers.self_attention.linear_qkv.weight): 16 of 16 rows",
        ),
        (
            EMBEDDINGS,
            lambda rows: rows[[*range(68), 69, 68]],
            f"{EMBEDDINGS} (language_model.embedding.word_embeddings.weight): 2 of",
        ),
        (EMBEDDINGS, flip_sign, "1 of 70 rows, 48 of 3360 values, by up to "),
        ("image_newline", lambda v: v.nextafter(torch.tensor(9.0)), "48 of 48 rows, 48 of 48 values, by up to "),
        ("vision_tower.vision_model.post_layernorm.bias", lambda v: v * torch.nan, "by up to nan"),
    ],
    ids=["rolled", "swapped", "sign", "last bit", "nan"],
)
def test_a_tensor_that_differs_is_named(tmp_path, name, change, says):
    hf_checkpoints.write(tmp_path / "hf")
    there(tmp_path / "hf", tmp_path / "megatron")
    assert not compare_folder(tmp_path / "hf", tmp_path / "megatron").differences
    change_folder(tmp_path / "hf", name, change)
    found = compare_folder(tmp_path / "hf", tmp_path / "megatron")
    assert [difference.name for difference in found.differences] == [name]
    assert found.describe_differences().startswith(f"1 of {found.num_tensors} tensors differ: {name} (")
    assert says in found.describe_differences()


def test_the_first_of_many_are_named_and_all_counted(tmp_path):
    hf_checkpoints.write(tmp_path / "hf")
    there(tmp_path / "hf", tmp_path / "megatron")
    changed = {name: tensor + 1 for name, tensor in hf_checkpoints.read(tmp_path / "hf").items()}
    hf_checkpoints.save(tmp_path / "hf", changed)
    found = compare_folder(tmp_path / "hf", tmp_path / "megatron")
    number = len(changed)
    assert found.describe_differences().startswith(f"{number} of {number} tensors differ: vision_tower.")
    assert found.describe_differences().endswith(f"; and {number - 3} more")


def test_of_two_dtypes_one_may_be_the_other_rounded(tmp_path):
    """Weights in float32, a checkpoint in bfloat16, and the other way round."""
    state = hf_checkpoints.write(tmp_path / "hf")
    hf_checkpoints.write(tmp_path / "rounded", dtype=torch.bfloat16)
    for source, other in (("hf", "rounded"), ("rounded", "hf")):
        there(tmp_path / source, tmp_path / f"{source}, converted")
        found = compare_folder(tmp_path / other, tmp_path / f"{source}, converted")
        dtypes = ("bfloat16", "float32") if other == "rounded" else ("float32", "bfloat16")
        assert not found.differences and found.list_lines() == [
            f"{len(state)} tensors are {dtypes[0]} in the folder and {dtypes[1]} in the checkpoint: compared after rounding one to the other",
            f"tensors: {len(state)} of {len(state)} the same",
        ]
        change_folder(tmp_path / other, "image_newline", lambda v: v * 1.01)
        found = compare_folder(tmp_path / other, tmp_path / f"{source}, converted")
        assert [difference.name for difference in found.differences] == ["image_newline"]
        change_folder(tmp_path / other, "image_newline", lambda v: state["image_newline"].to(v.dtype))


def test_one_tensor_is_in_memory_at_a_time(folder, state, monkeypatch):
    """Each is read once, and none is kept: a tensor of the folder is gone when the next is read."""
    import weakref

    read, alive = hf_weights.StoredTensor.read, []

    def keep_count(tensor, rows=slice(None)):
        assert sum(other() is not None for other in alive) <= 1
        value = read(tensor, rows)
        alive.append(weakref.ref(value))
        return value

    write_training_checkpoint(folder / "once", folder / "hf", state, 2, True)
    monkeypatch.setattr(hf_weights.StoredTensor, "read", keep_count)
    compare_folder(folder / "hf", folder / "once")
    assert len(alive) == len(state)
