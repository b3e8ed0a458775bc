"""What cannot be converted is refused in one line that names it, and nothing is left behind."""

import collections
import json
import os
import pickle
import runpy
import shutil
import sys

import pytest
import torch

from checkpoint_conversion import torch_dist_save
from checkpoint_conversion.__main__ import main
from tests.support import hf_checkpoints
from tests.support.hf_checkpoints import back, there, write_training_checkpoint

LAYER = "language_model.model.layers.1."


@pytest.fixture
def refuses(capsys, tmp_path):
    """Calls a conversion that must end with status 2, one line of error with these words in it, and no output."""

    def check(convert, source, *flags, words, out=None):
        target = out or tmp_path / "out"
        with pytest.raises(SystemExit) as end:
            convert(source, target, *flags)
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert end.value.code == 2 and len(error) == 1
        for word in words:
            assert word in error[0]
        assert out or not list(tmp_path.glob("out*"))

    return check


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop(LAYER + "self_attn.k_proj.bias"), [LAYER + "self_attn.k_proj.bias is missing", "[16]"]),
        (lambda s: s.update({LAYER + "self_attn.q_proj.bias": torch.zeros(47)}), ["q_proj.bias", "[47]", "[48]"]),
        (lambda s: s.update({"adapter.weight": torch.zeros(2)}), ["adapter.weight", "not part of the model"]),
        (lambda s: s.update({"model.image_newline": torch.zeros(48)}), ["image_newline", "remove one"]),
        (lambda s: s.update({LAYER + "mlp.up_proj.weight": torch.zeros(37, 48).half()}), ["up_proj", "one dtype"]),
        (lambda s: s.update({"image_newline": torch.zeros(48).int()}), ["image_newline", "I32"]),
    ],
    ids=["missing", "shape", "unknown", "twice", "dtypes", "no float"],
)
def test_tensors_that_do_not_fit(tmp_path, refuses, change, words):
    hf_checkpoints.write(tmp_path / "hf", change=change)
    refuses(there, tmp_path / "hf", words=words)


def test_an_output_layer_of_a_tied_model_must_be_its_embeddings(tmp_path, refuses):
    head, embeddings = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    hf_checkpoints.write(tmp_path / "same", tied=True, change=lambda s: s.update({head: s[embeddings].clone()}))
    there(tmp_path / "same", tmp_path / "megatron")
    hf_checkpoints.write(tmp_path / "hf", tied=True, change=lambda s: s.update({head: s[embeddings] + 1}))
    refuses(there, tmp_path / "hf", words=["lm_head.weight", "tie_word_embeddings"])


def test_files_missing_or_broken(tmp_path, refuses):
    hf_checkpoints.write(tmp_path / "hf", num_files=2)
    second = tmp_path / "hf" / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-8])
    refuses(there, tmp_path / "hf", words=[str(second), "cannot be read"])
    second.unlink()
    refuses(there, tmp_path / "hf", words=[str(second), "is missing"])
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    refuses(
        there,
        tmp_path / "hf",
        words=["none of model.safetensors, ", "it holds model-00001-of-00002.safetensors, which"],
    )


def test_an_unsupported_architecture(tmp_path, refuses):
    hf_checkpoints.write(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    refuses(there, tmp_path / "hf", words=["qwen2_vl", "llava_onevision"])


def test_an_existing_folder_is_replaced_only_on_demand(tmp_path, refuses):
    hf_checkpoints.write(tmp_path / "hf")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    refuses(there, tmp_path / "hf", words=["kept", "--overwrite"], out=tmp_path / "kept")
    assert (tmp_path / "kept" / "file").read_text() == "kept"
    there(tmp_path / "hf", tmp_path / "kept", "--overwrite")
    assert not (tmp_path / "kept" / "file").exists() and (tmp_path / "kept" / "release").is_dir()
    refuses(there, tmp_path / "hf", "--overwrite", words=["which is read"], out=tmp_path)


def test_too_little_room_is_seen_before_writing(tmp_path, refuses, monkeypatch):
    hf_checkpoints.write(tmp_path / "hf")
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    refuses(there, tmp_path / "hf", words=["GB are needed", "make room"])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing_and_keeps_what_was_there(tmp_path, monkeypatch, error):
    hf_checkpoints.write(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("kept")

    def fail(parts, groups):
        raise error

    monkeypatch.setattr(torch_dist_save, "join", fail)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        there(tmp_path / "hf", tmp_path / "out", "--overwrite")
    assert [path.name for path in tmp_path.glob("out*")] == ["out"] and (tmp_path / "out" / "file").exists()


@pytest.mark.parametrize("key", ["vision_model.ln_post.bias", "vision_projection.image_newline"])
def test_a_checkpoint_without_a_tensor_is_not_filled_up(tmp_path, refuses, key):
    state = hf_checkpoints.write(tmp_path / "hf")
    write_training_checkpoint(tmp_path / "run", tmp_path / "hf", state, 2, True, without=[key])
    refuses(back, tmp_path / "run", "--hf-template", str(tmp_path / "hf"), words=[f"{key} is missing"])


def test_a_checkpoint_of_other_sizes(tmp_path, refuses):
    state = hf_checkpoints.write(tmp_path / "hf")
    write_training_checkpoint(tmp_path / "run", tmp_path / "hf", state, 2, True)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["text_config"].pop("layer_types")  # transformers wants as many as layers
    for key, size, words in (
        ("vocab_size", 80, ["word_embeddings", "at least [80, 48]", "[75, 48]"]),
        ("intermediate_size", 40, ["linear_fc1", "[2, 80, 48]"]),
        ("num_hidden_layers", 1, ["[2, 48]", "[1, 48]"]),
    ):
        changed = config | {"text_config": config["text_config"] | {key: size}}
        (tmp_path / "hf" / "config.json").write_text(json.dumps(changed))
        refuses(back, tmp_path / "run", "--hf-template", str(tmp_path / "hf"), words=words)


def test_a_checkpoint_that_is_not_whole(tmp_path, refuses):
    hf_checkpoints.write(tmp_path / "hf")
    there(tmp_path / "hf", tmp_path / "megatron")
    file = tmp_path / "megatron" / "release" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    refuses(back, tmp_path / "megatron", words=[str(file), "truncated"])
    shutil.rmtree(tmp_path / "megatron" / "hf")
    refuses(back, tmp_path / "megatron", words=["hf/config.json is missing", "--hf-template"])
    refuses(back, tmp_path / "hf", words=["not a Megatron checkpoint"])
    refuses(back, tmp_path / "megatron", "--iteration", "3", words=["iter_0000003 is missing; found: none"])


def test_the_command_calls_itself_as_it_was_called(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["without a command"])
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: rsa-megatron convert ") and "python -m" not in said
    with pytest.raises(SystemExit):
        runpy.run_module("checkpoint_conversion", {}, "__main__")
    assert capsys.readouterr().err.endswith("; see python -m checkpoint_conversion --help\n")


class _Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoints_metadata_is_not_run(tmp_path, refuses):
    hf_checkpoints.write(tmp_path / "hf")
    there(tmp_path / "hf", tmp_path / "megatron")
    metadata = tmp_path / "megatron" / "release" / ".metadata"
    metadata.write_bytes(pickle.dumps(_Malicious(tmp_path / "ran")))
    refuses(back, tmp_path / "megatron", words=[str(metadata), "posix.mkdir"])
    assert not (tmp_path / "ran").exists()
    pickle.loads(metadata.read_bytes())
    assert (tmp_path / "ran").exists(), "the control: an ordinary unpickler runs it"
