"""The position of the training data can be saved and taken up exactly; where it cannot, that is said."""

import contextlib
import functools
import json
import random
import re
from pathlib import Path

import numpy
import pytest
import torch
import webdataset
from megatron.energon import WorkerConfig, stateless

from rsa_megatron.data import loaders
from rsa_megatron.data.dataset_checks import check_data
from rsa_megatron.data.loader_state import find_train_state
from rsa_megatron.data.loaders import TrainLoader, ValidationLoader, explain_unread_validation
from rsa_megatron.data.synthetic import data_sets
from rsa_megatron.data.task_encoder import LlavaTaskEncoder
from tests.support import broken_data
from tests.support.train_loaders import generator_states, keys, make_encoder, save, train_loader


@pytest.fixture(scope="module")
def encoder(demo):
    return make_encoder(demo)


def test_the_loaders_of_two_pipeline_stages_read_the_same(demo, encoder):
    first, last = train_loader(demo, encoder), train_loader(demo, encoder)
    assert keys(first, 30) == keys(last, 30)


def test_data_parallel_ranks_read_different_samples(demo, encoder):
    ranks = [train_loader(demo, encoder, rank=rank, world_size=2) for rank in range(2)]
    seen = [{key for batch in keys(loader, 20) for key in batch} for loader in ranks]
    assert not seen[0] & seen[1]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(world_size=2), r"data-parallel size .* = 1, this run has 2.*Set it back to 1, or pass --restart-data"),
        (dict(num_workers=2), "--num-workers = 0, this run has 2"),
        (dict(micro_batch_size=2), "--micro-batch-size = 4, this run has 2"),
        (dict(shuffle_buffer_size=3), "--shuffle-buffer-size = 20, this run has 3"),
        (
            dict(kind="questions"),
            r"^--data-path .*/questions: the run that is resumed has read .*/captions; set it back to .*/captions, or pass --restart-data",
        ),
    ],
)
def test_another_layout_is_refused_with_the_remedy(demo, encoder, tmp_path, change, message):
    loader = train_loader(demo, encoder)
    next(loader)
    save(loader, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=message):
        train_loader(demo, encoder, **change).restore_state(tmp_path / "state.pt")


@pytest.mark.parametrize(
    "known, message",
    [
        (True, "^--data-path .*/captions: its shards are others than when the run read them; restore them, or pass "),
        (False, r"has read other shards \(fingerprint of-before\); set it back, or pass --restart-data"),
    ],
    ids=["in the same folder", "of a version that kept no folder"],
)
def test_other_shards_are_refused_with_the_remedy(demo, encoder, tmp_path, known, message):
    loader = train_loader(demo, encoder)
    next(loader)
    save(loader, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    state["dataloader_state_dict"]["layout"]["data_fingerprint"] = "of-before"
    if not known:
        del state["dataloader_state_dict"]["data"]
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=message):
        train_loader(demo, encoder).restore_state(tmp_path / "state.pt")


