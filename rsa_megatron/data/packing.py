"""Which samples of a buffer share a row: arithmetic alone.

Best fit: in the order in which they come, each sample goes to the row that it fills up most, or begins another. From the longest to the
shortest rows would be up to 2 % fuller, but each of samples that are as long as one another: rows of long captions, rows of short
texts. A step is of few rows: what it holds would differ from the next far more than by chance, and training is noisier for it
(docs/log.md).

Rows have two limits, positions and image tiles; the second bounds the memory of the vision tower, and costs little fill where it is a
few tiles more than fill a row (planning/most_tiles.py).

The rows that come out last are the least full. All are put in an order by hash of their keys, and no random number generator is
drawn from.
"""

import bisect
import hashlib
import math
from collections.abc import Iterator, Sequence


def pack_rows(
    lengths: Sequence[int],
    tiles: Sequence[int],
    keys: Sequence[str],
    row_length: int,
    max_tiles: float = math.inf,
) -> list[list[int]]:
    """Divide samples among rows; each is in exactly one.

    Args:
        lengths: positions of each of n samples.
        tiles: image tiles of each.
        keys: their names, by which the rows are ordered.
        row_length: most positions of a row.
        max_tiles: most tiles of a row. A sample with more has no other images in its row.

    Returns:
        The rows, each the numbers of its samples in ascending order.
    """
    assert max(lengths, default=0) <= row_length, f"a sample of {max(lengths)} positions for rows of {row_length}"
    rows, tiles_left = [], []
    by_room = []  # of each row (positions left, its number), ascending
    for sample in range(len(lengths)):
        place = bisect.bisect_left(by_room, (lengths[sample],))
        while place < len(by_room) and tiles_left[by_room[place][1]] < tiles[sample]:
            place += 1
        if place < len(by_room):
            room, row = by_room.pop(place)
        else:
            room, row = row_length, len(rows)
            rows.append([])
            tiles_left.append(max(max_tiles, tiles[sample]))
        rows[row].append(sample)
        tiles_left[row] -= tiles[sample]
        bisect.insort(by_room, (room - lengths[sample], row))
    return sorted(rows, key=lambda row: _hash([keys[sample] for sample in row]))


def pack_buffers(
    lengths: Sequence[int],
    tiles: Sequence[int],
    keys: Sequence[str],
    row_length: int,
    max_tiles: float,
    buffer_size: int,
) -> Iterator[list[int]]:
    """Yield the rows of samples that go through a packing buffer in their order, as those of a data worker do; as `pack_rows` gives them."""
    for first in range(0, len(lengths), buffer_size):
        buffer = slice(first, first + buffer_size)
        for row in pack_rows(lengths[buffer], tiles[buffer], keys[buffer], row_length, max_tiles):
            yield [first + sample for sample in row]


def _hash(keys: list[str]) -> bytes:
    return hashlib.blake2b("\n".join(keys).encode(errors="surrogatepass"), digest_size=8).digest()
