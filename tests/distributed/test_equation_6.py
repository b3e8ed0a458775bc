"""One process, which every layout is compared with, is LM loss + weight * eq. 5."""

import pytest

from tests.support import layouts
from tests.support.equation_6 import ALL_TILES, FIRST_TILES, LAST_TILES, with_and_by_plain_autograd
from tests.support.layouts import largest_difference
from tests.support.parity import (
    CAPTION,
    TOLERANCE,
)


@pytest.mark.parametrize(
    "options, tiles_of, detached",
    [
        pytest.param((), FIRST_TILES, "", marks=pytest.mark.check),
        (("--rsa-base-tile", "last"), LAST_TILES, ""),
        (("--rsa-image-pooling", "full"), ALL_TILES, ""),
        (("--rsa-stop-gradient", "text"), FIRST_TILES, "t"),
        (("--rsa-stop-gradient", "vision"), FIRST_TILES, "v"),
        (CAPTION, FIRST_TILES, ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_one_process_is_equation_6(parity, demo, options, tiles_of, detached):
    """The reference of all others against LM loss + weight * eq. 5, written down anew and left to autograd."""
    actual, expected = with_and_by_plain_autograd(parity, demo, options, tiles_of, detached)
    for name in ("lm loss", "rsa loss"):
        assert actual.losses[0][name] == pytest.approx(expected[name], rel=1e-5)
    assert largest_difference(actual.gradients, layouts._assemble([expected["gradients"]]))[0] < TOLERANCE
