"""A small CLIP and shards, and a folder of its own to run in for each test."""

import pytest
import transformers

from tests.support import realign_runs, tiny_dual_encoders


@pytest.fixture(scope="package")
def clip(tmp_path_factory):
    return tiny_dual_encoders.clip(tmp_path_factory.mktemp("encoder") / "clip")


@pytest.fixture(scope="package")
def shards(tmp_path_factory):
    return realign_runs.write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # --store is "features" in it
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(transformers.utils.logging, "set_verbosity_error", lambda: None)
