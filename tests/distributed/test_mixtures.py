"""Mixtures give each source its share, an epoch each sample once, and both go on exactly where they stopped."""

import collections
import copy
import itertools
import json
import math
import os
import re
from pathlib import Path

import pytest
import yaml
from megatron.energon import DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset
from megatron.energon.flavors.jsonl.jsonl_prepare import JsonlPreparator
from PIL import Image

from rsa_megatron.cli import data
from rsa_megatron.data.dataset_checks import check_data, fingerprint
from rsa_megatron.data.epoch_length import count_epoch_iterations
from rsa_megatron.data.leaves import PreparedLeaves
from rsa_megatron.data.loaders import TrainLoader
from rsa_megatron.data.task_encoder import LlavaTaskEncoder
from tests.support import broken_data, processes, tars
from tests.support.environment import ROOT
from tests.support.train_loaders import make_encoder, save

KINDS = {"captions": True, "words": False, "texts": False, "questions": False}


def write_mixture(path: Path, blend: list[dict], *, epochized=False) -> str:
    mixture = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
    mixture["splits"] = {"train": {"blend_epochized" if epochized else "blend": blend}}
    path.write_text(yaml.safe_dump(mixture))
    return str(path)


def source(demo, kind, **more):
    return {"path": str(demo / "data" / kind), "subflavors": {"rsa": KINDS[kind]}, **more}


class Keys(DefaultTaskEncoder):
    """Takes samples for their keys and flags alone."""

    cookers = LlavaTaskEncoder.cookers
    decoder = None

    def batch(self, samples):
        return [(sample.__key__, sample.__subflavors__["rsa"]) for sample in samples]


def test_shares_are_those_of_the_weights(demo, tmp_path):
    """20,000 samples of the demo's stage 1.5, whose weights are 6, 2 and 2 of 10."""
    mixture = demo / "data" / "stage1_5.yaml"
    dataset = get_train_dataset(
        str(mixture),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0, seed_offset=3),
        batch_size=200,
        shuffle_buffer_size=100,
        max_samples_per_sequence=None,
        task_encoder=Keys(),
    )
    batches = iter(get_loader(dataset))
    counts = collections.Counter(key.split("-")[0] for _ in range(100) for key, _ in next(batches))
    assert sum(counts.values()) == 20_000
    weights = {"captions": 0.6, "words": 0.2, "texts": 0.2}
    assert set(counts) == set(weights)
    for kind, share in weights.items():
        three_errors = 3 * math.sqrt(20_000 * share * (1 - share))
        assert abs(counts[kind] - 20_000 * share) < three_errors
        # A share off by two hundredths would be seen.
        assert abs(counts[kind] - 20_000 * (share + 0.02)) > three_errors / 3


def test_the_flag_of_a_mixture_overrides_that_of_its_data_sets(demo, tmp_path):
    path = write_mixture(tmp_path / "m.yaml", [source(demo, "captions", weight=1) | {"subflavors": {"rsa": False}}])
    loader = TrainLoader(path, make_encoder(demo), WorkerConfig(rank=0, world_size=1, num_workers=0), 8, 1)
    assert not any(next(loader).rsa.eligible)


@pytest.fixture(scope="module")
def linked(demo, tmp_path_factory):
    """Images in a folder and a JSONL beside them, of which 5 of 45 train samples have no image, and three are of two."""
    folder = tmp_path_factory.mktemp("linked")
    with (folder / "data.jsonl").open("w") as file:
        for index in range(45):
            images = [] if index % 9 == 4 else [f"{index}.png"] * (2 if index % 15 == 7 else 1)
            for name in images:
                Image.new("RGB", (30 + index, 40), (index, 9, 9)).save(folder / name)
            turns = [
                {"from": "human", "value": "<image>\n" * len(images) + "what?"},
                {"from": "gpt", "value": f"number {index}"},
            ]
            file.write(json.dumps({"id": str(index), "image": images, "conversations": turns}) + "\n")
    data.main(["link", str(folder / "data.jsonl"), "--out", str(folder / "out"), "--rsa", "--val", "0"])
    return str(folder / "out" / "mixture.yaml")


