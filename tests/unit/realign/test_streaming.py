"""Pieces, blocks, types and ranks change nothing; bad rows are counted and named on every rank; what is saved is what is loaded."""

import json
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from rsa_megatron.realign import unit_rows as embedding_rows
from rsa_megatron.realign.moments import Moments, compute_moments
from rsa_megatron.realign.realign import ReAlign
from rsa_megatron.realign.unit_rows import normalise_rows
from tests.support.embedding_sets import NUMBERS, images, texts


@pytest.fixture(scope="module")
def whole():
    return ReAlign.fit(images(), texts())


def largest_difference(a: ReAlign, b: ReAlign) -> float:
    pairs = ((torch.as_tensor(getattr(operator, name)) for operator in (a, b)) for name in NUMBERS)
    return max((x - y).abs().max().item() for x, y in pairs)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_pieces_change_nothing(size, whole):
    """T16. Sums of 400 numbers below 1 in another order: some hundred roundings of 1e-16."""
    found = ReAlign.fit(images().split(size), texts().split(size))
    assert largest_difference(found, whole) < 1e-12
    assert (found.num_images, found.num_texts) == (300, 420)


@pytest.mark.parametrize("rows", [1, 5, 50])
def test_blocks_change_nothing(rows, whole, monkeypatch):
    monkeypatch.setitem(embedding_rows.BLOCK_NUMBERS, "cpu", rows * 24)
    found = ReAlign.fit(images(), texts())
    assert largest_difference(found, whole) < 1e-12
    # Each row by itself: a block's rows are no part of it.
    assert (found.transform(texts()) - whole.transform(texts())).abs().max() < 1e-12


def test_empty_pieces_and_objects_that_begin_anew(whole):
    class Shards:
        def __iter__(self):
            yield torch.empty(0, 24)
            yield from texts().split(100)
            yield torch.empty(0, 24)

    assert largest_difference(ReAlign.fit([images()], Shards()), whole) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_type_is_computed_in_float64(dtype):
    """float16 is half the bytes of what is fitted on, and no less exact once it is read."""
    x, y = images().to(dtype), texts().to(dtype)
    found, expected = ReAlign.fit(x, y), ReAlign.fit(x.double(), y.double())
    assert largest_difference(found, expected) == 0
    moved = found.transform(y)
    assert moved.dtype == dtype and torch.equal(moved, found.transform(y, dtype=torch.float64).to(dtype))


def test_rows_that_lie_in_memory_any_way(whole):
    assert largest_difference(ReAlign.fit(images().T.contiguous().T, texts().repeat(1, 2)[:, :24]), whole) < 1e-12
    learned = texts().requires_grad_()
    assert not whole.transform(learned).requires_grad


def test_progress_wraps_each_pass():
    seen = []

    def progress(pieces, what):
        for piece in pieces:
            seen.append((what, len(piece)))
            yield piece

    ReAlign.fit(images(5), texts(7).split(4), progress=progress)
    assert seen == [
        ("image embeddings", 5),
        ("text embeddings", 4),
        ("text embeddings", 3),
        ("text embeddings, projected", 4),
        ("text embeddings, projected", 3),
    ]


