"""The data sets at the leaves of a mixture, made ready before Energon puts them together."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence

from megatron.energon import CrudeSample, WorkerConfig
from megatron.energon.flavors.jsonl.crude_jsonl_dataset import CrudeJsonlDatasetFactory
from megatron.energon.metadataset.loader_interface import LoadedDataset

from rsa_megatron.data.sources.record import Unusable
from rsa_megatron.data.typed_samples import check_type, is_typed, read_as_ours

# Into how many pieces a reader's share of a data set is cut that a mixture names again.
_PIECES = 32
# Energon makes a generator's seed of the run's and of the reader; no --seed is as large.
_SEED_STEP = 1 << 32


class PreparedLeaves:
    """Placed before a TaskEncoder: samples of Energon's own types come as ours, what cannot be read as its
    error, and no data set in the same order twice."""

    def build_train_datasets(self, *, datasets: list[LoadedDataset], worker_config: WorkerConfig, **settings):
        _read_as_stored(datasets)
        _separate_orders(datasets, worker_config)
        return super().build_train_datasets(datasets=datasets, worker_config=worker_config, **settings)

    def build_val_datasets(self, *, datasets: list[LoadedDataset], **settings):
        _read_as_stored(datasets)
        return super().build_val_datasets(datasets=datasets, **settings)


def count_occurrences(datasets: Sequence[LoadedDataset]) -> Iterator[tuple[LoadedDataset, int]]:
    """Yield each data set with the number of times that it has come before."""
    seen = Counter()
    for loaded in datasets:
        key = tuple(map(str, loaded.dataset.paths))
        yield loaded, seen[key]
        seen[key] += 1


def _read_as_stored(datasets: list[LoadedDataset]) -> None:
    for loaded in datasets:
        check_type(loaded.dataset)
        if is_typed(loaded.dataset):
            read_as_ours(loaded.dataset)
        elif isinstance(loaded.dataset, CrudeJsonlDatasetFactory):
            _keep_broken_lines(loaded.dataset)


def _keep_broken_lines(factory: CrudeJsonlDatasetFactory) -> None:
    """Let a line that is no JSON come as its error: Energon would print a traceback, and the sample would be missing in an epoch."""

    def load(raw: dict) -> CrudeSample:
        try:
            content = json.loads(raw["json"])
        except (ValueError, RecursionError) as error:
            content = Unusable("broken line", f"its line is broken JSON: {error}")
        return CrudeSample(raw | {"__subflavors__": factory.subflavors, "json": content})

    factory._load_sample = load


def _separate_orders(datasets: list[LoadedDataset], worker_config: WorkerConfig) -> None:
    """Give a data set that comes again an order of its own.

    Energon seeds all data sets of a reader alike, and reads a shard from front to end: without a shuffle buffer, or with a small
    one, two of the same would go side by side. The first keeps the order that it has alone.
    """
    num_readers = worker_config.world_size * max(1, worker_config.num_workers)
    for loaded, occurrence in count_occurrences(datasets):
        if not occurrence:
            continue
        factory = loaded.dataset
        factory.worker_config = dataclasses.replace(
            worker_config, seed_offset=worker_config.seed_offset + occurrence * _SEED_STEP
        )
        if factory.max_samples_per_sequence is None:
            factory.max_samples_per_sequence = max(1, len(factory) // num_readers // _PIECES)
