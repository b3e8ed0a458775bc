"""Packed rows from Energon: resumed to the bit wherever they stop, each sample of a pass once, in the number of rows that was said."""

import collections
import dataclasses
import hashlib
import json
import logging
import random
import re
from pathlib import Path

import pytest
import yaml
from megatron.energon import WorkerConfig
from PIL import Image
from transformers import AutoTokenizer

from rsa_megatron.cli import data
from rsa_megatron.data.loaders import TrainLoader, ValidationLoader
from rsa_megatron.data.packed_epoch import count_epoch_rows
from rsa_megatron.data.packed_task_encoder import PackingTaskEncoder
from tests.support import broken_data, processes
from tests.support.train_loaders import make_encoder as make_single_encoder
from tests.support.train_loaders import save

ROW, BUFFER, SHUFFLED = 300, 40, 20


def make_encoder(demo, row_length=ROW, **more):
    settings = dict(
        max_tiles_per_row=75,
        image_size=28,
        patch_size=14,
        template="plain",
        image_aspect_ratio="square",
        grid_pinpoints=[],
        max_tiles=1,
    )
    tokenizer = AutoTokenizer.from_pretrained(demo / "tokenizer")
    return PackingTaskEncoder(tokenizer, max_sequence_length=row_length, row_length=row_length, **settings | more)


def make_loader(demo, path, *, num_workers=0, rank=0, world_size=1, buffer=BUFFER, encoder=None, **more):
    config = WorkerConfig(rank=rank, world_size=world_size, num_workers=num_workers, seed_offset=5)
    encoder = encoder or make_encoder(demo)
    return processes.kept(TrainLoader(str(path), encoder, config, 1, SHUFFLED, packing_buffer_size=buffer, **more))


@pytest.fixture(scope="module")
def epochized(demo, tmp_path_factory):
    """Captions, texts of which half come twice, and questions: 252 samples."""
    kinds = {"captions": 1, "texts": 1.5, "questions": 1}
    blend = [
        {"path": str(demo / "data" / kind), "subset": {"range": ["0%", "30%"]}, "repetitions": repetitions}
        for kind, repetitions in kinds.items()
    ]
    mixture = {
        "__module__": "megatron.energon",
        "__class__": "MetadatasetV2",
        "splits": {"train": {"blend_epochized": blend}},
    }
    path = tmp_path_factory.mktemp("packed") / "m.yaml"
    path.write_text(yaml.safe_dump(mixture))
    return str(path)


def digest(row) -> str:
    """Of all that a row holds, to the bit."""
    found = hashlib.sha256(repr((row.keys, row.records, row.num_skipped, row.num_truncated)).encode())
    rsa = [getattr(row.rsa, field.name) for field in dataclasses.fields(row.rsa) if field.name != "captions_are_copies"]
    lengths = [] if row.sequence_lengths is None else [row.sequence_lengths]
    for tensor in (
        row.tokens,
        row.labels,
        row.loss_mask,
        row.images,
        row.image_layouts,
        row.row_lengths,
        *rsa,
        *lengths,
    ):
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def interrupted(demo, path, folder, num_workers, one_epoch, stops, sabotage=None):
    """[what comes, what comes after a restore] at each stop."""
    if sabotage:
        sabotage()
    first, rows = make_loader(demo, path, num_workers=num_workers, one_epoch=one_epoch), []
    for count in range(max(stops) + 15):
        if count in stops:
            save(first, Path(folder, f"{count}.pt"))
        rows.append(digest(next(first)))
    runs = []
    for stop in stops:
        restored = make_loader(demo, path, num_workers=num_workers, one_epoch=one_epoch)
        restored.restore_state(Path(folder, f"{stop}.pt"))
        runs.append([rows[stop : stop + 15], [digest(next(restored)) for _ in range(15)]])
    return runs


