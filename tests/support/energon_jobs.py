"""Task encoders as other jobs write them, with and without RSATaskEncoder, and their data."""

import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy
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
    WorkerConfig,
    basic_sample_keys,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.epathlib import EPath
from megatron.energon.flavors import BaseWebdatasetFactory
from PIL import Image

from rsa_megatron.data.rsa_task_encoder import RSATaskEncoder
from tests.support import processes

ROW = 40  # text positions of a packed row


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
            writer.write(
                {"__key__": f"{kind}-{index:02d}", "png": picture.getvalue(), "json": json.dumps(record).encode()}
            )
    BaseWebdatasetFactory.prepare_dataset(
        EPath(folder), ["train-0.tar"], split_parts_patterns=[("train", ".*")], workers=1
    )
    for name, settings in {
        "dataset.yaml": {
            "sample_type": {"__module__": "megatron.energon", "__class__": sample_type},
            "field_map": field_map,
        },
        "crude.yaml": {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"},
    }.items():
        (folder / ".nv-meta" / name).write_text(yaml.safe_dump(settings))


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
        str(path),
        worker_config=config,
        batch_size=batch_size,
        shuffle_buffer_size=10,
        max_samples_per_sequence=None,
        task_encoder=encoder,
        **more,
    )


def train_loader(path, encoder, **more):
    return get_savable_loader(train_dataset(path, encoder, **more), checkpoint_every_sec=0)


def take(loader, count):
    batches = processes.kept(iter(loader))
    return [next(batches) for _ in range(count)]


def keys_of(batch):
    return [key for row in batch["__key__"] for key in row.split(",")]


def flags_of(batch):
    """By the names of the samples."""
    return [int("captions" in key) for key in keys_of(batch)]


def assert_same(first, second):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    else:
        assert first == second


IMAGE, CAPTION = 7, 1000  # the image token; the tokens that are to be learnt begin here


@dataclass
class BatchWithFields(JobBatch):
    rsa_eligible: torch.Tensor | None = None
    rsa_caption_mask: torch.Tensor | None = None


class DataclassJob(CaptionRSAJob):
    result = BatchWithFields

    @stateless
    def encode_batch(self, batch):
        return self.result(**{field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)})


def write_data(folder: Path) -> Path:
    """Two data sets, captions and questions, and a mixture of both: captions are flagged."""
    write_data_set(folder / "captions", "captions", "CaptioningSample", {"image": "png", "caption": "json[caption]"})
    answers = {"image": "png", "context": "json[question]", "answers": "json[answer]"}
    write_data_set(folder / "questions", "questions", "VQASample", answers)
    write_mixture(folder / "mixture.yaml", {"rsa": True}, {"rsa": False})
    return folder