@pytest.fixture(scope="module")
def epochized(demo, linked, tmp_path_factory):
    """Each kind of sample: of tars and of a JSONL, one image, several, none; one data set half, one one and a half times."""
    blend = [
        source(demo, "captions", repetitions=1, subset={"range": ["0%", "50%"]}),
        source(demo, "texts", repetitions=1.5),
        source(demo, "questions", repetitions=1),
        {"path": linked, "repetitions": 1},
    ]
    # Energon takes a mixture of one kind within another of the same kind.
    path = Path(linked)
    content = yaml.safe_load(path.read_text())
    inner = content["splits"]["train"]
    blend[-1] = inner | {"path": str(path.parent / inner["path"]), "repetitions": 1}
    return write_mixture(tmp_path_factory.mktemp("epochized") / "m.yaml", blend, epochized=True)


def one_epoch(demo, path, *, micro_batch_size, world_size, num_workers, drop_last=False, global_batch_size):
    """Batches of each rank in as many iterations as there are said to be."""
    layout = dict(num_workers=num_workers, micro_batch_size=micro_batch_size, drop_last=drop_last)
    iterations = count_epoch_iterations(
        path, data_parallel_size=world_size, global_batch_size=global_batch_size, **layout
    )
    ranks = []
    for rank in range(world_size):
        encoder = make_encoder(demo)
        config = WorkerConfig(rank=rank, world_size=world_size, num_workers=num_workers, seed_offset=5)
        loader = processes.kept(
            TrainLoader(path, encoder, config, micro_batch_size, 20, one_epoch=True, drop_last=drop_last)
        )
        count = iterations * global_batch_size // (micro_batch_size * world_size)
        ranks.append([(batch.keys, batch.loss_mask.sum(1).tolist()) for batch in (next(loader) for _ in range(count))])
        # Beyond the end there is nothing, for ever.
        if not drop_last:
            assert all(next(loader).keys == [""] * micro_batch_size for _ in range(3))
    return iterations, ranks


LAYOUTS = [(4, 1, 0, 8), (4, 2, 0, 8), (4, 3, 0, 24), (4, 2, 1, 16), (4, 2, 2, 8), (1, 5, 0, 5), (64, 2, 0, 128)]


@pytest.mark.parametrize("micro_batch_size, world_size, num_workers, global_batch_size", LAYOUTS)
def test_each_sample_of_an_epoch_is_seen_once(
    demo, epochized, micro_batch_size, world_size, num_workers, global_batch_size
):
    layout = dict(
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        num_workers=num_workers,
        global_batch_size=global_batch_size,
    )
    if num_workers:  # data workers are forked from a process without threads
        ((iterations, ranks),) = processes.run(one_epoch_of, 1, demo, epochized, layout)
    else:
        iterations, ranks = one_epoch(demo, epochized, **layout)
    seen = collections.Counter(key for rank in ranks for keys, _ in rank for key in keys if key)
    # A rank takes its half of the 240 texts a second time, rounded down for each reader.
    num_twice = sum(count == 2 for key, count in seen.items() if key.startswith("texts"))
    readers = world_size * max(1, num_workers)
    assert 120 - readers <= num_twice <= 120 and num_twice == sum(count - 1 for count in seen.values())
    kinds = collections.Counter(key.split("-")[0] if "-" in key else "linked" for key in seen)
    assert kinds == {"captions": 120, "texts": 240, "questions": 240, "linked": 45}
    # The last iteration has something in it.
    per_iteration = global_batch_size // (micro_batch_size * world_size)
    assert any(key for rank in ranks for keys, _ in rank[-per_iteration:] for key in keys)
    assert iterations * global_batch_size >= sum(seen.values())


def one_epoch_of(demo, path, layout):
    return one_epoch(demo, path, **layout)


@pytest.mark.parametrize("micro_batch_size, world_size, global_batch_size", [(4, 1, 8), (4, 3, 24), (64, 2, 128)])
def test_the_last_partial_batch_can_be_dropped(demo, epochized, micro_batch_size, world_size, global_batch_size):
    layout = dict(
        micro_batch_size=micro_batch_size, world_size=world_size, num_workers=0, global_batch_size=global_batch_size
    )
    iterations, ranks = one_epoch(demo, epochized, drop_last=True, **layout)
    keys = [key for rank in ranks for keys, _ in rank for key in keys]
    assert "" not in keys and len(keys) == iterations * global_batch_size
    assert 765 - world_size * micro_batch_size - global_batch_size < len(keys) <= 765


