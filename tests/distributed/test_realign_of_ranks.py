"""ReAlign and its baselines over ranks are as in one process; what one rank finds wrong, all ranks report."""

import pytest
import torch

from rsa_megatron.realign.baselines import METHODS
from rsa_megatron.realign.realign import ReAlign
from tests.support import processes
from tests.support.embedding_sets import NUMBERS, images, texts


def moved_on_rank(method):
    group = torch.distributed.group.WORLD
    x, y = (e.tensor_split([130])[group.rank()] for e in (images(), texts()))
    return METHODS[method].fit(x, y, group=group).transform(texts())


@pytest.mark.parametrize("method", ["c3", "blockwise"])
def test_ranks_change_nothing(method):
    expected = METHODS[method].fit(images(), texts()).transform(texts())
    found = processes.run(moved_on_rank, 2, method)
    assert torch.equal(found[0], found[1])
    # Blockwise takes roots and inverses of matrices with condition 1e3: 1e-16 times that, some times over.
    assert (found[0] - expected).abs().max() < 1e-10


# What each rank of three holds of images and texts: unequal shares, a rank without any, one with pieces that are empty.
SHARES = {
    "unequal": ([200, 90, 10], [20, 300, 100]),
    "an empty rank": ([0, 250, 50], [420, 0, 0]),
}


def share(x_ND, sizes, rank):
    part = x_ND.split(sizes)[rank]
    return [] if len(part) == 0 and rank == 0 else part.split(33)


def fit_of_share(image_sizes, text_sizes):
    group = torch.distributed.group.WORLD
    operator = ReAlign.fit(
        share(images(), image_sizes, group.rank()), share(texts(), text_sizes, group.rank()), group=group
    )
    return {name: getattr(operator, name) for name in NUMBERS} | {"count": (operator.num_images, operator.num_texts)}


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_ranks_change_nothing_and_have_the_same_bits(shares):
    whole = ReAlign.fit(images(), texts())
    found = processes.run(fit_of_share, 3, *shares)
    for name in NUMBERS:
        values = [torch.as_tensor(of_rank[name], dtype=torch.float64) for of_rank in found]
        assert all(torch.equal(value, values[0]) for value in values), name
        assert (values[0] - torch.as_tensor(getattr(whole, name), dtype=torch.float64)).abs().max() < 1e-12, name
    assert all(of_rank["count"] == (300, 420) for of_rank in found)


def message_on_rank(kind):
    """What fitting says there; None if it says nothing."""
    group = torch.distributed.group.WORLD
    x, y = (e.split(150)[:2] for e in (images(), texts()))
    x, y = x[group.rank()].clone(), y[group.rank()].clone()

    def broken_file(rows=y[:50]):
        yield rows
        raise OSError("shard-00003.npy ends after 50 rows")

    class Broken:
        __iter__ = staticmethod(broken_file)

    if group.rank() == 1:
        if kind == "rows":
            x[[3, 4], 0], x[9] = torch.nan, 0
        x = x[:, :20] if kind == "width" else x
        y = Broken() if kind == "file" else y
    if kind == "all":
        y = y[:, :20]
    if kind == "one row":
        y = y[: 1 - group.rank()]
    try:
        ReAlign.fit(x, y, group=group)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "kind, expected",
    [
        (
            "rows",
            "image embeddings: rank 1: of 150 rows 2 hold NaN (rows 3, 4), 1 are zero (row 9): they have no direction; remove them",
        ),
        ("file", "text embeddings: rank 1: shard-00003.npy ends after 50 rows"),
        ("width", "image embeddings: embeddings of a set must have one width, not 24 on rank 0, 20 on rank 1"),
        (
            "all",
            "image embeddings have width 24 and text embeddings 20: they must come from one space, so from the two halves of one encoder",
        ),
        ("one row", "text embeddings: a mean and a variance need at least 2 rows, got 1"),
        ("nothing", None),
    ],
)
def test_what_one_rank_finds_all_ranks_say(kind, expected):
    """A rank that raised alone would leave the other in the gather: the test would not end."""
    assert processes.run(message_on_rank, 2, kind, timeout=60) == [expected] * 2