def test_moments_merge_to_those_of_all_rows():
    """Chan's formula with unequal parts far from each other; and without its last term it is seen."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(1000, 6, generator=generator, dtype=torch.float64) + torch.arange(1000)[:, None] / 100
    whole, merged = Moments.of_block(x_ND, with_scatter=True), Moments.empty()
    without = 0.0
    for part in x_ND.split([1, 2, 500, 400, 97]):
        moments_of_part = Moments.of_block(part, with_scatter=True)
        without += moments_of_part.square_sum.item()
        merged.merge(moments_of_part)
    assert merged.num_rows == 1000 and (merged.mean_D - whole.mean_D).abs().max() < 1e-12
    assert abs(merged.square_sum / whole.square_sum - 1) < 1e-12
    assert ((merged.scatter_DD - whole.scatter_DD) / whole.square_sum).abs().max() < 1e-12
    assert abs(without / whole.square_sum - 1) > 0.1


def bad(kind):
    x = images(20)
    if kind == "NaN and infinity":
        x[[2, 5, 6], 1], x[7, 0], x[11, 3] = torch.nan, torch.inf, -torch.inf
        x[7, 1] = torch.nan  # counts as NaN
    elif kind == "zero":
        x[[0, 1, 3, 5, 7, 9, 19]] = 0
    elif kind == "width":
        return [x[:5], x[5:, :20]]
    elif kind == "one row":
        return x[:1]
    elif kind == "no row":
        return x[:0]
    elif kind == "no piece":
        return []
    elif kind == "integers":
        return x.int()
    elif kind == "array":
        return [x[:3], x[3:].numpy()]
    elif kind == "one vector":
        return x[0]
    return x.split(6)


SAYS = {
    "NaN and infinity": "of 20 rows 4 hold NaN (rows 2, 5, 6, 7), 1 hold infinity (row 11): they have no direction; remove them",
    "zero": "of 20 rows 7 are zero (rows 0, 1, 3, 5, 7, ...): they have no direction; remove them",
    "width": "embeddings of a set must have one width, but it is 24 before row 5 and 20 from there on",
    "one row": "a mean and a variance need at least 2 rows, got 1",
    "no row": "a mean and a variance need at least 2 rows, got 0",
    "no piece": "a mean and a variance need at least 2 rows, got 0",
    "integers": "embeddings must be rows [N, D] of floating-point numbers, but from row 0 on they are int32 [20, 24]",
    "array": "embeddings must be tensors [N, D], but from row 3 on there is a ndarray",
    "one vector": "embeddings must be rows [N, D] of floating-point numbers, but from row 0 on they are float64 [24]",
}


@pytest.mark.parametrize("kind", SAYS)
def test_bad_input_is_counted_and_named(kind):
    with pytest.raises(ValueError) as of_images:
        ReAlign.fit(bad(kind), texts(20))
    assert str(of_images.value) == f"image embeddings: {SAYS[kind]}"
    with pytest.raises(ValueError) as of_texts:
        ReAlign.fit(texts(20), bad(kind))
    assert str(of_texts.value) == f"text embeddings: {SAYS[kind]}"


def test_an_iterator_that_is_used_up_is_reported():
    with pytest.raises(
        ValueError, match="the first pass read 420 rows, the next one 0; pass a tensor, a list, or an object"
    ):
        ReAlign.fit(images(), iter(texts().split(100)))


def test_bad_rows_to_be_moved_are_named(whole):
    rows = texts(20)
    rows[4, 2], rows[6] = torch.nan, 0
    with pytest.raises(ValueError, match=r"text embeddings: of 20 rows 1 hold NaN \(row 4\), 1 are zero \(row 6\)"):
        whole.transform(rows)
    with pytest.raises(ValueError, match=r"of 20 rows 1 hold NaN \(row 4\), 1 are zero \(row 6\)"):
        normalise_rows(rows)
    with pytest.raises(ValueError, match=r"moves rows of width 24, and the text embeddings are \[20, 8\]"):
        whole.transform(rows[:, :8])


def test_rows_too_large_for_the_type_they_are_stored_in_are_infinite():
    x = images(20)
    x[3] *= 1e6
    with pytest.raises(ValueError, match=r"1 hold infinity \(row 3\)"):
        compute_moments(x.half(), "image embeddings")


def test_saved_and_loaded_bits_are_the_same(tmp_path):
    operator = ReAlign.fit(
        images(), texts(), epsilon=1e-7, steps=("anchor", "centroid"), about={"encoder": "CLIP", "data": "Bunny"}
    )
    operator.save(tmp_path / "out" / "operator")
    assert sorted(os.listdir(tmp_path / "out" / "operator")) == ["manifest.json", "realign.safetensors"]
    loaded = ReAlign.load(tmp_path / "out" / "operator")
    for name in NUMBERS:
        assert torch.equal(torch.as_tensor(getattr(loaded, name)), torch.as_tensor(getattr(operator, name))), name
    others = ("num_images", "num_texts", "epsilon", "steps", "about")
    assert [getattr(loaded, name) for name in others] == [
        300,
        420,
        1e-7,
        ("anchor", "centroid"),
        {"encoder": "CLIP", "data": "Bunny"},
    ]
    assert torch.equal(loaded.transform(texts()), operator.transform(texts()))
    with pytest.raises(ValueError, match="operator already exists: name another folder, or remove it"):
        operator.save(tmp_path / "out" / "operator")
    with pytest.raises(ValueError, match="about must map strings to strings"):
        ReAlign.fit(images(), texts(), about={"rows": 3})


def test_a_folder_is_there_as_a_whole_or_not_at_all(whole, tmp_path):
    """A disk that is full after 100 bytes; then one that is not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(Exception):
            whole.save(tmp_path / "operator")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not (tmp_path / "operator").exists()
    whole.save(tmp_path / "operator")
    assert os.listdir(tmp_path) == ["operator"]
    ReAlign.load(tmp_path / "operator")


def spoil(folder, kind):
    manifest, tensors = folder / "manifest.json", folder / "realign.safetensors"
    if kind == "no manifest":
        manifest.unlink()
    elif kind == "cut manifest":
        manifest.write_text(manifest.read_text()[:50])
    elif kind == "other method":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"method": "c3"}))
    elif kind == "unknown number":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"shift": 1}))
    elif kind == "cut tensors":
        tensors.write_bytes(tensors.read_bytes()[:-8])
    elif kind == "no tensors":
        tensors.unlink()
    elif kind == "rounded":
        save_file({name: x.float() for name, x in load_file(tensors).items()}, tensors)
    elif kind == "NaN":
        save_file({name: x / 0 for name, x in load_file(tensors).items()}, tensors)


@pytest.mark.parametrize(
    "kind, says",
    [
        ("no manifest", "manifest.json cannot be read"),
        ("cut manifest", "manifest.json cannot be read"),
        ("other method", "holds an operator of method 'c3', not 'realign'"),
        ("unknown number", "are not an operator of this version .*shift.*: fit it again"),
        ("cut tensors", "are not an operator of this version"),
        ("no tensors", "are not an operator of this version"),
        ("rounded", "image_mean_D is not float64 of width 24 and finite"),
        ("NaN", "image_mean_D is not float64 of width 24 and finite"),
    ],
)
def test_a_spoilt_folder_is_reported(kind, says, whole, tmp_path):
    whole.save(tmp_path / "operator")
    spoil(tmp_path / "operator", kind)
    with pytest.raises(ValueError, match=says):
        ReAlign.load(tmp_path / "operator")
