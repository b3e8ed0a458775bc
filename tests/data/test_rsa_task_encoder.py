"""A job's own task encoder, with the mixin before it, delivers who may take part in RSA; all else stays as it was.

The job is written as Megatron's multimodal example is: samples and batches are dataclasses, `batch` hands on the first
sample's subflavors, `encode_batch` makes a dict, packing joins what fits a row. Another one batches dicts.
"""

import dataclasses
import io
import json
from dataclasses import dataclass

import numpy
import pytest
import torch
import webdataset
import yaml
from megatron.energon import (
    Batch,
    CaptioningSample,
    Cooker,
    DefaultTaskEncoder,
    Sample,
    TaskEncoder,
    VQASample,
    WorkerConfig,
    basic_sample_keys,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.epathlib import EPath
from megatron.energon.errors import FatalSampleError
from megatron.energon.flavors import BaseWebdatasetFactory
from PIL import Image

from rsa_megatron.data.rsa_task_encoder import RSATaskEncoder
from tests.support import processes

ROW = 40  # text positions of a packed row
IMAGE, CAPTION = 7, 1000  # the image token; the tokens that are to be learnt begin here


@dataclass
class JobSample(Sample):
    tokens: torch.Tensor
    labels: torch.Tensor
    images: list[torch.Tensor]


@dataclass
class JobRow(Sample):
    tokens: torch.Tensor
    labels: torch.Tensor
    images: list[torch.Tensor]
    ends: list[int]


@dataclass
class JobBatch(Batch):
    tokens: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor
    ends: list[list[int]] | None


class Job(DefaultTaskEncoder):
    """As it was before RSA."""

    pad_to = 1

    @stateless(restore_seeds=True)
    def encode_sample(self, sample):
        if isinstance(sample, CaptioningSample):
            yield self.encode(sample, "describe"[: numpy.random.randint(1, 9)], sample.caption)
        else:
            yield self.encode(sample, sample.context, sample.answers)

    def encode(self, sample, prompt, answer):
        tokens = torch.tensor([IMAGE, *prompt.encode(), *(CAPTION + byte for byte in answer.encode())])
        tokens = torch.nn.functional.pad(tokens, (0, -len(tokens) % self.pad_to))
        labels = torch.where(tokens >= CAPTION, tokens, -100)
        return JobSample.derive_from(sample, tokens=tokens, labels=labels, images=[sample.image])

    def select_samples_to_pack(self, samples):
        packs, room = [], 0
        for sample in sorted(samples, key=lambda sample: len(sample.tokens)):
            if len(sample.tokens) > room:
                packs.append([])
                room = ROW
            packs[-1].append(sample)
            room -= len(sample.tokens)
        return packs

    @stateless
    def pack_selected_samples(self, samples):
        return JobRow(
            __key__=",".join(sample.__key__ for sample in samples),
            __restore_key__=(),
            __subflavors__=samples[0].__subflavors__,
            tokens=torch.cat([sample.tokens for sample in samples]),
            labels=torch.cat([sample.labels for sample in samples]),
            images=[image for sample in samples for image in sample.images],
            ends=numpy.cumsum([len(sample.tokens) for sample in samples]).tolist(),
        )

    @stateless
    def batch(self, samples):
        pad = torch.nn.utils.rnn.pad_sequence
        return JobBatch(
            __key__=[sample.__key__ for sample in samples],
            __restore_key__=[sample.__restore_key__ for sample in samples],
            __subflavors__=samples[0].__subflavors__,
            tokens=pad([sample.tokens for sample in samples], batch_first=True),
            labels=pad([sample.labels for sample in samples], batch_first=True, padding_value=-100),
            images=torch.stack([image for sample in samples for image in sample.images]),
            ends=[sample.ends for sample in samples] if isinstance(samples[0], JobRow) else None,
        )

    @stateless
    def encode_batch(self, batch):
        return dataclasses.asdict(batch)


class RSAJob(RSATaskEncoder, Job):
    pass


class CaptionRSAJob(RSATaskEncoder, Job):
    def rsa_caption_mask(self, encoded_sample):
        return encoded_sample.tokens >= CAPTION


@stateless
def cook(stored):
    text = stored["json"].get("caption") or stored["json"]["answer"]
    return basic_sample_keys(stored) | {"image": stored["png"], "tokens": torch.tensor(list(text.encode()))}


class DictJob(TaskEncoder):
    """Batches dicts by Energon's own means, in buckets, and encodes in two steps."""

    cookers = [Cooker(cook)]

    @stateless(failure_tolerance=3)
    def preencode_sample(self, sample):
        return sample | {"image": sample["image"] * 2}

    @stateless
    def postencode_sample(self, sample):
        return sample | {"image": sample["image"] + 1}

    def batch_group_criterion(self, sample):
        return len(sample["tokens"]) > 5, None


class RSADictJob(RSATaskEncoder, DictJob):
    pass


JOBS = {"rows": (Job, {}), "packed": (Job, {"packing_buffer_size": 20}), "dicts": (DictJob, {})}
WITH_RSA = {Job: RSAJob, DictJob: RSADictJob}


def write_data_set(folder, kind, sample_type, field_map):
    """24 pictures, with texts of 2 to 13 characters."""
    folder.mkdir(parents=True)
    with webdataset.TarWriter(str(folder / "train-0.tar")) as writer:
        for index in range(24):
            picture = io.BytesIO()
            Image.new("RGB", (4, 4), (index, 9, 9)).save(picture, "PNG")
            text = "wide and tall"[: 2 + index % 12]
            record = {"caption": text} if kind == "captions" else {"question": text, "answer": "yes"}
            writer.write({"__key__": f"{kind}-{index:02d}", "png": picture.getvalue(), "json": json.dumps(record).encode()})
    BaseWebdatasetFactory.prepare_dataset(EPath(folder), ["train-0.tar"], split_parts_patterns=[("train", ".*")], workers=1)
    for name, settings in {
        "dataset.yaml": {"sample_type": {"__module__": "megatron.energon", "__class__": sample_type}, "field_map": field_map},
        "crude.yaml": {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"},
    }.items():
        (folder / ".nv-meta" / name).write_text(yaml.safe_dump(settings))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_data_set(folder / "captions", "captions", "CaptioningSample", {"image": "png", "caption": "json[caption]"})
    answers = {"image": "png", "context": "json[question]", "answers": "json[answer]"}
    write_data_set(folder / "questions", "questions", "VQASample", answers)
    write_mixture(folder / "mixture.yaml", {"rsa": True}, {"rsa": False})
    return folder


def write_mixture(path, captions: dict | None, questions: dict | None):
    blend = [
        {"weight": 1, "path": str(path.parent / kind)} | ({} if subflavors is None else {"subflavors": subflavors})
        for kind, subflavors in [("captions", captions), ("questions", questions)]
    ]
    mixture = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"train": {"blend": blend}}}
    path.write_text(yaml.safe_dump(mixture))
    return path


