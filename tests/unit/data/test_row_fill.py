"""How full rows are, against counting by hand."""

import pytest

from rsa_megatron.data.row_fill import measure_fill, measure_micro_batches

# In rows of 10, from buffers of 3: [6, 4], [7] and [5, 5], [3].
POSITIONS = [6, 7, 4, 5, 5, 3]


def fill(positions=POSITIONS, tiles=None, **settings):
    settings = {"row_length": 10, "max_tiles": 9, "buffer_size": 3} | settings
    return measure_fill(positions, tiles or [1] * len(positions), list("abcdef")[: len(positions)], **settings)


def test_rows_are_those_of_each_buffer():
    found = fill()
    assert (found.num_samples, found.num_rows, found.samples_per_row) == (6, 4, 1.5)
    assert found.fill == pytest.approx(30 / 40)
    # Unpacked each of the six is a position shorter and has a row.
    assert found.fill_unpacked == pytest.approx((30 - 6) / 60)
    # In one buffer: [7, 3], [6, 4], [5, 5].
    assert fill(buffer_size=6).num_rows == 3 and fill(buffer_size=6).fill == 1


def test_tiles_are_a_limit_too():
    assert fill(buffer_size=6, max_tiles=1).num_rows == 6
    assert fill(buffer_size=6, tiles=[1, 0, 0, 1, 0, 0], max_tiles=1).num_rows == 3


def test_micro_batches_are_padded_to_their_longest():
    # [6, 7], [4, 5], [5, 3] are 5 + 6, 3 + 4, 4 + 2 positions in rows of 6, 4 and 4.
    assert measure_micro_batches(POSITIONS, 2) == pytest.approx(24 / 28)
    assert measure_micro_batches(POSITIONS, 1) == 1


def test_nothing_has_no_fill():
    with pytest.raises(ValueError, match="no sample fits a row of 10 positions"):
        fill([])
