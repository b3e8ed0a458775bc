"""What all tests share: the environment, and a small data set."""

from tests.support import environment  # noqa: F401  # isort: skip  # before torch

from pathlib import Path

import pytest

from tests.support.demo_data import make_demo


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"))