def train_dataset(path, encoder, *, num_workers=0, batch_size=4, **more):
    mixture = yaml.safe_load(path.read_text())
    if isinstance(encoder, DictJob):
        path = path.with_stem(path.stem + "-crude")
        for source in mixture["splits"]["train"]["blend"]:
            source["dataset_config"] = "crude.yaml"
        path.write_text(yaml.safe_dump(mixture))
    config = WorkerConfig(rank=0, world_size=1, num_workers=num_workers, seed_offset=3)
    return get_train_dataset(
        str(path), worker_config=config, batch_size=batch_size, shuffle_buffer_size=10, max_samples_per_sequence=None,
        task_encoder=encoder, **more,
    )  # fmt: skip


def train_loader(path, encoder, **more):
    return get_savable_loader(train_dataset(path, encoder, **more), checkpoint_every_sec=0)


def take(loader, count):
    batches = iter(loader)
    return [next(batches) for _ in range(count)]


def keys_of(batch):
    return [key for row in batch["__key__"] for key in row.split(",")]


def flags_of(batch):
    """By the names of the samples."""
    return [int("captions" in key) for key in keys_of(batch)]


@pytest.mark.parametrize("name", JOBS)
def test_each_sample_keeps_its_own_flag(data, name):
    job, settings = JOBS[name]
    batches = take(train_loader(data / "mixture.yaml", WITH_RSA[job](), **settings), 12)
    for batch in batches:
        assert batch["rsa_eligible"].dtype == torch.int64
        assert batch["rsa_eligible"].tolist() == flags_of(batch)
        assert "rsa_caption_mask" not in batch
    mixed = [batch for batch in batches if 0 < batch["rsa_eligible"].sum() < len(batch["rsa_eligible"])]
    assert len(mixed) > 5  # so a flag of the first sample, taken for all, would be seen
    if name == "packed":
        assert all(len(batch["rsa_eligible"]) == sum(map(len, batch["ends"])) > 4 for batch in batches)


