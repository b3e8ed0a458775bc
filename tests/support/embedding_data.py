"""Images as embeddings, for tests: batches of the tiny model, and shards of the demo's captions."""

import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy
import torch

from rsa_megatron.anyres import ImageLayout
from rsa_megatron.batch import LlavaBatch
from rsa_megatron.data.synthetic import data_sets
from tests.support import tiny


def batch(seed: int, *, width: int, positions: int, **options) -> LlavaBatch:
    """tiny.batch, each image of which is an embedding in so many positions."""
    made = tiny.batch(seed, **options)
    num_images = len(made.image_layouts)
    made.images = torch.randn(num_images, width, generator=torch.Generator().manual_seed(seed))
    made.row_lengths = made.row_lengths + (positions - tiny.layout(1).num_tokens(2, 9)) * made.rsa.num_tiles
    made.image_layouts = torch.tensor([ImageLayout.of_embedding(positions).as_numbers()] * num_images).reshape(-1, 6)
    return made


def embedding(key: str, width: int) -> numpy.ndarray:
    """A row of unit length that belongs to a key."""
    row = numpy.random.default_rng(zlib.crc32(key.encode())).standard_normal(width)
    return row / numpy.linalg.norm(row)


def as_npy(row: numpy.ndarray) -> bytes:
    file = io.BytesIO()
    numpy.save(file, row)
    return file.getvalue()


def write_shards(captions: Path, out: Path, width: int, *, keep_images=False, change=lambda key, part: part) -> Path:
    """The demo's captions with an embedding of each image in its place, or beside it.

    Args:
        change: what becomes of an embedding's file; None leaves it out.
    """
    out.mkdir(parents=True)
    for source in sorted(captions.glob("*.tar")):
        with tarfile.open(source) as old, tarfile.open(out / source.name, "w") as new:
            for member in old:
                content, (key, _, kind) = old.extractfile(member).read(), member.name.partition(".")
                if kind != "png" or keep_images:
                    _add(new, member.name, content)
                if (
                    kind == "png"
                    and (part := change(key, as_npy(embedding(key, width).astype(numpy.float16)))) is not None
                ):
                    _add(new, f"{key}.npy", part)
    data_sets.index_data_set(out, "captions")
    return out


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def say_whose(folder: Path, width: int) -> Path:
    """As the training script leaves it beside the checkpoints of such a run."""
    (folder / "run.json").write_text(json.dumps({"model": "tiny", "stage": "1", "image_embedding_width": width}))
    return folder
