"""The samples of a prepared data set as they are stored, or packed into rows, for those who look at them without training."""

import contextlib
import io
import itertools
from collections.abc import Iterator
from pathlib import Path

from megatron.energon import DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset, get_val_dataset

from rsa_megatron.batch import LlavaBatch
from rsa_megatron.data.image_embeddings import EMBEDDING_PART, ImageEmbeddings
from rsa_megatron.data.leaves import PreparedLeaves
from rsa_megatron.data.loaders import TrainLoader
from rsa_megatron.data.packed_task_encoder import PackingTaskEncoder
from rsa_megatron.data.task_encoder import LlavaTaskEncoder, StoredSample

# A mixture may start with texts: one of the first N has an image, or none is looked at.
_LOOKED_AT = 64
# Samples of a shard that are read one after the other.
_PIECE = 100


class _AsStored(PreparedLeaves, DefaultTaskEncoder):
    """Gives samples as the training's task encoder gets them."""

    cookers = LlavaTaskEncoder.cookers
    decoder = None


def stored_samples(path: str | Path, part: str) -> Iterator[StoredSample]:
    """Yield a split's samples in the order in which they lie; those of a mixture one data set after the other."""
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    with contextlib.redirect_stdout(io.StringIO()):  # Energon says how it divides the data
        dataset = get_val_dataset(
            path, split_part=part, batch_size=None, worker_config=config, task_encoder=_AsStored()
        )
    yield from get_loader(dataset)


def training_samples(path: str | Path, *, seed: int) -> Iterator[StoredSample]:
    """Yield the training split's samples in an order of training: mixed by weight without an end, or once each.

    Shards are read in pieces, so that the first samples are of all of them.
    """
    config = WorkerConfig(rank=0, world_size=1, num_workers=0, seed_offset=seed)

    def build(repeat: bool):
        return get_train_dataset(
            path,
            worker_config=config,
            batch_size=None,
            shuffle_buffer_size=None,
            max_samples_per_sequence=_PIECE,
            task_encoder=_AsStored(),
            repeat=repeat,
        )

    with contextlib.redirect_stdout(io.StringIO()):  # Energon says how it divides the data
        try:
            dataset = build(repeat=False)
        except AssertionError as error:
            if "repeat" not in str(error):
                raise
            dataset = build(repeat=True)  # a blend by weight has no end
    yield from get_loader(dataset)


def packed_rows(
    path: str | Path, encoder: PackingTaskEncoder, *, seed: int, shuffle_buffer_size: int, packing_buffer_size: int
) -> Iterator[LlavaBatch]:
    """Yield the packed rows that one rank without data workers trains on: of one pass, or without an end of a blend by weight."""
    config = WorkerConfig(rank=0, world_size=1, num_workers=0, seed_offset=seed)
    arguments = (str(path), encoder, config, 1, shuffle_buffer_size)
    try:
        loader = TrainLoader(*arguments, packing_buffer_size=packing_buffer_size, one_epoch=1)
    except ValueError:  # a blend by weight has no pass
        loader = TrainLoader(*arguments, packing_buffer_size=packing_buffer_size)
    while (row := next(loader)).num_samples:
        yield row


def check_embeddings(path: str, part: str, embeddings: ImageEmbeddings) -> None:
    """Raise ValueError, with the remedy, unless the first image of a split is an embedding of the right width."""
    for sample in itertools.islice(stored_samples(path, part), _LOOKED_AT):
        if not sample.images:
            continue
        found = {name: image for name, image in sample.images.items() if EMBEDDING_PART.fullmatch(name)}
        fault = (
            "it has no embedding (.npy); name data that rsa-megatron realign transform has written, or train on pixels"
        )
        if found:
            fault = _find_fault(found, embeddings)
        if fault:
            raise ValueError(f"--data-path {path}: sample {sample.__key__} of split {part}: {fault}")
        return


def _find_fault(found: dict, embeddings: ImageEmbeddings) -> str | None:
    try:
        embeddings.decode(found)
    except Exception as error:  # of a linked sample the file may be missing
        return str(error)
    return None
