"""Embeddings come back row for row from every source, as often as asked, a piece at a time; what is wrong is named."""

import numpy
import pytest
import torch
from safetensors.torch import save_file

from rsa_megatron.evaluation import embedding_files
from rsa_megatron.evaluation.embedding_files import open_embeddings
from rsa_megatron.evaluation.feature_store import FeatureStore

LAYERS = ["0", "embedding"]


def rows(count=23, width=6, seed=0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def store(folder, x_ND, part_size=5, layers=LAYERS, left_out=(3, 9)) -> list[str]:
    """Features of as many pairs as there are rows and two more, which are left out; the keys of the rows."""
    keys = [f"pair {number}" for number in range(len(x_ND) + len(left_out))]
    made = FeatureStore.create(
        folder, {"keys": keys, "layers": layers, "store_dtype": "float32", "model": "m", "revision": "r"}
    )
    row = 0
    for start in range(0, len(keys), part_size):
        good = [number for number in range(start, min(start + part_size, len(keys))) if number not in left_out]
        bad = {
            keys[number]: "broken" for number in range(start, min(start + part_size, len(keys))) if number in left_out
        }
        part_nD = x_ND[row : row + len(good)]
        made.append(
            [keys[number] for number in good],
            {name: part_nD if name == layers[-1] else -part_nD for name in layers},
            bad,
        )
        row += len(good)
    made.finish()
    return [key for number, key in enumerate(keys) if number not in left_out]


@pytest.fixture(params=["store", "npy", "float16", "fortran", "big-endian", "safetensors", "bfloat16"])
def source(request, tmp_path):
    """(what to open, the rows, the keys)"""
    x_ND = rows()
    if request.param == "store":
        return f"{tmp_path / 'made'}:embedding", x_ND, store(tmp_path / "made", x_ND)
    if request.param in ("safetensors", "bfloat16"):
        x_ND = x_ND if request.param == "safetensors" else x_ND.bfloat16()
        save_file({"x": x_ND, "other": -x_ND}, tmp_path / "x.safetensors")
        return f"{tmp_path / 'x.safetensors'}:x", x_ND, None
    x_ND = {"float16": x_ND.half(), "fortran": x_ND.double()}.get(request.param, x_ND)
    order = {"fortran": numpy.asfortranarray, "big-endian": lambda array: array.astype(">f4")}.get(
        request.param, numpy.asarray
    )
    numpy.save(tmp_path / "x.npy", order(x_ND.numpy()))
    return tmp_path / "x.npy", x_ND, None


def test_every_row_comes_back_each_time(source, monkeypatch):
    spec, expected_ND, keys = source
    monkeypatch.setattr(embedding_files, "_PIECE_BYTES", 4 * 8 * 6)  # four rows of float64
    found = open_embeddings(spec)
    assert (found.num_rows, found.width, found.keys) == (23, 6, keys)
    for _ in range(2):
        pieces = list(found)
        assert len(pieces) > 1 and torch.equal(torch.cat(pieces), expected_ND) and pieces[0].dtype == expected_ND.dtype


@pytest.mark.parametrize("size", [1, 2, 5, 30])
def test_shares_of_ranks_are_all_rows_once(source, size):
    spec, expected_ND, keys = source
    shares = [open_embeddings(spec).take_share(rank, size) for rank in range(size)]
    pieces = [piece for share in shares for piece in share]
    assert torch.equal(torch.cat(pieces), expected_ND)
    assert max(share.num_rows for share in shares) - min(share.num_rows for share in shares) <= 1
    if keys:
        assert [key for share in shares for key in share.keys] == keys
    again = [open_embeddings(spec).take_share(1, 2).take_share(rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([piece for share in again for piece in share]), expected_ND[23 // 2 :])


def test_a_store_says_what_it_is_of_and_one_layer_need_not_be_named(tmp_path):
    x_ND = rows()
    store(tmp_path / "a:b", x_ND, layers=["embedding"])  # a colon in its name
    found = open_embeddings(tmp_path / "a:b")
    assert found.about == {"model": "m", "revision": "r", "layer": "embedding"} and torch.equal(
        torch.cat(list(found)), x_ND
    )
    assert found.description == f"{tmp_path / 'a:b'}, layer embedding"


def test_memory_does_not_grow_with_the_file(tmp_path):
    """160 MB are read in pieces of 16 MB; pages of a mapped file count as long as it is open, so they may not all stay."""
    path = tmp_path / "x.npy"
    made = numpy.lib.format.open_memmap(path, mode="w+", dtype=numpy.float32, shape=(40_000, 1000))
    made[:] = 1
    made.flush()
    del made
    found = open_embeddings(path)
    before = _anonymous_bytes()
    highest = max(_anonymous_bytes() for _ in found)
    # Some pieces: the one that is yielded, the one that is made, what the check takes.
    assert highest - before < 4 * embedding_files._PIECE_BYTES


def _anonymous_bytes() -> int:
    """Memory that is no file's."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


def bad(x_ND) -> torch.Tensor:
    x_ND = x_ND.clone()
    x_ND[4, 2], x_ND[7], x_ND[20, 0], x_ND[21, 5] = torch.nan, 0, torch.inf, -torch.inf
    return x_ND


def test_rows_without_a_direction_are_counted_and_named_by_key(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_files, "_PIECE_BYTES", 4 * 4 * 6)
    numpy.save(tmp_path / "x.npy", bad(rows()).numpy())
    kinds = r"1 hold NaN \(row 4\), 2 hold infinity \(row 20, row 21\), 1 are zero \(row 7\);"
    with pytest.raises(ValueError, match=rf"x.npy: 4 of 23 embeddings have no direction: {kinds} remove them"):
        list(open_embeddings(tmp_path / "x.npy"))
    of_share = r"2 of 12 embeddings have no direction: 2 hold infinity \(row 20, row 21\);"  # by the file's numbers
    with pytest.raises(ValueError, match=of_share):
        list(open_embeddings(tmp_path / "x.npy").take_share(1, 2))
    x_ND = rows()
    x_ND[1:10] = 0
    keys = store(tmp_path / "made", x_ND)
    with pytest.raises(
        ValueError,
        match=rf"made, layer 0: 9 of 23 .*: 9 are zero \({', '.join(keys[1:6])} and 4 more\); remove them",
    ):
        list(open_embeddings(f"{tmp_path / 'made'}:0"))
    for name, factor in (("short", 1e-30), ("long", 1e30)):  # squares beyond float32 are no fault
        numpy.save(tmp_path / f"{name}.npy", rows().numpy() * factor)
        assert len(torch.cat(list(open_embeddings(tmp_path / f"{name}.npy")))) == 23


@pytest.mark.parametrize(
    "make, spec, message",
    [
        (lambda f: None, "none.npy", "none.npy not found; name a folder of stored features"),
        (lambda f: (f / "x.txt").write_text("1"), "x.txt", "x.txt has an unsupported format"),
        (lambda f: (f / "x.npy").write_bytes(b"no array"), "x.npy", "x.npy cannot be read as a numpy array of numbers"),
        (lambda f: numpy.save(f / "x.npy", numpy.array([{}]), allow_pickle=True), "x.npy", "Python objects in dtype"),
        (lambda f: numpy.save(f / "x.npy", numpy.ones((3, 2), int)), "x.npy", "x.npy holds int64: save it as float32"),
        (
            lambda f: numpy.save(f / "x.npy", numpy.ones(3)),
            "x.npy",
            r"x.npy has the shape \[3\]: it must be at least one row",
        ),
        (lambda f: numpy.save(f / "x.npy", numpy.ones((0, 3))), "x.npy", r"x.npy has the shape \[0, 3\]"),
        (lambda f: numpy.save(f / "x.npy", numpy.ones((2, 3))), "x.npy:a", "holds one array; omit :a"),
        (
            lambda f: save_file({"a": rows(), "b": rows()}, f / "x.safetensors"),
            "x.safetensors",
            "has the tensors a, b: name one, as .*x.safetensors:a",
        ),
        (
            lambda f: save_file({"a": rows()}, f / "x.safetensors"),
            "x.safetensors:c",
            "has no tensor c; its tensors are a",
        ),
        (lambda f: save_file({"a": rows().int()}, f / "x.safetensors"), "x.safetensors", "tensor a holds I32"),
        (lambda f: (f / "x.safetensors").write_bytes(b"12345678{"), "x.safetensors", "x.safetensors cannot be read"),
        (
            lambda f: store(f / "made", rows()),
            "made",
            "made has the layers 0, embedding: name one, as .*made:embedding",
        ),
        (lambda f: store(f / "made", rows()), "made:7", "made has no layer 7; its layers are 0, embedding"),
        (lambda f: (f / "made.unfinished").mkdir(), "made", "made.unfinished is not finished"),
        (lambda f: (f / "made").mkdir(), "made:0", "made holds no features"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_says_why(make, spec, message, tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        open_embeddings(tmp_path / spec)
    assert "\n" not in str(error.value)
