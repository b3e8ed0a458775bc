"""Shards of embeddings are what Energon and the task encoder read back; no sample gets another one's embedding."""

import io
import json
import tarfile

import numpy
import pytest
import torch
import yaml
from megatron.energon import WorkerConfig
from transformers import AutoTokenizer

from rsa_megatron.cli.show_sample import stored_samples
from rsa_megatron.data.image_embeddings import ImageEmbeddings
from rsa_megatron.data.loaders import TrainLoader
from rsa_megatron.data.prepare.embedding_shards import (
    EmbeddingTable,
    as_npy,
    make_embedding_info,
    write_embedding_shards,
)
from rsa_megatron.data.sources.record import Unusable
from rsa_megatron.data.synthetic.tokenizer import train_tokenizer
from rsa_megatron.data.task_encoder import LlavaTaskEncoder

KEYS = [f"train-00000.tar/{number:06d}" for number in range(10)] + ["val-00000.tar/000010", "val-00000.tar/000011"]


def record(number, question="<image>\nWhat is it?") -> dict:
    return {
        "id": f"id.{number}",
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": f"Boat {number}."}],
    }


def rows(dtype=numpy.float32) -> numpy.ndarray:
    """The n-th begins with n."""
    x_ND = numpy.random.default_rng(0).standard_normal((len(KEYS), 5)).astype(dtype)
    x_ND[:, 0] = numpy.arange(len(KEYS))
    return x_ND


def parts(**changes) -> dict:
    infos = [make_embedding_info(key, record(number), "") for number, key in enumerate(KEYS)]
    return {"train": infos[:10], "val": infos[10:]} | changes


def write(folder, found=None, keys=KEYS, dtype=numpy.float32, **options):
    # The rows lie in another order than the samples: they are looked up.
    order = numpy.random.default_rng(1).permutation(len(keys))
    table = EmbeddingTable([keys[number] for number in order], rows(dtype)[: len(keys)][order])
    return write_embedding_shards(folder, found or parts(), table, **{"rsa": True, "shard_size": 4} | options)


def read_back(folder, part) -> list[tuple[str, numpy.ndarray, dict]]:
    found = []
    for sample in stored_samples(folder, part):
        ((name, data),) = sample.images.items()
        assert name == "npy"
        found.append((sample.__key__, numpy.load(io.BytesIO(data), allow_pickle=False), json.loads(sample.record)))
    return found


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float16, numpy.float64])
def test_energon_reads_back_each_samples_own_embedding(dtype, tmp_path):
    assert write(tmp_path / "out", dtype=dtype) == {"train": 10, "val": 2}
    for part, first in (("train", 0), ("val", 10)):
        found = read_back(tmp_path / "out", part)
        assert [content["id"] for _, _, content in found] == [
            f"id.{number}" for number in range(first, first + len(found))
        ]
        for number, (_, row_D, content) in enumerate(found, first):
            assert row_D.dtype == dtype and numpy.array_equal(row_D, rows(dtype)[number]) and row_D.shape == (5,)
            assert content["conversations"] == record(number)["conversations"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [
        *(f"train-{n:05d}.tar" for n in range(3)),
        "val-00000.tar",
    ]
    assert yaml.safe_load((tmp_path / "out" / ".nv-meta" / "dataset.yaml").read_text())["subflavors"] == {"rsa": True}
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as tar:
        assert tar.getnames()[:2] == ["000000.npy", "000000.json"]
    assert not list(tmp_path.glob("*unfinished*"))


@pytest.mark.parametrize("rsa", [True, False])
def test_training_batches_hold_them(rsa, tmp_path):
    write(tmp_path / "out", rsa=rsa)
    train_tokenizer(["Boat 1. What is it?"], tmp_path / "tokenizer")
    encoder = LlavaTaskEncoder(
        AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
        image_size=28,
        patch_size=14,
        max_sequence_length=64,
        template="plain",
        image_aspect_ratio="square",
        grid_pinpoints=[],
        max_tiles=1,
        embeddings=ImageEmbeddings(width=5, positions=3),
    )
    loader = TrainLoader(str(tmp_path / "out"), encoder, WorkerConfig(rank=0, world_size=1, num_workers=0), 2, 4)
    seen = 0
    for batch in (next(loader) for _ in range(5)):
        for key, row_D in zip(batch.keys, batch.images):
            assert torch.equal(row_D, torch.from_numpy(rows()[int(key)]))
            seen += 1
        assert batch.rsa.eligible.tolist() == [int(rsa)] * 2
    assert seen == 10


def test_the_same_bytes_twice(tmp_path):
    write(tmp_path / "a"), write(tmp_path / "b")
    for path in (tmp_path / "a").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_conversation_gets_one_image_token_and_keeps_its_own():
    assert make_embedding_info("k", record(1), "").conversations == record(1)["conversations"]
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "A boat."},
    ]
    info = make_embedding_info("k", {"messages": turns}, "")
    assert info.id == "k" and [turn["value"] for turn in info.conversations] == [
        "Be kind.",
        "<image>\nWhat?",
        "A boat.",
    ]
    info = make_embedding_info("c.txt, line 1", None, "A boat.")
    assert info.id == "c.txt, line 1" and info.conversations[1] == {"from": "gpt", "value": "A boat."}
    assert info.conversations[0]["value"].startswith("<image>\n")
    assert (
        make_embedding_info("k", record(1) | {"id": 7}, "", by_id=True).key == "7"
        and make_embedding_info("k", record(1), "").key == "k"
    )
    with pytest.raises(Unusable, match="its text has 2 <image>"):
        make_embedding_info("k", record(1, "<image><image>?"), "")
    with pytest.raises(Unusable, match="no conversations"):
        make_embedding_info("k", {"id": 1}, "")


