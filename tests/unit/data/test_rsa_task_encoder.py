"""A job's own task encoder, with the mixin before it, delivers who may take part in RSA; all else stays as it was.

The job is written as Megatron's multimodal example is: samples and batches are dataclasses, `batch` hands on the first
sample's subflavors, `encode_batch` makes a dict, packing joins what fits a row. Another one batches dicts.
"""

import dataclasses

import pytest
import torch
from megatron.energon import (
    CaptioningSample,
    get_savable_loader,
    stateless,
)

from rsa_megatron.data.rsa_task_encoder import RSATaskEncoder
from tests.support.energon_jobs import (
    CAPTION,
    JOBS,
    WITH_RSA,
    CaptionRSAJob,
    DataclassJob,
    Job,
    JobBatch,
    RSADictJob,
    RSAJob,
    assert_same,
    flags_of,
    take,
    train_dataset,
    train_loader,
    write_mixture,
)


@pytest.mark.parametrize("name", JOBS)
def test_each_sample_keeps_its_own_flag(job_data, name):
    job, settings = JOBS[name]
    batches = take(train_loader(job_data / "mixture.yaml", WITH_RSA[job](), **settings), 12)
    for batch in batches:
        assert batch["rsa_eligible"].dtype == torch.int64
        assert batch["rsa_eligible"].tolist() == flags_of(batch)
        assert "rsa_caption_mask" not in batch
    mixed = [batch for batch in batches if 0 < batch["rsa_eligible"].sum() < len(batch["rsa_eligible"])]
    assert len(mixed) > 5  # so a flag of the first sample, taken for all, would be seen
    if name == "packed":
        assert all(len(batch["rsa_eligible"]) == sum(map(len, batch["ends"])) > 4 for batch in batches)


@pytest.mark.parametrize("name", JOBS)
def test_without_the_mixin_the_flag_is_lost(job_data, name):
    job, settings = JOBS[name]

    class Hopeful(job):
        """Writes the flag where one would: onto the encoded sample and the batch."""

        def batch(self, samples):
            batch = super().batch(samples)
            if not isinstance(batch, dict):
                batch.rsa_eligible = torch.tensor([sample.__subflavors__["rsa"] for sample in samples])
            return batch

    for batch in take(train_loader(job_data / "mixture.yaml", Hopeful(), **settings), 5):
        assert "rsa_eligible" not in batch
        if name != "dicts":
            assert isinstance(batch["__subflavors__"]["rsa"], bool)  # of the first sample alone


@pytest.mark.parametrize("name", JOBS)
def test_all_else_in_the_batches_is_as_without_the_mixin(job_data, name):
    job, settings = JOBS[name]
    datasets = [train_dataset(job_data / "mixture.yaml", encoder, **settings) for encoder in (job(), WITH_RSA[job]())]
    plain, ours = (take(get_savable_loader(dataset, checkpoint_every_sec=0), 12) for dataset in datasets)
    for before, after in zip(plain, ours):
        assert set(after) == {*before, "rsa_eligible"}
        if name == "dicts":  # this job encodes no batch, with the mixin Energon has one more step
            before.pop("__restore_key__"), after.pop("__restore_key__")
        assert_same({key: after[key] for key in before}, before)
    assert datasets[1].can_restore_sample() == datasets[0].can_restore_sample() == (name != "dicts")
    if name != "dicts":
        assert datasets[1].config() == datasets[0].config()


def test_what_energon_asks_of_a_method_is_answered_as_before(job_data):
    """Not stateless: a sample cannot be read again, and no exact resume is promised."""

    class Forgetful(RSATaskEncoder, Job):
        def encode_sample(self, sample):
            return next(super().encode_sample(sample))

    assert not train_dataset(job_data / "mixture.yaml", Forgetful()).can_restore_sample()
    assert train_dataset(job_data / "mixture.yaml", RSAJob()).can_restore_sample()
    dataset = train_dataset(job_data / "mixture.yaml", RSADictJob())
    while not getattr(dataset, "map_fn", None) or "preencode_sample" not in str(dataset.map_fn):
        dataset = dataset.dataset
    assert dataset.failure_tolerance == 3


