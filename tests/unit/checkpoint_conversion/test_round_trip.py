"""Hugging Face to Megatron and back gives the same names and, to the bit, the same tensors."""

import json

import pytest
import torch

from checkpoint_conversion import torch_dist_save
from checkpoint_conversion.hf_weights import split_rows
from tests.support import hf_checkpoints
from tests.support.hf_checkpoints import back, there, write_training_checkpoint


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_files, shard_size", [(1, "2GB"), (3, "40KB")])
def test_round_trip_is_bit_identical(tmp_path, tied, dtype, num_files, shard_size):
    expected = hf_checkpoints.write(tmp_path / "hf", tied=tied, dtype=dtype, num_files=num_files)
    there(tmp_path / "hf", tmp_path / "megatron")
    back(tmp_path / "megatron", tmp_path / "back", "--max-shard-size", shard_size)
    hf_checkpoints.assert_equal(hf_checkpoints.read(tmp_path / "back"), expected)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (tmp_path / "hf" / "tokenizer.json").read_bytes()
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert (len(files) > 2 and all(file.stat().st_size < 60_000 for file in files)) == (shard_size == "40KB")


@pytest.mark.parametrize("style", hf_checkpoints.STYLES)
def test_every_style_comes_back_in_the_hubs(tmp_path, style):
    hf_checkpoints.write(tmp_path / "hf", style=style)
    there(tmp_path / "hf", tmp_path / "megatron")
    back(tmp_path / "megatron", tmp_path / "back")
    hf_checkpoints.assert_equal(
        hf_checkpoints.read(tmp_path / "back"), hf_checkpoints.renamed(hf_checkpoints.tensors(False), "hub")
    )


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_the_export_whole(tmp_path, tied):
    from transformers import LlavaOnevisionForConditionalGeneration

    hf_checkpoints.write(tmp_path / "hf", tied=tied, style="4.52 to 5.5")
    there(tmp_path / "hf", tmp_path / "megatron")
    back(tmp_path / "megatron", tmp_path / "back", "--max-shard-size", "40KB")
    model, info = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = {name: tensor for name, tensor in model.state_dict().items() if name in hf_checkpoints.tensors(tied)}
    hf_checkpoints.assert_equal(state, hf_checkpoints.tensors(tied))


def test_tower_and_decoder_keep_dtypes_of_their_own(tmp_path):
    def change(state):
        state |= {name: tensor.bfloat16() for name, tensor in state.items() if name.startswith("language_model")}

    expected = hf_checkpoints.write(tmp_path / "hf", change=change)
    there(tmp_path / "hf", tmp_path / "megatron")
    back(tmp_path / "megatron", tmp_path / "back")
    hf_checkpoints.assert_equal(hf_checkpoints.read(tmp_path / "back"), expected)


@pytest.mark.parametrize("keys", [["dtype"], ["torch_dtype"], ["torch_dtype", "dtype"]])
def test_the_config_says_the_dtype_under_its_own_key(tmp_path, keys):
    hf_checkpoints.write(tmp_path / "hf", dtype=torch.bfloat16)
    there(tmp_path / "hf", tmp_path / "megatron")
    file = tmp_path / "megatron" / "hf" / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("dtype", "torch_dtype")}
    file.write_text(json.dumps(config | (dict.fromkeys(keys, "float16") if len(keys) == 1 else {})))
    back(tmp_path / "megatron", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config | dict.fromkeys(keys, "bfloat16")


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_chunks_of_any_ranks_become_the_same_model(tmp_path, stacked, num_ranks):
    """As a run saves: each tensor cut over tensor-parallel ranks, vocabulary padded, the optimizer beside it."""
    expected = hf_checkpoints.write(tmp_path / "hf")
    write_training_checkpoint(tmp_path / "run" / "iter_0000007", tmp_path / "hf", expected, num_ranks, stacked)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    back(tmp_path / "run", tmp_path / "back", "--hf-template", str(tmp_path / "hf"))
    hf_checkpoints.assert_equal(hf_checkpoints.read(tmp_path / "back"), expected)
    for checkpoint, flags in ((tmp_path / "run" / "iter_0000007", []), (tmp_path / "run", ["--iteration", "7"])):
        back(checkpoint, tmp_path / "back", "--hf-template", str(tmp_path / "hf"), "--overwrite", *flags)


def test_a_large_tensor_goes_in_blocks_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_dist_save, "split_rows", lambda shape, dtype: split_rows(shape, dtype, block_bytes=1000))
    expected = hf_checkpoints.write(tmp_path / "hf")
    there(tmp_path / "hf", tmp_path / "megatron")
    back(tmp_path / "megatron", tmp_path / "back")
    hf_checkpoints.assert_equal(hf_checkpoints.read(tmp_path / "back"), expected)
