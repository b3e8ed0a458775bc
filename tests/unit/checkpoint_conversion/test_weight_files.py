"""Which of a folder's weights are read: those that transformers takes, and what else lies there is named."""

import json
import os
import re

import pytest
import torch

from checkpoint_conversion.hf_weights import open_folder
from tests.support import hf_checkpoints
from tests.support.hf_checkpoints import back, there

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
NEWLINE = "image_newline"


def save_bin(folder, state, num_files=1):
    if num_files == 1:
        return torch.save(state, folder / BIN)
    names, weight_map = sorted(state), {}
    for number in range(num_files):
        file = f"pytorch_model-{number + 1:05d}-of-{num_files:05d}.bin"
        torch.save({name: state[name] for name in names[number::num_files]}, folder / file)
        weight_map |= dict.fromkeys(names[number::num_files], file)
    (folder / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def marked(state, value: float):
    return state | {NEWLINE: torch.full_like(state[NEWLINE], value)}


# In transformers' order; each folder holds it and all after it, told apart by image_newline.
FORMS = {
    SINGLE: lambda folder, state: hf_checkpoints.save(folder, state),
    INDEX: lambda folder, state: hf_checkpoints.save(folder, state, 2),
    BIN: lambda folder, state: save_bin(folder, state),
    BIN_INDEX: lambda folder, state: save_bin(folder, state, 2),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with the same weights four times, but for image_newline: 0, 1, 2, 3 in transformers' order."""
    folder = tmp_path_factory.mktemp("weights") / "hf"
    state = hf_checkpoints.write(folder)
    for value, write in enumerate(FORMS.values()):
        write(folder, marked(state, float(value)))
    return folder


def taken_by_transformers(folder) -> float:
    from transformers import LlavaOnevisionForConditionalGeneration

    return LlavaOnevisionForConditionalGeneration.from_pretrained(folder).model.image_newline[0].item()


@pytest.mark.parametrize("first", range(4), ids=list(FORMS))
def test_of_weights_stored_twice_those_that_transformers_takes_are_read(source, tmp_path, capsys, first):
    for file in source.iterdir():
        (tmp_path / file.name).symlink_to(file)
    for name in list(FORMS)[:first]:
        (tmp_path / name).unlink()
    tensors = open_folder(tmp_path)
    assert tensors[NEWLINE].read()[0].item() == first == taken_by_transformers(tmp_path)
    said = capsys.readouterr().out
    chosen = [SINGLE, "model-00001-of-00002.safetensors", BIN, "pytorch_model-00001-of-00002.bin"][first]
    assert f"weights of {tmp_path}: {chosen}" in said and " (as transformers chooses); not read: " in said
    assert len(said.splitlines()) == 1


def test_a_folder_with_its_weights_once_is_not_talked_of(tmp_path, capsys):
    hf_checkpoints.write(tmp_path / "hf", num_files=2)
    (tmp_path / "hf" / "training_args.bin").write_bytes(b"no weights")
    open_folder(tmp_path / "hf")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "other", ["model.fp16.safetensors", "consolidated.safetensors", "consolidated.00.pth", "original/x.pth"]
)
def test_variants_and_original_weights_are_not_read_and_named(tmp_path, capsys, other):
    state = hf_checkpoints.write(tmp_path / "hf")
    file = tmp_path / "hf" / other
    file.parent.mkdir(exist_ok=True)
    file.write_bytes((tmp_path / "hf" / SINGLE).read_bytes())
    assert len(open_folder(tmp_path / "hf")) == len(state)
    name = other.partition("/")[0] + "/" * ("/" in other)
    assert (
        capsys.readouterr().out == f"weights of {tmp_path}/hf: {SINGLE} (as transformers chooses); not read: {name}\n"
    )
    (tmp_path / "hf" / SINGLE).unlink()
    with pytest.raises(
        ValueError, match=rf"found; it holds {re.escape(name)}, which transformers does not take by itself"
    ):
        open_folder(tmp_path / "hf")


def test_a_file_that_config_json_names_comes_first(tmp_path, capsys):
    state = hf_checkpoints.write(tmp_path / "hf", change=lambda s: s.update({NEWLINE: torch.full((48,), 5.0)}))
    (tmp_path / "hf" / SINGLE).rename(tmp_path / "hf" / "named.safetensors")
    hf_checkpoints.save(tmp_path / "hf", marked(state, 0.0))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    write = (tmp_path / "hf" / "config.json").write_text
    write(json.dumps(config | {"transformers_weights": "named.safetensors"}))
    assert open_folder(tmp_path / "hf")[NEWLINE].read()[0] == 5 == taken_by_transformers(tmp_path / "hf")
    there(tmp_path / "hf", tmp_path / "megatron")
    back(tmp_path / "megatron", tmp_path / "back")  # there the file has another name
    assert taken_by_transformers(tmp_path / "back") == 5
    for wrong in ("../named.safetensors", 3, "named.bin"):
        write(json.dumps(config | {"transformers_weights": wrong}))
        with pytest.raises(
            ValueError, match=r"config.json: transformers_weights is .*; it must be a safetensors file or index"
        ):
            open_folder(tmp_path / "hf")


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    hf_checkpoints.write(tmp_path / "hf")
    (tmp_path / "hf" / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "hf" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config.json: an adapter lies in the folder, .*: merge it"):
        open_folder(tmp_path / "hf")


@pytest.mark.parametrize("num_files, dtype", [(1, torch.float32), (2, torch.bfloat16)])
def test_bin_files_give_what_safetensors_give(tmp_path, num_files, dtype):
    state = hf_checkpoints.write(tmp_path / "hf", dtype=dtype)
    (tmp_path / "hf" / SINGLE).unlink()
    # A view into a larger storage, whose rows lie apart, as some have been saved.
    save_bin(tmp_path / "hf", state | {NEWLINE: torch.stack([state[NEWLINE]] * 2, 1)[:, 0]}, num_files)
    there(tmp_path / "hf", tmp_path / "megatron")
    back(tmp_path / "megatron", tmp_path / "back")
    hf_checkpoints.assert_equal(hf_checkpoints.read(tmp_path / "back"), state)


class _Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "write, says",
    [
        (
            lambda file, state: torch.save(state | {"x": _Code(file.parent / "ran")}, file),
            "it names posix.mkdir, which",
        ),
        (
            lambda file, state: torch.save(state, file, _use_new_zipfile_serialization=False),
            "not in the format of torch 1.6",
        ),
        (lambda file, state: file.write_text("version https://git-lfs"), "download it again"),
        (lambda file, state: torch.save({"state_dict": state}, file), "'state_dict' is a dict, not a tensor"),
        (lambda file, state: torch.save([*state.values()], file), "holds a list, not tensors by their names"),
        (
            lambda file, state: torch.save(state | {NEWLINE: torch.zeros(48, dtype=torch.int8)}, file),
            "torch.int8 is quantised",
        ),
    ],
    ids=["code", "old", "pointer", "nested", "list", "quantised"],
)
def test_a_bin_file_that_holds_more_or_less_than_tensors_is_refused(tmp_path, write, says):
    state = hf_checkpoints.write(tmp_path / "hf")
    (tmp_path / "hf" / SINGLE).unlink()
    write(tmp_path / "hf" / BIN, state)
    with pytest.raises(ValueError, match=says) as raised:
        open_folder(tmp_path / "hf")
    assert str(tmp_path / "hf" / BIN) in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "hf" / "ran").exists()


def test_the_control_an_ordinary_load_runs_what_a_bin_file_names(tmp_path):
    torch.save({"x": _Code(tmp_path / "ran")}, tmp_path / BIN)
    torch.load(tmp_path / BIN, weights_only=False)
    assert (tmp_path / "ran").exists()