@pytest.mark.parametrize("name", ["rows", "packed"])
def test_a_batch_is_read_again_by_its_key(job_data, name):
    _, settings = JOBS[name]
    batches = take(train_loader(job_data / "mixture.yaml", CaptionRSAJob(), **settings), 4)
    # Another loader, which has seen nothing.
    loader = train_loader(job_data / "mixture.yaml", CaptionRSAJob(), **settings)
    for batch in reversed(batches):
        again = loader.restore_sample(batch["__restore_key__"])
        again["__restore_key__"] = list(again["__restore_key__"])  # as the loader hands it out
        assert_same(again, batch)


@pytest.mark.parametrize("name", ["rows", "packed"])
def test_the_caption_mask_lies_on_the_caption(job_data, name):
    for batch in take(train_loader(job_data / "mixture.yaml", CaptionRSAJob(), **JOBS[name][1]), 10):
        assert batch["rsa_caption_mask"].dtype == torch.int64
        assert torch.equal(batch["rsa_caption_mask"], (batch["tokens"] >= CAPTION).long())
        assert 0 < batch["rsa_caption_mask"].sum() < batch["tokens"].ne(0).sum()


def test_a_mask_is_cut_where_the_job_cuts_the_text(job_data):
    class Cut(CaptionRSAJob):
        rsa_text_field = "input_ids"

        @stateless
        def encode_batch(self, batch):
            return {"input_ids": batch.tokens[:, :9]}

    for batch in take(train_loader(job_data / "mixture.yaml", Cut()), 5):
        assert torch.equal(batch["rsa_caption_mask"], (batch["input_ids"] >= CAPTION).long())
        assert batch["input_ids"].shape[1] == 9


@pytest.mark.parametrize(
    "captions, questions, expected",
    [
        ({"rsa": "True"}, {"rsa": "false"}, {"captions": 1, "questions": 0}),
        ({"rsa": False}, None, {"captions": 0, "questions": 1}),
        ({"kind": "a"}, {}, {"captions": 1, "questions": 1}),
    ],
)
def test_the_subflavor_decides_and_none_lets_in(job_data, tmp_path, captions, questions, expected):
    for kind in expected:
        (tmp_path / kind).symlink_to(job_data / kind)
    path = write_mixture(tmp_path / "mixture.yaml", captions, questions)
    for batch in take(train_loader(path, RSAJob()), 5):
        assert batch["rsa_eligible"].tolist() == [
            expected[key.split("-")[0].split("/")[-1]] for key in batch["__key__"]
        ]


class Choosing(RSATaskEncoder, Job):
    """Decides by what it knows, and packs what it encodes by itself."""

    def rsa_eligible(self, sample):
        return [isinstance(sample, CaptioningSample), False]

    @stateless(restore_seeds=True)
    def encode_sample(self, sample):
        (encoded,) = super().encode_sample(sample)
        yield self.pack_selected_samples([encoded, encoded])


def test_a_job_may_decide_by_itself_and_its_methods_may_call_one_another(job_data):
    for batch in take(train_loader(job_data / "mixture.yaml", Choosing()), 10):
        assert batch["rsa_eligible"].reshape(4, 2)[:, 1].tolist() == [0] * 4
        assert batch["rsa_eligible"][::2].tolist() == flags_of(batch)[::2]
        assert all(len(ends) == 2 for ends in batch["ends"])


def test_a_batch_that_stays_a_dataclass_keeps_them_in_pinned_memory(job_data, monkeypatch):
    (batch,) = take(train_loader(job_data / "mixture.yaml", DataclassJob()), 1)
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


def test_a_batch_of_any_other_class_gets_attributes(job_data):
    class Anything:
        def __init__(self, batch):
            self.keys = batch.__key__

    class Job(RSAJob):
        encode_batch = stateless(lambda self, batch: Anything(batch))

    (batch,) = take(train_loader(job_data / "mixture.yaml", Job()), 1)
    assert batch.rsa_eligible.tolist() == flags_of({"__key__": batch.keys})
