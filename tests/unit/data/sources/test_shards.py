"""Pairs of shards and mixtures are those that Energon reads, found without reading a tar."""

import io
import json
import pickle
import shutil

import pytest
import yaml
from PIL import Image

from rsa_megatron.cli.show_sample import stored_samples
from rsa_megatron.data.sources.open_pairs import open_pairs, sample
from tests.support.pictures import pack


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("packed"))


def as_energon_reads(path, split) -> list[tuple[str, int]]:
    """(caption, width) of the samples of one image, in order."""
    found = []
    for stored in stored_samples(path, split):
        record = stored.record if isinstance(stored.record, dict) else json.loads(stored.record)
        if len(stored.images) == 1:
            (data,) = stored.images.values()
            found.append((record["conversations"][-1]["value"], Image.open(io.BytesIO(data)).width))
    return found


def as_pairs(path, split) -> list[tuple[str, int]]:
    return [(pair.caption, pair.image().width) for pair in open_pairs(path, split=split)]


@pytest.mark.parametrize("split, num_samples", [("val", 12), ("train", 18)])
def test_shards_give_the_samples_of_one_image_that_energon_gives(packed, split, num_samples):
    expected = as_energon_reads(packed, split)
    assert as_pairs(packed, split) == expected and all(text == f"Number {width - 1}." for text, width in expected)
    pairs = open_pairs(packed, split=split)
    assert len(pairs) + pairs.left_out["that have no image, or several"] == num_samples and pairs.left_out.total() > 0
    assert len(list(packed.glob(f"{split}-*.tar"))) > 1 and pairs.keys[0].startswith(f"{split}-00000.tar/")


def test_the_demos_shards_and_mixtures(demo):
    expected = as_energon_reads(demo / "data" / "captions", "val")
    assert as_pairs(demo / "data" / "captions", "val") == expected and len(expected) == 64
    # Of all mixtures' data sets those that say rsa: false are left out.
    for mixture in (demo / "data").glob("stage*.yaml"):
        content = yaml.safe_load(mixture.read_text())
        pairs = open_pairs(mixture)
        assert all(key.startswith("captions/val-") for key in pairs.keys), content
        assert [pair.caption for pair in pairs] == [caption for caption, _ in expected]


def mixture(folder, val):
    path = folder / "mixture.yaml"
    content = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"val": val}}
    path.write_text(json.dumps(content))  # which is YAML
    return path


def test_a_mixture_concatenates_its_data_sets(packed, tmp_path):
    linked = pack(tmp_path, command="link")
    entry = yaml.safe_load(linked.read_text())["splits"]["val"]
    entry |= {"path": "link/val.jsonl", "weight": 5}
    other = {"path": str(packed), "split_part": "train", "weight": 1}
    left_out = {"path": str(packed), "weight": 1, "subflavors": {"rsa": False}}
    path = mixture(tmp_path, {"blend": [entry, other, left_out, other]})
    expected = as_energon_reads(linked, "val") + as_energon_reads(packed, "train")  # each once
    pairs = open_pairs(path)
    assert as_pairs(path, "val") == expected and len(set(pairs.keys)) == len(pairs)
    assert pairs.keys[0].startswith("link/val.jsonl, line ") and "packed" in pairs.keys[-1]
    assert [count for reason, count in pairs.left_out.items() if reason.endswith("which has rsa: false")] == [12]


def test_a_mixture_takes_subsets_and_leaves_excluded_samples(packed, tmp_path):
    path = mixture(tmp_path, {"path": str(packed), "subset": {"range": [3, 9]}})
    assert as_pairs(path, "val") == as_energon_reads(path, "val") and 0 < len(as_pairs(path, "val")) < 7
    again = pack(tmp_path)
    split = again / ".nv-meta" / "split.yaml"
    content = yaml.safe_load(split.read_text())
    gone = open_pairs(again).keys[1]
    split.write_text(yaml.safe_dump(content | {"exclude": [gone]}))
    assert open_pairs(again).keys == [key for key in open_pairs(packed).keys if key != gone]
    assert as_pairs(again, "val") == as_energon_reads(again, "val")