@pytest.mark.parametrize("name", JOBS)
def test_without_the_mixin_the_flag_is_lost(data, name):
    job, settings = JOBS[name]

    class Hopeful(job):
        """Writes the flag where one would: onto the encoded sample and the batch."""

        def batch(self, samples):
            batch = super().batch(samples)
            if not isinstance(batch, dict):
                batch.rsa_eligible = torch.tensor([sample.__subflavors__["rsa"] for sample in samples])
            return batch

    for batch in take(train_loader(data / "mixture.yaml", Hopeful(), **settings), 5):
        assert "rsa_eligible" not in batch
        if name != "dicts":
            assert isinstance(batch["__subflavors__"]["rsa"], bool)  # of the first sample alone


@pytest.mark.parametrize("name", JOBS)
def test_all_else_in_the_batches_is_as_without_the_mixin(data, name):
    job, settings = JOBS[name]
    datasets = [train_dataset(data / "mixture.yaml", encoder, **settings) for encoder in (job(), WITH_RSA[job]())]
    plain, ours = (take(get_savable_loader(dataset, checkpoint_every_sec=0), 12) for dataset in datasets)
    for before, after in zip(plain, ours):
        assert set(after) == {*before, "rsa_eligible"}
        if name == "dicts":  # this job encodes no batch, with the mixin Energon has one more step
            before.pop("__restore_key__"), after.pop("__restore_key__")
        assert_same({key: after[key] for key in before}, before)
    assert datasets[1].can_restore_sample() == datasets[0].can_restore_sample() == (name != "dicts")
    if name != "dicts":
        assert datasets[1].config() == datasets[0].config()


def assert_same(first, second):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    else:
        assert first == second


def test_what_energon_asks_of_a_method_is_answered_as_before(data):
    """Not stateless: a sample cannot be read again, and no exact resume is promised."""

    class Forgetful(RSATaskEncoder, Job):
        def encode_sample(self, sample):
            return next(super().encode_sample(sample))

    assert not train_dataset(data / "mixture.yaml", Forgetful()).can_restore_sample()
    assert train_dataset(data / "mixture.yaml", RSAJob()).can_restore_sample()
    dataset = train_dataset(data / "mixture.yaml", RSADictJob())
    while not getattr(dataset, "map_fn", None) or "preencode_sample" not in str(dataset.map_fn):
        dataset = dataset.dataset
    assert dataset.failure_tolerance == 3


def interrupted(path, job, settings, num_workers):
    """[what comes, what comes after a restore, what comes from the beginning]"""

    def loader():
        return train_loader(path, WITH_RSA[job](), num_workers=num_workers, **settings)

    first = loader()
    batches = iter(first)
    for _ in range(5):
        next(batches)
    state = first.save_state_rank()
    expected = [next(batches) for _ in range(15)]  # past the end of the 12 batches of an epoch
    restored = loader()
    restored.restore_state_rank(state)
    return expected, take(restored, 15), take(loader(), 15)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_restored_loader_goes_on_exactly(data, num_workers):
    if num_workers:  # data workers are forked from a process without threads
        (runs,) = processes.run(interrupted_jobs, 1, data / "mixture.yaml", num_workers)
    else:
        runs = interrupted_jobs(data / "mixture.yaml", num_workers)
    for expected, restored, from_the_beginning in runs:
        assert_same(dict(enumerate(restored)), dict(enumerate(expected)))
        for batch in restored:
            assert batch["rsa_eligible"].tolist() == flags_of(batch)
        assert list(map(keys_of, from_the_beginning)) != list(map(keys_of, expected))


def interrupted_jobs(path, num_workers):
    return [interrupted(path, job, settings, num_workers) for job, settings in JOBS.values()]


@pytest.mark.parametrize("name", ["rows", "packed"])
def test_a_batch_is_read_again_by_its_key(data, name):
    _, settings = JOBS[name]
    batches = take(train_loader(data / "mixture.yaml", CaptionRSAJob(), **settings), 4)
    # Another loader, which has seen nothing.
    loader = train_loader(data / "mixture.yaml", CaptionRSAJob(), **settings)
    for batch in reversed(batches):
        again = loader.restore_sample(batch["__restore_key__"])
        again["__restore_key__"] = list(again["__restore_key__"])  # as the loader hands it out
        assert_same(again, batch)


@pytest.mark.parametrize("name", ["rows", "packed"])
def test_the_caption_mask_lies_on_the_caption(data, name):
    for batch in take(train_loader(data / "mixture.yaml", CaptionRSAJob(), **JOBS[name][1]), 10):
        assert batch["rsa_caption_mask"].dtype == torch.int64
        assert torch.equal(batch["rsa_caption_mask"], (batch["tokens"] >= CAPTION).long())
        assert 0 < batch["rsa_caption_mask"].sum() < batch["tokens"].ne(0).sum()