def test_unusable_samples_keep_their_place_in_an_epoch(demo, tmp_path):
    broken_data.write(tmp_path / "data")
    _, (batches,) = one_epoch(
        demo, str(tmp_path / "data"), micro_batch_size=4, world_size=1, num_workers=0, global_batch_size=8
    )
    learnt = {key: targets > 0 for keys, row in batches for key, targets in zip(keys, row) if key}
    assert sorted(key for key, is_learnt in learnt.items() if not is_learnt) == sorted(broken_data.REASONS)
    assert sum(learnt.values()) == len(learnt) - len(broken_data.REASONS) >= 40


@pytest.mark.parametrize("name, num_sets, flagged", [("stage1", 1, 1), ("stage1_5", 7, 3), ("stage2", 84, 0)])
def test_the_papers_mixtures_are_read(demo, tmp_path, name, num_sets, flagged):
    """Each source by its name, here a link to the same demo data of 240 samples."""
    mixture = tmp_path / f"{name}.yaml"
    mixture.write_text((ROOT / "examples" / "mixtures" / f"{name}.yaml").read_text())
    sources = yaml.safe_load(mixture.read_text())["splits"]["train"]["blend_epochized"]
    for each in [*sources, {"path": "LLaVA-ReCap-558K"}]:
        link = tmp_path / each["path"]
        link.parent.mkdir(exist_ok=True)
        if not link.exists():
            link.symlink_to(demo / "data" / "questions")
    check_data(str(mixture), ["train", "val"], num_readers=1, micro_batch_size=4)
    layout = dict(data_parallel_size=1, num_workers=0, micro_batch_size=1, global_batch_size=1, drop_last=False)
    shares = [int(each.get("subset", {"range": ["0%", "100%"]})["range"][1].rstrip("%")) for each in sources]
    assert len(sources) == num_sets and shares.count(100) >= num_sets - 19
    assert count_epoch_iterations(str(mixture), **layout) == sum(240 * share // 100 for share in shares)
    assert sum(each.get("subflavors", {}).get("rsa", False) for each in sources) == flagged
    batch = next(TrainLoader(str(mixture), make_encoder(demo), WorkerConfig(rank=0, world_size=1, num_workers=0), 8, 1))
    assert batch.tokens.shape[0] == 8


def test_a_blend_by_weight_has_no_epoch(demo):
    layout = dict(data_parallel_size=1, num_workers=0, micro_batch_size=4, global_batch_size=8, drop_last=False)
    with pytest.raises(
        ValueError, match="stage1_5.yaml: a blend by weight has no end: set --train-iters, or .*blend_epochized"
    ):
        count_epoch_iterations(str(demo / "data" / "stage1_5.yaml"), **layout)


@pytest.mark.parametrize("one_epoch", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_mixture_goes_on_exactly(demo, epochized, tmp_path, one_epoch, num_workers):
    (runs,) = processes.run(interrupted, 1, demo, epochized, tmp_path / "state.pt", one_epoch, num_workers)
    for expected, restored in runs:
        assert restored == expected
    assert runs[0][0] != runs[1][0] and {key for keys in runs[0][0] for key in keys}


def begins_anew():
    from rsa_megatron.data import single_epoch

    single_epoch._OnePass.__iter__ = lambda self: iter(self.dataset)


def test_a_data_set_that_begins_anew_would_be_seen(demo, epochized, tmp_path):
    (runs,) = processes.run(interrupted, 1, demo, epochized, tmp_path / "state.pt", True, 0, begins_anew)
    assert [restored == expected for expected, restored in runs] == [True, False, True]


STOPS = (10, 185, 195)  # of an epoch's 192 batches: in the middle, while the shuffle buffer is emptied, and after it


def interrupted(demo, path, state, one_epoch, num_workers, sabotage=None):
    """[what comes, what comes after a restore] at each stop."""
    if sabotage:
        sabotage()

    def loader():
        config = WorkerConfig(rank=0, world_size=1, num_workers=num_workers, seed_offset=5)
        return processes.kept(TrainLoader(path, make_encoder(demo), config, 4, 100, one_epoch=one_epoch))

    first, keys = loader(), []
    for count in range(STOPS[-1] + 30):
        if count in STOPS:
            save(first, state.with_name(f"{count}.pt"))
        keys.append(next(first).keys)
    runs = []
    for stop in STOPS:
        restored = loader()
        restored.restore_state(state.with_name(f"{stop}.pt"))
        runs.append([keys[stop : stop + 30], [next(restored).keys for _ in range(30)]])
    return runs


def read_in_turn(demo, path, *, num_workers=0, shuffle_buffer_size=1, count=120):
    """Keys by the name that the mixture gives each data set, in the order of reading."""
    config = WorkerConfig(rank=0, world_size=1, num_workers=num_workers, seed_offset=5)
    dataset = get_train_dataset(
        path,
        worker_config=config,
        batch_size=1,
        shuffle_buffer_size=shuffle_buffer_size,
        max_samples_per_sequence=None,
        task_encoder=Names(),
    )
    found, batches = collections.defaultdict(list), iter(get_loader(dataset))
    for _ in range(count):
        ((key, name),) = next(batches)
        found[name].append(key)
    return found


class Names(PreparedLeaves, DefaultTaskEncoder):
    cookers = LlavaTaskEncoder.cookers
    decoder = None

    def batch(self, samples):
        return [(sample.__key__, sample.__subflavors__["name"]) for sample in samples]


@pytest.mark.parametrize("shuffle_buffer_size", [1, 2, 50])
def test_a_data_set_that_a_mixture_names_again_comes_in_another_order(demo, linked, tmp_path, shuffle_buffer_size):
    inner = yaml.safe_load(Path(linked).read_text())["splits"]["train"]
    for path, aux in (
        (str(demo / "data" / "captions"), {}),
        (str(Path(linked).parent / inner["path"]), {"aux": inner["aux"]}),
    ):
        blend = [{"path": path, "weight": 1, "subflavors": {"name": name}, **copy.deepcopy(aux)} for name in "abc"]
        found = read_in_turn(demo, write_mixture(tmp_path / "m.yaml", blend), shuffle_buffer_size=shuffle_buffer_size)
        orders = [found[name][:20] for name in "abc"]
        for first, other in itertools.combinations(orders, 2):
            # Of one order those of small buffers would differ by a few places: this counts keys with the same neighbour.
            assert sum(pair in set(itertools.pairwise(first)) for pair in itertools.pairwise(other)) < 8
        # The first keeps the order that it has alone, and each gives each sample once.
        if shuffle_buffer_size == 1:
            alone = read_in_turn(demo, write_mixture(tmp_path / "one.yaml", blend[:1]), shuffle_buffer_size=1)
            assert orders[0] == alone["a"][:20]
            assert all(len(set(order)) == 20 for order in orders)


def test_the_position_of_a_data_set_named_twice_is_exact_and_its_own(demo, tmp_path):
    blend = [source(demo, "captions", weight=1), source(demo, "captions", weight=1)]
    path = write_mixture(tmp_path / "m.yaml", blend)
    config = WorkerConfig(rank=0, world_size=1, num_workers=0, seed_offset=5)
    first, restored = (TrainLoader(path, make_encoder(demo), config, 4, 1) for _ in range(2))
    for _ in range(30):
        next(first)
    save(first, tmp_path / "state.pt")
    restored.restore_state(tmp_path / "state.pt")
    assert [next(first).keys for _ in range(150)] == [
        next(restored).keys for _ in range(150)
    ]  # beyond an epoch of each
    assert fingerprint(path) != fingerprint(
        write_mixture(tmp_path / "other.yaml", [blend[0], source(demo, "words", weight=1)])
    )


def test_a_position_of_other_weights_is_refused(demo, tmp_path):
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    paths = [
        write_mixture(
            tmp_path / f"{weight}.yaml", [source(demo, "captions", weight=weight), source(demo, "texts", weight=1)]
        )
        for weight in (1, 2)
    ]
    first, other = (TrainLoader(path, make_encoder(demo), config, 4, 1) for path in paths)
    save(first, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="its shards are others than when|the run that is resumed has read"):
        other.restore_state(tmp_path / "state.pt")


def test_a_pass_in_another_number_of_iterations_is_refused(demo, epochized, tmp_path):
    """As after another --global-batch-size: the iteration of the checkpoint would mean other samples."""
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    first, other = (TrainLoader(epochized, make_encoder(demo), config, 4, 1, one_epoch=count) for count in (96, 48))
    save(first, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="iterations of a single pass .*--global-batch-size.* = 96, this run has 48"):
        other.restore_state(tmp_path / "state.pt")


TINY = {"subset": {"range": [0, 3]}}


@pytest.mark.parametrize(
    "entries, epochized, num_readers, message",
    [
        ([{}, {"subset": {"range": [0, 0]}}], False, 1, "captions has no sample in its split train: leave it out"),
        ([{}, {"subset": {"range": [0, 0]}}], True, 1, "captions has no sample in its split train: leave it out"),
        (
            [{}, TINY],
            False,
            4,
            "captions has 3 samples in its split train, fewer than the 4 data workers .* lower --num-workers",
        ),
        ([TINY], True, 4, "m.yaml: 3 samples in its split train are fewer than the 4 data workers"),
        ([{}, TINY], True, 4, None),  # of a pass each reader has its share of all
        ([{}, TINY], False, 3, None),
    ],
)
def test_fewer_samples_than_readers_are_named_before_training(demo, tmp_path, entries, epochized, num_readers, message):
    path = write_mixture(
        tmp_path / "m.yaml", [source(demo, "captions", **entry) for entry in entries], epochized=epochized
    )
    if message is None:
        return check_data(path, ["train"], num_readers=num_readers, micro_batch_size=4)
    with pytest.raises(ValueError, match=message):
        check_data(path, ["train"], num_readers=num_readers, micro_batch_size=4)


def test_a_data_set_without_samples_is_named_before_training(demo, tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A boat."}]
    folder = tars.write(tmp_path / "tiny", {"a": {"json": json.dumps({"conversations": turns}).encode()}})
    for split, message in (
        ("train", "tiny: 1 samples in its split train are fewer than the 2 data workers"),
        ("val", "tiny: the 1 samples of its validation split"),
    ):
        with pytest.raises(ValueError, match=message):
            check_data(str(folder), [split], num_readers=2, micro_batch_size=4)
    # A split that has no shard, in the midst of others.
    parts = folder / ".nv-meta" / "split.yaml"
    parts.write_text(parts.read_text().replace("\n  - train-00000.tar", " []"))
    path = write_mixture(tmp_path / "m.yaml", [source(demo, "captions"), {"path": str(folder)}])
    with pytest.raises(
        ValueError, match="m.yaml, split 'train': .*tiny: No shards found in split part 'train'; leave it out"
    ):
        check_data(path, ["train"], num_readers=1, micro_batch_size=4)


def test_linked_data_is_checked_like_shards(linked, epochized):
    with pytest.raises(ValueError, match="split 'val'"):
        check_data(linked, ["train", "val"], num_readers=1, micro_batch_size=4)
    check_data(linked, ["train"], num_readers=1, micro_batch_size=4)
    assert fingerprint(linked) != fingerprint(epochized)


def test_a_linked_image_outside_its_folder_or_gone_is_named(demo, linked, tmp_path, caplog):
    folder = Path(linked).parent.parent
    Image.new("RGB", (30, 30)).save(tmp_path / "outside.png")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    names = [
        "0.png",
        "gone.png",
        str(tmp_path / "outside.png"),
        "../0.png",
        "1.png",
        5,
        "pipe.png",
        "link.png",
        [7],
        "0.png",
    ]
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"image": name, "conversations": turns}) + "\n" for name in names)
    )
    JsonlPreparator.prepare_dataset(tmp_path / "train.jsonl")
    aux = {"images": f"filesystem://{folder}"}
    path = write_mixture(tmp_path / "m.yaml", [{"path": "train.jsonl", "repetitions": 1, "aux": aux}], epochized=True)
    _, (batches,) = one_epoch(demo, path, micro_batch_size=5, world_size=1, num_workers=0, global_batch_size=5)
    learnt = {key for keys, row in batches for key, targets in zip(keys, row) if targets}
    # 7: a link that lies in the folder is followed
    assert learnt == {"train.jsonl/0", "train.jsonl/4", "train.jsonl/7", "train.jsonl/9"} and len(batches) == 2
    for line in (
        "train.jsonl/1 .*gone.png is not a file",
        "train.jsonl/2 .*outside.png leads out",
        "train.jsonl/3 .*0.png leads out",
        "train.jsonl/5 .*its image is a int; it must",
        "train.jsonl/6 .*pipe.png is not a file",
        "train.jsonl/8 .*its image is a int; it must",
    ):
        assert re.search(f"skipped sample {line}", caplog.text)
