"""A random Hugging Face model and its converted checkpoint, once with tied and once with untied embeddings."""

import pytest

from tests.support import hf_parity


@pytest.fixture(scope="session", params=["untied", "tied"])
def models(request, demo, tmp_path_factory) -> hf_parity.Models:
    return hf_parity.Models(tmp_path_factory.mktemp(request.param), demo, tied=request.param == "tied")
