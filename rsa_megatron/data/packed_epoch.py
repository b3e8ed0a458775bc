"""How many rows one pass over the training split has when they are packed: known only once its samples' lengths are read.

Of a split of up to MOST_SAMPLES the very rows of the run are counted: the same samples, in the same order, go through the packer,
with the headers of their images and not their pixels. Of a larger one so many samples are read, at places spread over it, and the
number of rows is a bound: what they give, 2 % for the error of their mean, and four deviations of what a rank reads (whose samples'
lengths are taken to vary as much as their mean). Beyond the end of its data a rank has empty rows; where the bound did not
suffice, TrainLoader says so.
"""

import contextlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.energon import WorkerConfig, get_loader, stateless
from megatron.energon.flavors import Sample

from rsa_megatron.data.epoch_length import build_train_dataset, count_epoch_samples
from rsa_megatron.data.packed_task_encoder import BufferedSample, PackingTaskEncoder
from rsa_megatron.data.random_generators import keep_generators

#: read in about a millisecond each
MOST_SAMPLES = 20_000


@dataclass(frozen=True)
class EpochRows:
    """Rows of one pass."""

    #: of the rank with the most
    of_rank: int
    #: samples of the whole pass, and those of them that were read to count the rows
    num_samples: int
    num_read: int
    samples_per_row: float

    @property
    def is_exact(self) -> bool:
        return self.num_read == self.num_samples


def count_epoch_rows(
    path: str,
    task_encoder: PackingTaskEncoder,
    *,
    data_parallel_size: int,
    num_workers: int,
    packing_buffer_size: int,
    shuffle_buffer_size: int,
    seed: int,
    most_samples: int = MOST_SAMPLES,
) -> EpochRows:
    """Count the rows of one pass over the training split behind `path`, or find a bound of them (above).

    Args:
        seed: the seed_offset of the run's WorkerConfig.

    Raises:
        ValueError: the data is a blend by weight, which has no end.
    """
    readers_of_rank = max(1, num_workers)
    num_readers = data_parallel_size * readers_of_rank
    encoder = _LengthsEncoder(task_encoder).of_one_epoch(1, shuffle_buffer_size)

    def read(reader: int) -> Iterator[_Row]:
        # Data worker w of rank r reads what a rank without data workers does as number r * num_workers + w of all.
        config = WorkerConfig(rank=reader, world_size=num_readers, num_workers=0, seed_offset=seed)
        with contextlib.redirect_stdout(io.StringIO()):  # Energon says how it divides the data
            dataset = build_train_dataset(
                path,
                encoder,
                config,
                1,
                None,
                one_epoch=True,
                drop_last=False,
                packing_buffer_size=packing_buffer_size,
            )
        return iter(get_loader(dataset))

    with keep_generators():
        shares = count_epoch_samples(path, num_readers)
        if sum(shares) <= most_samples:
            rows = [sum(1 for _ in read(reader)) for reader in range(num_readers)]
            of_rank = [sum(rows[first : first + readers_of_rank]) for first in range(0, num_readers, readers_of_rank)]
            return EpochRows(max(of_rank), sum(shares), sum(shares), sum(shares) / max(sum(rows), 1))
        num_read = num_rows = 0
        read_from = min(num_readers, max(1, most_samples // packing_buffer_size))
        for number in range(read_from):
            until = most_samples * (number + 1) // read_from
            for row in read(number * num_readers // read_from):
                num_read, num_rows = num_read + row.num_samples, num_rows + 1
                if num_read >= until:
                    break
    most = max(sum(shares[first : first + readers_of_rank]) for first in range(0, num_readers, readers_of_rank))
    bound = most * num_rows / num_read * (1.02 + 4 / math.sqrt(most)) + readers_of_rank  # whose last rows are not full
    return EpochRows(math.ceil(bound), sum(shares), num_read, num_read / num_rows)


@dataclass(kw_only=True)
class _Row(Sample):
    num_samples: int


class _LengthsEncoder(PackingTaskEncoder):
    """Packs the rows that another encoder does, without their pixels."""

    def __init__(self, encoder: PackingTaskEncoder):
        vars(self).update(vars(encoder))

    @stateless
    def postencode_sample(self, sample: BufferedSample) -> BufferedSample:
        return sample

    @stateless
    def pack_selected_samples(self, samples: list[BufferedSample]) -> _Row:
        return _Row(__key__="", __restore_key__=(), num_samples=len(samples))