# Of 39 rows or so the last are those of buffers that are not full any more: one of each data worker, flushed in the end.
@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("kind", ["pass", "blend"])
def test_rows_go_on_to_the_bit_wherever_they_stop(demo, epochized, tmp_path, num_workers, kind):
    rng = random.Random(num_workers)
    stops = sorted({1, *rng.sample(range(2, 30), 2), *(rng.sample(range(32, 40), 2) if kind == "pass" else ())})
    path = epochized if kind == "pass" else str(demo / "data" / "stage1_5.yaml")
    ((runs),) = processes.run(interrupted, 1, demo, path, tmp_path, num_workers, kind == "pass", stops)
    for stop, (expected, restored) in zip(stops, runs):
        assert restored == expected, stop
    assert len({row for expected, _ in runs for row in expected}) > 15


def begins_anew():
    from rsa_megatron.data import single_epoch

    single_epoch._OnePass.__iter__ = lambda self: iter(self.dataset)


def test_a_pass_that_begins_anew_while_its_buffer_is_emptied_would_be_seen(demo, epochized, tmp_path):
    (runs,) = processes.run(interrupted, 1, demo, epochized, tmp_path, 0, True, [10, 36], begins_anew)
    assert [restored == expected for expected, restored in runs] == [True, False]


@pytest.mark.parametrize("world_size, num_workers", [(1, 0), (3, 0), (2, 2)])
def test_a_pass_has_each_sample_once_in_as_many_rows_as_were_counted(demo, epochized, world_size, num_workers):
    ((said, ranks, output),) = processes.run(one_pass, 1, demo, epochized, world_size, num_workers)
    assert said.is_exact and said.num_samples == 252
    seen = collections.Counter(key for rows in ranks for keys in rows for key in keys if key)
    num_twice = sum(count == 2 for key, count in seen.items() if key.startswith("texts"))
    assert num_twice == sum(count - 1 for count in seen.values()) and 36 - 4 <= num_twice <= 36
    assert collections.Counter(key.split("-")[0] for key in seen) == dict.fromkeys(
        ("captions", "texts", "questions"), 72
    )
    # The rank with the most rows has as many, and none has one more.
    num_rows = [sum(keys != [""] for keys in rows) for rows in ranks]
    assert max(num_rows) == said.of_rank and all(rows[said.of_rank :] == [[""]] * 3 for rows in ranks)
    assert said.samples_per_row == pytest.approx(sum(seen.values()) / sum(num_rows))
    assert "Filling" not in output  # Energon's bar of each data worker


def one_pass(demo, path, world_size, num_workers):
    layout = dict(data_parallel_size=world_size, num_workers=num_workers, packing_buffer_size=BUFFER)
    said = count_epoch_rows(path, make_encoder(demo), shuffle_buffer_size=SHUFFLED, seed=5, **layout)
    ranks = []
    for rank in range(world_size):
        loader = make_loader(
            demo, path, num_workers=num_workers, rank=rank, world_size=world_size, one_epoch=said.of_rank
        )
        ranks.append([next(loader).keys for _ in range(said.of_rank + 3)])
    return said, ranks, processes.output()


@pytest.mark.parametrize("world_size", [1, 3])
def test_of_a_large_split_the_rows_are_bounded_by_the_lengths_of_a_part(demo, epochized, world_size):
    layout = dict(data_parallel_size=world_size, num_workers=0, packing_buffer_size=BUFFER)
    layout |= dict(shuffle_buffer_size=SHUFFLED, seed=5)
    exact = count_epoch_rows(epochized, make_encoder(demo), **layout)
    bound = count_epoch_rows(epochized, make_encoder(demo), most_samples=80, **layout)
    assert not bound.is_exact and 80 <= bound.num_read < 130 and bound.num_samples == 252
    assert exact.of_rank <= bound.of_rank <= 1.8 * exact.of_rank
    assert bound.samples_per_row == pytest.approx(exact.samples_per_row, rel=0.2)