def nothing_written(folder):
    return not [path for path in folder.iterdir()]


def test_a_sample_without_an_embedding_ends_it_and_leaves_nothing(tmp_path):
    infos = [make_embedding_info(f"lost {number}", record(number), "") for number in range(7)]
    with pytest.raises(
        ValueError, match=r"^7 keys \(lost 0, lost 1, lost 2, lost 3, lost 4, ...\) have no embedding, of 19 samples;"
    ):
        write(tmp_path / "out", parts(train=[*parts()["train"], *infos]))
    with pytest.raises(ValueError, match=r"^1 key \(val-00000.tar/000011\) has no embedding"):
        write(tmp_path / "out", keys=KEYS[:-1])
    assert nothing_written(tmp_path)


def test_doubled_keys_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^2 keys \(a, b\) have more than one embedding"):
        EmbeddingTable(["a", "b", "a", "c", "b", "a"], rows()[:6])
    with pytest.raises(ValueError, match="3 keys for 4 embeddings"):
        EmbeddingTable(["a", "b", "c"], rows()[:4])
    with pytest.raises(
        ValueError, match=r"^1 key \(train-00000.tar/000003\) has more than one sample, which would share"
    ):
        write(tmp_path / "out", parts(val=[make_embedding_info(KEYS[3], record(3), "")]))
    with pytest.raises(ValueError, match="no samples to write"):
        write(tmp_path / "out", {"train": []})
    assert nothing_written(tmp_path)


def test_what_is_there_is_not_written_over(tmp_path):
    write(tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="out already exists: name another --out"):
        write(tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before
    (tmp_path / "two.unfinished").mkdir()
    (tmp_path / "two.unfinished" / "train-00007.tar").write_bytes(b"of a run that was killed")
    write(tmp_path / "two")
    assert not list(tmp_path.glob("two*/train-00007.tar"))


def test_numpys_format_holds_no_pickle():
    assert numpy.array_equal(numpy.load(io.BytesIO(as_npy(rows()[3])), allow_pickle=False), rows()[3])
    with pytest.raises(ValueError):
        as_npy(numpy.array([{}]))
