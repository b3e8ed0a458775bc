"""What the comparisons of layouts share: the references that each is compared with, made once."""

import pytest

from tests.support.parity import Parity


@pytest.fixture(scope="session")
def parity(demo, tmp_path_factory) -> Parity:
    return Parity(demo, tmp_path_factory.mktemp("parity"))