def test_a_state_file_cannot_run_code(demo, encoder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code of a stranger",))

    torch.save({"dataloader_state_dict": Evil()}, tmp_path / "state.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        train_loader(demo, encoder).restore_state(tmp_path / "state.pt")


def test_state_files_are_found_whatever_the_model_parallel_layout(tmp_path):
    for folder in ("mp_rank_00", "mp_rank_00_000"):
        for rank in range(2):
            path = tmp_path / folder / "iter_0000010" / folder / f"train_dataloader_dprank{rank:03d}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            if rank == 1:
                assert find_train_state(tmp_path / folder, 10, 1, 2) == path
        with pytest.raises(FileNotFoundError, match="data-parallel size of 2, this run has 4.*--restart-data"):
            find_train_state(tmp_path / folder, 10, 0, 4)
        with pytest.raises(FileNotFoundError, match="no data position is saved for iteration 20; pass --restart-data"):
            find_train_state(tmp_path / folder, 20, 0, 2)


def test_validation_is_the_same_each_time_and_one_pass_ends(demo, encoder):
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    loaders = [ValidationLoader(str(demo / "data" / "captions"), encoder, config, 8) for _ in range(2)]
    one_pass = [batch.keys for batch in loaders[0].one_pass()]
    assert len(one_pass) == 8  # 64 samples
    assert [next(loaders[1]).keys for _ in range(16)] == one_pass * 2


@pytest.fixture
def gpu_generator(monkeypatch) -> torch.Generator:
    """A generator in the place of a GPU's."""
    generator = torch.Generator()
    stand_ins = dict(
        is_initialized=lambda: True,
        get_rng_state=lambda: generator.get_state(),
        set_rng_state=lambda state: generator.set_state(state),
        manual_seed_all=lambda seed: generator.manual_seed(seed),
    )
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return generator


def read_and_restore(demo, encoder, folder):
    """Do what a run does with its loaders; yields after each thing."""
    train = train_loader(demo, encoder)
    yield keys(train, 70)  # more than an epoch
    yield save(train, folder / "state.pt")
    restored = train_loader(demo, encoder)
    yield restored.restore_state(folder / "state.pt")
    yield next(restored)
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    validation = [ValidationLoader(str(demo / "data" / "captions"), encoder, config, 8) for _ in range(2)]
    yield [next(validation[0]) for _ in range(9)]  # more than the split
    yield list(validation[1].one_pass())


class DrawingEncoder(LlavaTaskEncoder):
    """As one that cuts images at random."""

    @stateless(restore_seeds=True)
    def encode_sample(self, sample):
        torch.rand(1), numpy.random.rand(), random.random()
        return super().encode_sample(sample)


def test_reading_leaves_random_generators_as_they_were(demo, tmp_path, gpu_generator, monkeypatch):
    encoder = make_encoder(demo, DrawingEncoder)

    def states():
        return generator_states(), gpu_generator.get_state().tolist()

    before = states()
    for _ in read_and_restore(demo, encoder, tmp_path):
        assert states() == before
    # Else torch draws from its generator on the CPU, and Energon seeds the GPU's.
    monkeypatch.setattr(loaders, "keep_generators", contextlib.nullcontext)
    keys(train_loader(demo, encoder), 1)
    assert all(after != then for after, then in zip(states(), before))


def test_each_evaluation_begins_anew(demo, encoder):
    def loader(**more):
        config = WorkerConfig(rank=0, world_size=1, num_workers=0)
        return ValidationLoader(str(demo / "data" / "captions"), encoder, config, 8, **more)

    one_pass = [batch.keys for batch in loader().one_pass()]
    assert len(one_pass) == 8
    # Shorter than the split, and longer.
    assert keys(loader(batches_per_evaluation=3), 9) == one_pass[:3] * 3
    assert keys(loader(batches_per_evaluation=9), 11) == one_pass + one_pass[:1] + one_pass[:2]


def test_validation_samples_that_are_never_read_are_counted(demo):
    layout = dict(data_parallel_size=2, num_workers=2, micro_batch_size=5)
    say = functools.partial(explain_unread_validation, str(demo / "data" / "captions"), **layout)
    # 16 samples each of four workers: three micro-batches of 5, and one sample left.
    assert re.search(
        r"captions: an evaluation reads 60 of the 64 samples of the split val, each time the same; never read: 4 that do not fill a "
        r"micro-batch of 5 in their data worker$",
        say(micro_batches=6),
    )
    assert say(micro_batches=4).endswith(
        "reads 40 of the 64 samples of the split val, each time the same; never read: "
        "4 that do not fill a micro-batch of 5 in their data worker and 20 beyond --eval-iters"
    )
    assert "on 60 samples at most, too few for 60 neighbours" in say(micro_batches=6, pairs=100, neighbours=60)
    assert "neighbours" not in say(micro_batches=6, pairs=100, neighbours=59)
    whole = dict(layout, micro_batch_size=4, micro_batches=8)
    assert explain_unread_validation(str(demo / "data" / "captions"), **whole) is None


def test_the_subflavor_of_the_data_set_lets_samples_into_rsa(demo, encoder):
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    for kind, eligible in (("captions", 1), ("questions", 0), ("texts", 0)):
        batch = next(ValidationLoader(str(demo / "data" / kind), encoder, config, 8))
        assert batch.rsa.eligible.tolist() == [eligible] * 8
        assert (len(batch.images) == 0) == (kind == "texts")


def test_bad_samples_are_passed_over_and_nothing_else_is_lost(demo, encoder, tmp_path, caplog):
    broken_data.write(tmp_path / "data")
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    loader = TrainLoader(str(tmp_path / "data"), encoder, config, 4, shuffle_buffer_size=1)
    batches = [next(loader) for _ in range(10)]
    assert len({key for batch in batches for key in batch.keys}) == 40  # all good ones, in an epoch's ten batches
    for key, reason in broken_data.REASONS.items():
        (line,) = {
            r.message
            for r in caplog.records
            if f"/{key} " in r.message or r.message.startswith(f"skipped sample {key} ")
        }
        assert reason in line and str(tmp_path / "data") in line
    assert sum(batch.num_skipped for batch in batches) == len(broken_data.REASONS)


def test_numbered_images_come_out_of_a_shard_in_order(encoder, tmp_path):
    turns = [{"from": "human", "value": "<image>" * 11 + "How wide?"}, {"from": "gpt", "value": "Wider and wider."}]
    parts = {f"{i}.png": broken_data.picture(20 + i) for i in range(11)}
    (tmp_path / "data").mkdir()
    for part in ("train", "val"):
        with webdataset.TarWriter(str(tmp_path / "data" / f"{part}-00000.tar")) as writer:
            writer.write({"__key__": f"wider-{part}", **parts, "json": json.dumps({"conversations": turns}).encode()})
    data_sets.index_data_set(tmp_path / "data", "captions")
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    batch = next(ValidationLoader(str(tmp_path / "data"), encoder, config, 1))
    assert batch.image_layouts[:, 1].tolist() == list(range(20, 31)) and batch.rsa.eligible.tolist() == [0]


def test_data_that_is_not_there_is_named(demo, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--data-path .*empty, split 'train': .*energon prepare"):
        check_data(str(tmp_path / "empty"), ["train"], num_readers=1, micro_batch_size=4)
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits: {train: {blend: [{weight: 1, path: nowhere}]}}\n"
    )
    with pytest.raises(ValueError, match="nowhere"):
        check_data(str(mixture), ["train"], num_readers=1, micro_batch_size=4)
    check_data(str(demo / "data" / "captions"), ["train", "val"], num_readers=4, micro_batch_size=16)


@pytest.mark.parametrize(
    "spoil, fault", [(Path.unlink, "is missing"), (lambda tar: tar.write_bytes(b""), "has 0 bytes")]
)
def test_a_shard_that_is_gone_or_empty_is_named_before_training(tmp_path, spoil, fault):
    broken_data.write(tmp_path / "data")
    spoil(tmp_path / "data" / "val-00000.tar")
    check_data(str(tmp_path / "data"), ["train"], num_readers=1, micro_batch_size=4)
    with pytest.raises(ValueError, match=f"shard .*val-00000.tar {fault}, which its index lists; restore the file"):
        check_data(str(tmp_path / "data"), ["train", "val"], num_readers=1, micro_batch_size=4)