class PaddedRSAJob(CaptionRSAJob):
    """Its encoded samples have the length they have, its packed rows are a multiple of 8 each."""

    @stateless
    def pack_selected_samples(self, samples):
        for sample in samples:
            sample.tokens = self.padded(sample.tokens)
            sample.labels = self.padded(sample.labels)
        return super().pack_selected_samples(samples)

    def padded(self, values):
        return torch.nn.functional.pad(values, (0, -len(values) % 8))


def test_packing_that_pads_is_refused_until_it_pads_the_masks_too(data):
    settings = JOBS["packed"][1]
    with pytest.raises(FatalSampleError, match="caption mask of sample .* has the shape .*rsa_packed_caption_mask"):
        take(train_loader(data / "mixture.yaml", PaddedRSAJob(), **settings), 1)

    class Padded(PaddedRSAJob):
        def rsa_packed_caption_mask(self, packed_sample, masks):
            return super().rsa_packed_caption_mask(packed_sample, [self.padded(mask) for mask in masks])

    for batch in take(train_loader(data / "mixture.yaml", Padded(), **settings), 5):
        assert torch.equal(batch["rsa_caption_mask"], (batch["tokens"] >= CAPTION).long())


def test_a_mask_is_cut_where_the_job_cuts_the_text(data):
    class Cut(CaptionRSAJob):
        rsa_text_field = "input_ids"

        @stateless
        def encode_batch(self, batch):
            return {"input_ids": batch.tokens[:, :9]}

    for batch in take(train_loader(data / "mixture.yaml", Cut()), 5):
        assert torch.equal(batch["rsa_caption_mask"], (batch["input_ids"] >= CAPTION).long())
        assert batch["input_ids"].shape[1] == 9


@pytest.mark.parametrize("captions, questions, expected", [
    ({"rsa": "True"}, {"rsa": "false"}, {"captions": 1, "questions": 0}),
    ({"rsa": False}, None, {"captions": 0, "questions": 1}),
    ({"kind": "a"}, {}, {"captions": 1, "questions": 1}),
])  # fmt: skip
def test_the_subflavor_decides_and_none_lets_in(data, tmp_path, captions, questions, expected):
    for kind in expected:
        (tmp_path / kind).symlink_to(data / kind)
    path = write_mixture(tmp_path / "mixture.yaml", captions, questions)
    for batch in take(train_loader(path, RSAJob()), 5):
        assert batch["rsa_eligible"].tolist() == [expected[key.split("-")[0].split("/")[-1]] for key in batch["__key__"]]


class Choosing(RSATaskEncoder, Job):
    """Decides by what it knows, and packs what it encodes by itself."""

    def rsa_eligible(self, sample):
        return [isinstance(sample, CaptioningSample), False]

    @stateless(restore_seeds=True)
    def encode_sample(self, sample):
        (encoded,) = super().encode_sample(sample)
        yield self.pack_selected_samples([encoded, encoded])


def test_a_job_may_decide_by_itself_and_its_methods_may_call_one_another(data):
    for batch in take(train_loader(data / "mixture.yaml", Choosing()), 10):
        assert batch["rsa_eligible"].reshape(4, 2)[:, 1].tolist() == [0] * 4
        assert batch["rsa_eligible"][::2].tolist() == flags_of(batch)[::2]
        assert all(len(ends) == 2 for ends in batch["ends"])


@dataclass
class BatchWithFields(JobBatch):
    rsa_eligible: torch.Tensor | None = None
    rsa_caption_mask: torch.Tensor | None = None


class DataclassJob(CaptionRSAJob):
    result = BatchWithFields

    @stateless
    def encode_batch(self, batch):
        return self.result(**{field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)})


def test_a_batch_that_stays_a_dataclass_keeps_them_in_pinned_memory(data, monkeypatch):
    (batch,) = take(train_loader(data / "mixture.yaml", DataclassJob()), 1)
    # Stands for a GPU's driver; what is tested is Energon's walk through the batch.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor.clone())
    pinned = batch.pin_memory()
    assert pinned.rsa_eligible is not batch.rsa_eligible
    assert pinned.rsa_eligible.tolist() == flags_of({"__key__": batch.__key__})
    assert torch.equal(pinned.rsa_caption_mask, (pinned.tokens >= CAPTION).long())
    # The attribute that is no field, which is refused.
    plain = JobBatch(**{field.name: getattr(batch, field.name) for field in dataclasses.fields(JobBatch)})
    plain.rsa_eligible = batch.rsa_eligible
    assert not hasattr(plain.pin_memory(), "rsa_eligible")


