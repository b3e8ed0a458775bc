"""A buffer's samples are divided among rows: none is lost, no row is over its limits, few are needed, and order says nothing of length."""

import random
import statistics
import time

import pytest

from rsa_megatron.data.packing import pack_rows


def draw(seed, count=1000, row_length=8192):
    """Lengths and tiles as of a mixture: texts, and images of 1 to 37 tiles."""
    rng = random.Random(seed)
    tiles = [rng.choice([0, 1, 1, 5, 10, 37]) for _ in range(count)]
    lengths = [min(row_length, int(rng.lognormvariate(5.5, 0.8)) + 196 * number) for number in tiles]
    return lengths, tiles, [f"sample-{seed}-{number}" for number in range(count)]


def first_fit_decreasing(lengths, tiles, row_length, max_tiles):
    """As it is described in textbooks, with two limits; how many rows."""
    rows = []
    for sample in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        for row in rows:
            if row[0] >= lengths[sample] and row[1] >= tiles[sample]:
                break
        else:
            rows.append(row := [row_length, max_tiles])
        row[0] -= lengths[sample]
        row[1] -= tiles[sample]
    return len(rows)


@pytest.mark.parametrize("seed", range(20))
def test_each_sample_is_in_one_row_within_its_limits(seed):
    count = [0, 1, 2, 3, 64, 300, 1000][seed % 7]
    lengths, tiles, keys = draw(seed, count)
    for max_tiles in (37, 60, float("inf")):
        rows = pack_rows(lengths, tiles, keys, 8192, max_tiles)
        assert sorted(sample for row in rows for sample in row) == list(range(count))
        assert all(row == sorted(row) and row for row in rows)
        assert all(sum(lengths[sample] for sample in row) <= 8192 for row in rows)
        assert all(sum(tiles[sample] for sample in row) <= max_tiles for row in rows)
        # Nearly as few as first-fit decreasing, whose rows are of equal samples.
        assert len(rows) - first_fit_decreasing(lengths, tiles, 8192, max_tiles) <= 2 + 0.04 * len(rows)
        assert rows == pack_rows(lengths, tiles, keys, 8192, max_tiles)


def test_a_sample_with_more_tiles_than_a_row_has_no_other_images_in_its_row():
    rows = pack_rows([50, 10, 10, 10], [9, 1, 0, 1], list("abcd"), 100, 4)
    assert sorted(rows) == [[0, 2], [1, 3]]


def test_a_sample_longer_than_the_row_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="a sample of 101 positions for rows of 100"):
        pack_rows([101], [0], ["a"], 100)


def test_the_order_of_rows_follows_their_keys_and_not_their_lengths():
    lengths, tiles, keys = draw(1)
    rows = pack_rows(lengths, tiles, keys, 8192)
    longest = [max(lengths[sample] for sample in row) for row in rows]
    by_length = sorted(longest, reverse=True)
    half = len(rows) // 2
    assert abs(sum(longest[:half]) / sum(longest) - 0.5) < 0.1 < sum(by_length[:half]) / sum(by_length) - 0.5
    assert rows != pack_rows(lengths, tiles, [f"other-{key}" for key in keys], 8192)
    # Other samples about them change nothing of two rows' order.
    alone = pack_rows([60, 60], [0, 0], ["x", "y"], 100)
    among = [row for row in pack_rows([60, 60, 90, 80], [0] * 4, list("xyzw"), 100) if row[0] < 2]
    assert alone == among


def test_a_row_is_a_mixture():
    """Rows as unlike as chance makes them: in order of length some would be of texts alone, others of large images."""
    lengths, tiles, keys = draw(3)
    deviations = []
    for order in (range(1000), sorted(range(1000), key=lengths.__getitem__, reverse=True)):
        rows = pack_rows([lengths[n] for n in order], [tiles[n] for n in order], [keys[n] for n in order], 8192)
        deviations.append(statistics.pstdev(map(len, rows)))
    assert deviations[0] < 0.6 * deviations[1]


def test_it_takes_microseconds_a_sample():
    lengths, tiles, keys = draw(0)
    best = min(_time(lambda: pack_rows(lengths, tiles, keys, 8192, 37)) for _ in range(5))
    assert best / len(lengths) < 100e-6  # 2 to 5 on a quiet machine


def _time(function):
    began = time.process_time()
    function()
    return time.process_time() - began
