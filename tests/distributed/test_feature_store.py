"""Features come back as they were; a run that was killed ends with the same bytes; another manifest is refused by name."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from PIL import Image

from rsa_megatron.data.sources.pairs import CaptionedImage
from rsa_megatron.evaluation.extraction import extract
from rsa_megatron.evaluation.feature_store import FeatureStore

LAYERS = ["0", "1", "2"]
WIDTHS = {"0": 5, "1": 5, "2": 7}


class Numbers:
    """A backbone whose features are a function of the caption, and which is slow enough to be killed."""

    side, layers, num_truncated = "text", LAYERS, 0
    identity = {"model": "numbers", "revision": "1", "pooling": "none"}

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.batches = seconds, []

    def prepare(self, pair):
        if "broken" in pair.caption:
            raise ValueError(f"{pair.key} is broken")
        return int(pair.caption)

    def features(self, batch):
        time.sleep(self.seconds)
        self.batches.append(len(batch))
        return {name: torch.stack([vector(number, name) for number in batch]) for name in LAYERS}


def vector(number: int, layer: str) -> torch.Tensor:
    return torch.randn(WIDTHS[layer], generator=torch.Generator().manual_seed(10 * number + int(layer)))


def pairs(count: int, broken: tuple = ()) -> list[CaptionedImage]:
    captions = ["broken" if number in broken else f"{number}" for number in range(count)]
    return [
        CaptionedImage(f"key {number}", caption, lambda: Image.new("RGB", (1, 1)))
        for number, caption in enumerate(captions)
    ]


def manifest(chosen, **changes) -> dict:
    keys = [pair.key for pair in chosen]
    return Numbers.identity | {"layers": LAYERS, "store_dtype": "float32", "keys": keys} | changes


def fill(folder, chosen, backbone=None, **options):
    store = FeatureStore.create(folder, manifest(chosen))
    extract(backbone or Numbers(), chosen, store, **{"batch_size": 4, "part_size": 10} | options)
    return store


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_read_is_what_was_written(tmp_path):
    chosen = pairs(25)
    fill(tmp_path / "store", chosen)
    store = FeatureStore.open(tmp_path / "store")
    assert store.keys == [pair.key for pair in chosen] and store.layers == LAYERS and not store.left_out
    assert store.manifest == manifest(chosen)
    for name in LAYERS:
        assert torch.equal(store.read_layer(name), torch.stack([vector(number, name) for number in range(25)]))
    assert sorted(files(tmp_path / "store")) == ["manifest.json", *(f"part-0000{n}.safetensors" for n in range(3))]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_what_is_finished_is_not_computed_again(tmp_path):
    fill(tmp_path / "store", pairs(9))
    again = Numbers()
    assert fill(tmp_path / "store", pairs(9), again).finished and not again.batches


def test_batches_stay_in_their_part(tmp_path):
    backbone = Numbers()
    fill(tmp_path / "store", pairs(25), backbone)
    assert backbone.batches == [4, 4, 2, 4, 4, 2, 4, 1]


def test_float16_is_rounded_and_refuses_what_it_cannot_hold(tmp_path):
    chosen = pairs(3)
    store = FeatureStore.create(tmp_path / "store", manifest(chosen, store_dtype="float16"))
    extract(Numbers(), chosen, store, batch_size=4)
    expected = torch.stack([vector(number, "2") for number in range(3)])
    assert torch.equal(store.read_layer("2"), expected.half().float()) and store.read_layer("2").dtype == torch.float32
    assert not torch.equal(store.read_layer("2"), expected)
    for value, message in (
        (7e4, "a feature of 7e[+]04, too large for torch.float16: pass --store-dtype float32"),
        (float("nan"), "a feature that is not finite"),
    ):
        large = FeatureStore.create(tmp_path / f"{value}", manifest(chosen, store_dtype="float16"))
        features = {name: torch.full((3, WIDTHS[name]), 1.0) for name in LAYERS}
        features["1"][2, 3] = value
        with pytest.raises(ValueError, match=f"layer 1 .*{message}"):
            large.append([pair.key for pair in chosen], features)
        assert not list(large.folder.glob("part-*"))


def test_what_cannot_be_prepared_is_left_out_and_named(tmp_path):
    chosen = pairs(25, broken=(0, 11, 12, *range(20, 25)))
    store = fill(tmp_path / "store", chosen)
    kept = [number for number in range(25) if number not in (0, 11, 12, *range(20, 25))]
    assert FeatureStore.open(tmp_path / "store").left_out == store.left_out
    assert store.left_out == {f"key {n}": f"key {n} is broken" for n in (0, 11, 12, *range(20, 25))}
    assert store.keys == [f"key {number}" for number in kept]
    assert torch.equal(store.read_layer("1"), torch.stack([vector(number, "1") for number in kept]))


def test_where_nothing_can_be_used_nothing_is_stored(tmp_path):
    with pytest.raises(ValueError, match="none of the first 10 pairs can be used; key 0: key 0 is broken"):
        fill(tmp_path / "nothing", pairs(25, broken=range(10)))
    assert not list(tmp_path.rglob("part-*")) and not (tmp_path / "nothing").exists()
    assert len(fill(tmp_path / "something", pairs(25, broken=range(9, 25))).keys) == 9
    store = FeatureStore.create(tmp_path / "by hand", manifest(pairs(1)))
    store.append([], {}, {"key 0": "broken"})
    with pytest.raises(ValueError, match="each of its 1 pairs was skipped"):
        store.read_layer("0")


def test_another_error_is_not_taken_for_a_broken_pair(tmp_path):
    backbone = Numbers()
    backbone.prepare = lambda pair: 1 // 0
    with pytest.raises(ZeroDivisionError):
        fill(tmp_path / "store", pairs(3), backbone)


def _write_slowly(folder, chosen):
    fill(folder, chosen, Numbers(seconds=0.02))


@pytest.mark.filterwarnings(
    "ignore:.*multi-threaded:DeprecationWarning"
)  # tqdm's thread, of other tests; not used here
def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(tmp_path):
    chosen = [CaptionedImage(f"key {n}", "broken" if n % 9 == 4 else f"{n}", None) for n in range(95)]
    fill(tmp_path / "whole", chosen)
    expected = files(tmp_path / "whole")
    kills = 0
    while not (tmp_path / "killed").exists():
        parts = len(list((tmp_path / "killed.unfinished").glob("part-?????.safetensors")))
        child = multiprocessing.get_context("fork").Process(target=_write_slowly, args=(tmp_path / "killed", chosen))
        child.start()
        while (
            child.is_alive() and len(list((tmp_path / "killed.unfinished").glob("part-?????.safetensors"))) < parts + 3
        ):
            time.sleep(0.005)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
    assert kills >= 2 and files(tmp_path / "killed") == expected
    assert not (tmp_path / "killed.unfinished").exists()


def test_what_a_kill_leaves_behind_is_not_taken_for_a_part(tmp_path):
    chosen = pairs(25)
    fill(tmp_path / "whole", chosen)
    store = FeatureStore.create(tmp_path / "store", manifest(chosen))
    backbone = Numbers()
    store.append([pair.key for pair in chosen[:10]], backbone.features(range(10)))
    (store.folder / "part-00001.safetensors.unfinished-123").write_bytes(b"half a part")
    del store
    with pytest.raises(ValueError, match="store.unfinished is not finished: rerun the command that writes it"):
        FeatureStore.open(tmp_path / "store")
    fill(tmp_path / "store", chosen)
    assert files(tmp_path / "store") == files(tmp_path / "whole")


@pytest.mark.parametrize("finished", [True, False])
def test_another_manifest_is_refused_by_what_differs(finished, tmp_path):
    chosen = pairs(12)
    if finished:
        fill(tmp_path / "store", chosen)
    else:
        FeatureStore.create(tmp_path / "store", manifest(chosen))
    name = "store" if finished else "store.unfinished"
    for changes, message in (
        ({"revision": "2"}, "revision 1, this run has 2"),
        ({"store_dtype": "float16"}, "store_dtype float32, this run has float16"),
        ({"seeds": [0]}, r"seeds null, this run has \[0\]"),
        ({"keys": ["other"]}, "keys .*, this run has"),
    ):
        with pytest.raises(
            ValueError, match=f"{name} has features with {message}.*name another --store, or remove"
        ) as error:
            FeatureStore.create(tmp_path / "store", manifest(chosen, **changes))
        assert "\n" not in str(error.value) and len(str(error.value)) < 500 + len(str(tmp_path))


def test_two_processes_do_not_write_one_store(tmp_path):
    first = FeatureStore.create(tmp_path / "store", manifest(pairs(2)))
    with pytest.raises(ValueError, match="is being written by another process"):
        FeatureStore.create(tmp_path / "store", manifest(pairs(2)))
    assert first.num_done == 0
    del first
    fill(tmp_path / "store", pairs(2))


def test_a_broken_store_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="missing holds no features"):
        FeatureStore.open(tmp_path / "missing")
    fill(tmp_path / "store", pairs(25))
    (tmp_path / "store" / "part-00002.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="part-00002.safetensors cannot be read .*; remove"):
        FeatureStore.open(tmp_path / "store")
    (tmp_path / "store" / "part-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks a part: it has 20 of 25 pairs"):
        FeatureStore.open(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="manifest.json cannot be read"):
        FeatureStore.open(tmp_path / "store")
