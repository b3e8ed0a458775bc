"""What RSATaskEncoder cannot follow is refused, or named where it is met."""

import dataclasses

import pytest
import torch
from megatron.energon import (
    Cooker,
    VQASample,
    basic_sample_keys,
    stateless,
)
from megatron.energon.errors import FatalSampleError

from rsa_megatron.data.rsa_task_encoder import RSATaskEncoder
from tests.support.energon_jobs import (
    CAPTION,
    JOBS,
    CaptionRSAJob,
    DataclassJob,
    Job,
    JobBatch,
    RSADictJob,
    RSAJob,
    take,
    train_dataset,
    train_loader,
    write_mixture,
)


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


def test_packing_that_pads_is_refused_until_it_pads_the_masks_too(job_data):
    settings = JOBS["packed"][1]
    with pytest.raises(FatalSampleError, match="caption mask of sample .* has the shape .*rsa_packed_caption_mask"):
        take(train_loader(job_data / "mixture.yaml", PaddedRSAJob(), **settings), 1)

    class Padded(PaddedRSAJob):
        def rsa_packed_caption_mask(self, packed_sample, masks):
            return super().rsa_packed_caption_mask(packed_sample, [self.padded(mask) for mask in masks])

    for batch in take(train_loader(job_data / "mixture.yaml", Padded(), **settings), 5):
        assert torch.equal(batch["rsa_caption_mask"], (batch["tokens"] >= CAPTION).long())


def returning(name, result):
    return {name: stateless(lambda self, *args: result(*args) if callable(result) else result)}


@pytest.mark.parametrize(
    "job, changes, message",
    [
        (
            CaptionRSAJob,
            {"rsa_text_field": "ids"},
            "a dict of Wrong has no 'ids', which sets the caption mask's length: set rsa_text_field",
        ),
        (
            CaptionRSAJob,
            returning("rsa_caption_mask", torch.ones(3)),
            r"of sample .* shape \[3\], its tokens are \d+: rsa_caption_mask",
        ),
        (
            CaptionRSAJob,
            returning("rsa_caption_mask", None),
            "rsa_caption_mask returned None for sample .*which rsa_eligible selects",
        ),
        (
            CaptionRSAJob,
            returning("encode_batch", lambda batch: {"tokens": batch.tokens[:3]}),
            "made of 4 samples.*one sequence for each",
        ),
        (
            RSAJob,
            returning("rsa_eligible", None),
            "rsa_eligible returned None for sample .*captions-.*; it must return True or False",
        ),
        (
            DataclassJob,
            {"result": JobBatch},
            "the batch, a JobBatch, has no field rsa_eligible: add `rsa_eligible: .*` to it, or",
        ),
        (
            RSAJob,
            returning("encode_batch", lambda batch: (batch.tokens,)),
            "the batch, a tuple, has no field rsa_eligible",
        ),
    ],
)
def test_what_is_missing_is_named_and_ends_the_run(job_data, job, changes, message):
    loader = train_loader(job_data / "mixture.yaml", type("Wrong", (job,), changes)())
    with pytest.raises(FatalSampleError, match=message) as error:
        take(loader, 1)
    assert isinstance(error.value, ValueError) and str(error.value).count("\n") == 0


@pytest.mark.parametrize(
    "subflavors, message",
    [
        ({"rsa": "maybe"}, "sample .*captions-.*: its data set's subflavor rsa is 'maybe'; it must be true or false"),
        ({"rsa": 1}, "subflavor rsa is 1; it must be true or false"),
        ({"rsa": None}, "subflavor rsa is None; it must be true or false"),
    ],
)
def test_a_subflavor_that_says_neither_is_refused(job_data, tmp_path, subflavors, message):
    for kind in ("captions", "questions"):
        (tmp_path / kind).symlink_to(job_data / kind)
    path = write_mixture(tmp_path / "mixture.yaml", subflavors, {"rsa": True})
    with pytest.raises(FatalSampleError, match=message):
        take(train_loader(path, RSAJob()), 3)


def test_a_cooker_that_drops_the_subflavors_is_named(job_data):
    @stateless
    def careless(stored):
        kept = basic_sample_keys(stored)
        return VQASample(
            __key__=kept["__key__"], __restore_key__=kept["__restore_key__"], image=stored["png"], context=""
        )

    class Careless(RSADictJob):
        cookers = [Cooker(careless)]

    with pytest.raises(
        FatalSampleError, match="has no __subflavors__, .*hand them on where it is cooked .basic_sample_keys"
    ):
        take(train_loader(job_data / "mixture.yaml", Careless()), 1)


def test_a_job_it_cannot_follow_is_refused_before_it_runs(job_data):
    with pytest.raises(ValueError, match="class Last: RSATaskEncoder must be the first of its bases"):
        type("Last", (Job, RSATaskEncoder), {})
    with pytest.raises(ValueError, match="batch_size is None: rsa_eligible is added to batches; give a batch_size"):
        train_dataset(job_data / "mixture.yaml", RSAJob(), batch_size=None)

    class Many(RSAJob):
        @stateless
        def batch(self, samples):
            yield super().batch(samples)

    with pytest.raises(ValueError, match="Many.batch is a generator, .*return one result"):
        train_dataset(job_data / "mixture.yaml", Many())

    class Copying(RSAJob):
        def select_samples_to_pack(self, samples):
            return [[dataclasses.replace(sample)] for sample in samples]

    # Here Energon counts a hundred failures before it gives up, unless it is told at once.
    with pytest.raises(
        FatalSampleError, match="select_samples_to_pack returned sample .*which it was not given: return"
    ):
        take(train_loader(job_data / "mixture.yaml", Copying(), packing_buffer_size=8), 1)