def test_a_batch_of_any_other_class_gets_attributes(data):
    class Anything:
        def __init__(self, batch):
            self.keys = batch.__key__

    class Job(RSAJob):
        encode_batch = stateless(lambda self, batch: Anything(batch))

    (batch,) = take(train_loader(data / "mixture.yaml", Job()), 1)
    assert batch.rsa_eligible.tolist() == flags_of({"__key__": batch.keys})


def returning(name, result):
    return {name: stateless(lambda self, *args: result(*args) if callable(result) else result)}


@pytest.mark.parametrize("job, changes, message", [
    (CaptionRSAJob, {"rsa_text_field": "ids"}, "a dict of Wrong has no 'ids', of which the caption mask .*: set rsa_text_field"),
    (CaptionRSAJob, returning("rsa_caption_mask", torch.ones(3)), r"of sample .* shape \[3\], its tokens are \d+: rsa_caption_mask"),
    (CaptionRSAJob, returning("rsa_caption_mask", None), "rsa_caption_mask returned None for sample .*which rsa_eligible lets in"),
    (CaptionRSAJob, returning("encode_batch", lambda batch: {"tokens": batch.tokens[:3]}), "made of 4 samples.*a row for each"),
    (RSAJob, returning("rsa_eligible", None), "rsa_eligible returned None for sample .*captions-.*; it must return True or False"),
    (DataclassJob, {"result": JobBatch}, "the batch, a JobBatch, has no field rsa_eligible: add `rsa_eligible: .*` to it, or"),
    (RSAJob, returning("encode_batch", lambda batch: (batch.tokens,)), "the batch, a tuple, has no field rsa_eligible"),
])  # fmt: skip
def test_what_is_missing_is_named_and_ends_the_run(data, job, changes, message):
    loader = train_loader(data / "mixture.yaml", type("Wrong", (job,), changes)())
    with pytest.raises(FatalSampleError, match=message) as error:
        take(loader, 1)
    assert isinstance(error.value, ValueError) and str(error.value).count("\n") == 0


@pytest.mark.parametrize("subflavors, message", [
    ({"rsa": "maybe"}, "sample .*captions-.*: its data set's subflavor rsa is 'maybe'; it must be true or false"),
    ({"rsa": 1}, "subflavor rsa is 1; it must be true or false"),
    ({"rsa": None}, "subflavor rsa is None; it must be true or false"),
])  # fmt: skip
def test_a_subflavor_that_says_neither_is_refused(data, tmp_path, subflavors, message):
    for kind in ("captions", "questions"):
        (tmp_path / kind).symlink_to(data / kind)
    path = write_mixture(tmp_path / "mixture.yaml", subflavors, {"rsa": True})
    with pytest.raises(FatalSampleError, match=message):
        take(train_loader(path, RSAJob()), 3)


def test_a_cooker_that_drops_the_subflavors_is_named(data):
    @stateless
    def careless(stored):
        kept = basic_sample_keys(stored)
        return VQASample(__key__=kept["__key__"], __restore_key__=kept["__restore_key__"], image=stored["png"], context="")

    class Careless(RSADictJob):
        cookers = [Cooker(careless)]

    with pytest.raises(FatalSampleError, match="has no __subflavors__, .*hand them on where it is cooked .basic_sample_keys"):
        take(train_loader(data / "mixture.yaml", Careless()), 1)


def test_a_job_it_cannot_follow_is_refused_before_it_runs(data):
    with pytest.raises(ValueError, match="class Last: RSATaskEncoder must be the first of its bases"):
        type("Last", (Job, RSATaskEncoder), {})
    with pytest.raises(ValueError, match="batch_size is None: rsa_eligible is a part of a batch; give a batch_size"):
        train_dataset(data / "mixture.yaml", RSAJob(), batch_size=None)

    class Many(RSAJob):
        @stateless
        def batch(self, samples):
            yield super().batch(samples)

    with pytest.raises(ValueError, match="Many.batch is a generator, .*return one result"):
        train_dataset(data / "mixture.yaml", Many())

    class Copying(RSAJob):
        def select_samples_to_pack(self, samples):
            return [[dataclasses.replace(sample)] for sample in samples]

    # Here Energon counts a hundred failures before it gives up, unless it is told at once.
    with pytest.raises(FatalSampleError, match="select_samples_to_pack returned sample .*none of those it was given: return"):
        take(train_loader(data / "mixture.yaml", Copying(), packing_buffer_size=8), 1)