def test_opening_shards_reads_no_tar(packed, tmp_path, monkeypatch):
    """Their contents may even be gone; one pair needs its own two parts."""
    pairs = open_pairs(packed)
    read = []
    module = "rsa_megatron.data.sources.shards"
    monkeypatch.setattr(f"{module}._File.read", lambda part: read.append(part.name) or b"{}")
    assert len(open_pairs(packed)) == len(pairs) and read == []
    with pytest.raises(ValueError, match=r"val-00000.tar, json: it has no caption: "):
        pairs[0]
    assert read == ["json"]


@pytest.mark.parametrize(
    "what, message",
    [
        (
            "split",
            "captions, split 'test': Invalid split part: 'test'; name another --split, or data that has this one",
        ),
        ("--images", "--images .*: .*captions already specifies where its images are; drop the flag"),
        ("missing tar", "val-00000.tar is missing, which its index lists; restore the file"),
        ("broken index", "index.sqlite cannot be read: .*; run `energon prepare --force-overwrite"),
        ("lines without images", "val.jsonl has no images: add `aux: {images: filesystem://FOLDER}` to it"),
        ("missing data set", "split 'val': .*all of whose data sets exist"),
        ("no such path", "nowhere does not exist; name a folder of shards"),
        ("no images folder", "--images .*nowhere is not a folder"),
        ("empty folder", "needs images with a .txt beside each"),
        ("broken yaml", "mixture.yaml cannot be read"),
    ],
)
def test_shards_that_cannot_be_read_are_named(packed, tmp_path, what, message):
    folder, flags = tmp_path / "captions", {}
    shutil.copytree(packed, folder)
    if what == "split":
        flags["split"] = "test"
    elif what == "--images":
        flags["images"] = tmp_path
    elif what == "missing tar":
        (folder / "val-00000.tar").unlink()
    elif what == "broken index":
        (folder / ".nv-meta" / "index.sqlite").write_bytes(b"no database" * 100)
    elif what == "lines without images":
        folder = mixture(tmp_path, {"path": str(pack(tmp_path, command="link").parent / "val.jsonl")})
    elif what == "missing data set":
        folder = mixture(tmp_path, {"path": "nowhere"})
    elif what == "no such path":
        folder = tmp_path / "nowhere"
    elif what == "no images folder":
        flags["images"] = tmp_path / "nowhere"
    elif what == "empty folder":
        folder = tmp_path / "empty"
        folder.mkdir()
    else:
        folder = tmp_path / "mixture.yaml"
        folder.write_text("a: [")
    with pytest.raises(ValueError, match=message):
        open_pairs(folder, **flags)


def test_a_pair_can_be_sent_to_another_process(packed):
    pair = open_pairs(packed)[0]
    sent = pickle.loads(pickle.dumps(pair))
    assert sent.caption == pair.caption and sent.image().tobytes() == pair.image().tobytes()


def test_paths_may_be_relative(packed, monkeypatch):
    path = mixture(packed.parent, {"path": packed.name})
    expected = as_pairs(packed, "val")
    monkeypatch.chdir(packed.parent)
    assert as_pairs(packed.name, "val") == as_pairs(path.name, "val") == expected
    assert (
        open_pairs(path.name).keys
        == open_pairs(path).keys
        == [f"{packed.name}/{key}" for key in open_pairs(packed).keys]
    )


def test_a_sample_of_shards_passes_over_what_has_no_caption(tmp_path):
    folder = pack(tmp_path, records=20)
    tar = folder / "val-00000.tar"
    before = open_pairs(folder)
    width = len(sample(before, len(before), 0))
    # One record loses its answer's name, byte for byte: what Energon has indexed stays where it is.
    tar.write_bytes(tar.read_bytes().replace(b'"from": "gpt"', b'"from": "bob"', 1))
    pairs = open_pairs(folder)
    assert len(pairs) == len(before) == width
    assert len(sample(pairs, width - 1, 0)) == width - 1
    message = f"--num-samples {width}: only {width - 1} pairs of the split val have a caption; lower it, or name another --split; .*last error: .*val-00000.tar, json: it has no"
    with pytest.raises(ValueError, match=message):
        sample(pairs, width, 0)