def test_a_pass_that_ends_before_its_data_says_so(demo, epochized, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    count = count_epoch_rows(
        epochized,
        make_encoder(demo),
        data_parallel_size=1,
        num_workers=0,
        packing_buffer_size=BUFFER,
        shuffle_buffer_size=SHUFFLED,
        seed=5,
    ).of_rank
    for last in (count, count - 1):
        loader = make_loader(demo, epochized, one_epoch=count, last_batch=last)
        for _ in range(last - 5):
            next(loader)
        save(loader, tmp_path / "state.pt")
        restored = make_loader(demo, epochized, one_epoch=count, last_batch=last)
        restored.restore_state(tmp_path / "state.pt")
        for _ in range(5):
            next(restored)
        assert ("ends before this rank has read all of it" in caplog.text) == (last < count)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(buffer=30), "--packing-buffer-size = 40, this run has 30; an exact resume is impossible"),
        (dict(buffer=0), "--packing-buffer-size = 40, this run has 0"),
        (dict(row_length=310), "--seq-length, a packed row's, = 300, this run has 310"),
        (dict(max_tiles_per_row=9), "--packing-max-tiles = 75, this run has 9"),
        (
            dict(copies_captions=True),
            r"copies of captions in the row \(--rsa-text-source caption\) = False, this run has True",
        ),
    ],
)
def test_another_packing_is_refused_with_the_remedy(demo, tmp_path, change, message):
    path = demo / "data" / "captions"
    loader = make_loader(demo, path)
    next(loader)
    save(loader, tmp_path / "state.pt")
    buffer = change.pop("buffer", BUFFER)
    encoder = make_encoder(demo, **change) if buffer else make_single_encoder(demo)
    other = make_loader(demo, path, buffer=buffer, encoder=encoder)
    with pytest.raises(ValueError, match=f"saved with {message}"):
        other.restore_state(tmp_path / "state.pt")


def test_bad_samples_are_counted_once_and_nothing_else_is_lost(demo, tmp_path, caplog):
    broken_data.write(tmp_path / "data")
    rows = []
    loader = make_loader(demo, tmp_path / "data", encoder=make_encoder(demo, 129), one_epoch=100)
    while (row := next(loader)).num_samples or row.num_skipped:
        rows.append(row)
    keys = [key for row in rows for key in row.keys if key]
    assert len(keys) == len(set(keys)) == 40 and sum(row.num_skipped for row in rows) == len(broken_data.REASONS)
    for key, reason in broken_data.REASONS.items():
        (line,) = {
            record.message
            for record in caplog.records
            if f"/{key} " in record.message or record.message.startswith(f"skipped sample {key} ")
        }
        assert reason.replace("128", "129") in line and str(tmp_path / "data") in line
    assert sum(row.num_truncated for row in rows) == 1


def test_a_picture_that_is_gone_after_a_restart_is_skipped(demo, tmp_path, caplog):
    """The files of a JSONL are read again for the buffer."""
    with (tmp_path / "data.jsonl").open("w") as file:
        for number in range(30):
            Image.new("RGB", (30, 40)).save(tmp_path / f"{number}.png")
            turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": f"number {number}"}]
            file.write(json.dumps({"image": f"{number}.png", "conversations": turns}) + "\n")
    data.main(["link", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out"), "--val", "0"])
    path = tmp_path / "out" / "mixture.yaml"
    loader = make_loader(demo, path, encoder=make_encoder(demo, 60), one_epoch=99)
    seen = len(next(loader).keys)
    save(loader, tmp_path / "state.pt")
    expected = [next(loader) for _ in range(20)]
    for row in expected[:2]:
        (tmp_path / row.records[0]["image"][0]).unlink()
    restored = make_loader(demo, path, encoder=make_encoder(demo, 60), one_epoch=99)
    restored.restore_state(tmp_path / "state.pt")
    found = [next(restored) for _ in range(20)]
    assert [row.keys for row in found] == [row.keys[number < 2 :] for number, row in enumerate(expected)]
    assert sum(row.num_skipped for row in found) == 2 and seen + sum(row.num_samples for row in found) == 28
    assert len(re.findall("skipped sample .*No such file|skipped sample .*is not a file", caplog.text)) == 2


def test_validation_is_not_packed(demo):
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    batch = next(ValidationLoader(str(demo / "data" / "captions"), make_single_encoder(demo), config, 8))
    assert batch.sequence_lengths is None and batch.num_samples == 8
