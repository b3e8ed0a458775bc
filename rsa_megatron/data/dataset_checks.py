"""What lies behind --data-path: the shards of a data set or a mixture, looked at before anything is read from them."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from megatron.energon import WorkerConfig
from megatron.energon.flavors import BaseCoreDatasetFactory
from megatron.energon.flavors.jsonl.crude_jsonl_dataset import CrudeJsonlDatasetFactory
from megatron.energon.flavors.webdataset.structs import ShardInfo
from megatron.energon.metadataset import load_dataset, traverse_metadataset
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset, LoadedDatasetList

from rsa_megatron.data.leaves import count_occurrences
from rsa_megatron.data.mixture_checks import check_mixture
from rsa_megatron.data.rsa_flag import read_rsa_flag
from rsa_megatron.data.typed_samples import check_type

_REMEDY = (
    "name a folder that rsa-megatron data pack has written or `energon prepare` has been run on, or a MetadatasetV2 "
    ".yaml of such folders, all of which must exist"
)


def check_data(path: str, splits: Iterable[str], *, num_readers: int, micro_batch_size: int) -> None:
    """Raise ValueError, naming file and remedy, unless the data sets behind `path` are whole, and large enough.

    Args:
        path: a prepared data set, or a mixture of such.
        splits: those that will be read: train, val.
        num_readers: data workers of all data-parallel ranks, between which a split's samples are divided.
        micro_batch_size: which each of them must fill at least once in an evaluation.
    """
    for split in splits:
        loaded = _load_split(path, split)
        shards = [shard for each in loaded.datasets for shard in _get_shards(each)]
        num_samples = _check_counts(path, split, loaded, num_readers)
        if split == "val" and num_samples // num_readers < micro_batch_size:
            raise ValueError(
                f"--data-path {path}: the {num_samples} samples of its validation split, divided between {num_readers} data "
                f"workers (data-parallel ranks x --num-workers), do not fill a micro-batch of {micro_batch_size} each; add "
                "samples, lower --num-workers or --micro-batch-size, or disable evaluation (--eval-iters 0)"
            )
        for shard in shards:
            if not shard.path.is_local():
                continue
            fault = (
                "is missing"
                if not shard.path.is_file()
                else "has 0 bytes"
                if shard.count and not shard.path.size()
                else None
            )
            if fault:
                raise ValueError(
                    f"--data-path {path}: shard {shard.path} {fault}, which its index lists; restore the file, or "
                    "run `energon prepare --force-overwrite` to index what is there"
                )


def _check_counts(path: str, split: str, loaded: LoadedDatasetList, num_readers: int) -> int:
    """Return the number of samples, unless a data set has none, or too few for a reader to have any of what it must read.

    What comes to an end is divided between readers as a whole. Of a blend by weight each reader draws from its share of each
    data set, whose weight would be lost where the share is empty.
    """
    needs_each = split == "train" and loaded.blend_mode == DatasetBlendMode.DATASET_WEIGHT
    counts = [count_samples(each.dataset) for each in loaded.datasets]
    readers = f"{num_readers} data workers (data-parallel ranks x --num-workers)"
    for each, count in zip(loaded.datasets, counts):
        name = f"--data-path {path}: {each.dataset.paths[0]}"
        if not count:
            raise ValueError(f"{name} has no sample in its split {split}: leave it out of the data, or add samples")
        if needs_each and count < num_readers:
            raise ValueError(
                f"{name} has {count} samples in its split {split}, fewer than the {readers}, of which each draws from its own share: "
                "add samples, lower --num-workers, leave it out, or mix by blend_epochized"
            )
    if split == "train" and sum(counts) < num_readers:
        raise ValueError(
            f"--data-path {path}: {sum(counts)} samples in its split {split} are fewer than the {readers}: add samples, or lower "
            "--num-workers or the number of processes"
        )
    return sum(counts)


def count_samples(factory: BaseCoreDatasetFactory) -> int:
    """Count the samples of a data set that are read: all, or its `subset`."""
    if factory.subset is None:
        return len(factory)
    first, end = factory.subset.compute_subset(len(factory))
    return end - first


def check_rsa_flags(path: str, *, rsa_weight: float) -> None:
    """Raise ValueError, with the remedy, where RSA is on and no training data set behind `path` lets samples into it.

    Args:
        path: a prepared data set, or a mixture of such.
        rsa_weight: 0 where RSA is off; then what the flags say is still read, as training will read it.
    """
    flags, said = [], []
    for loaded in _load(path, "train"):
        name, subflavors = _get_name(loaded), _get_subflavors(loaded)
        try:
            flag = read_rsa_flag(subflavors, default=False)
        except ValueError as error:
            raise ValueError(f"--data-path {path}, {name}: {error}") from error
        is_read = loaded.weight != 0 and loaded.repetitions != 0
        flags.append(flag and is_read)
        found = "rsa: true, but weight 0" if flag and not is_read else "rsa: false" if "rsa" in subflavors else "no rsa"
        said.append(f"{name} ({found})")
    if not rsa_weight or any(flags):
        return
    more = f" and {len(said) - 5} more" if len(said) > 5 else ""
    if path.endswith((".yaml", ".yml")):
        remedy = f"give those of image-caption pairs `subflavors: {{rsa: true}}` in {path}"
    elif path.endswith(".jsonl"):
        remedy = (
            "name a mixture (.yaml) that gives it `subflavors: {rsa: true}` (rsa-megatron data link --rsa writes one)"
        )
    else:
        place = f"{path.rstrip('/')}/.nv-meta/dataset.yaml"
        remedy = f"write `subflavors: {{rsa: true}}` in {place} (rsa-megatron data pack --rsa does)"
    raise ValueError(
        f"--data-path {path}: RSA is on (--rsa-weight {rsa_weight:g}), but no data set takes part in it: "
        f"{', '.join(said[:5])}{more}; {remedy}, or turn RSA off (--rsa-weight 0)"
    )


def fingerprint(path: str) -> str:
    """Hash what the training split behind `path` holds: shards by name and size, and how they are mixed."""
    parts = [
        (
            [(shard.path.parent.name, shard.name, shard.count) for shard in _get_shards(loaded)],
            loaded.weight,
            loaded.repetitions,
            repr(getattr(loaded.dataset, "subset", None)),
            *([occurrence] if occurrence else []),  # its order is another one (leaves.py)
        )
        for loaded, occurrence in count_occurrences(_load(path, "train"))
    ]
    return hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()


def _get_name(loaded: LoadedDataset) -> str:
    return str(getattr(getattr(loaded.dataset, "path", None), "name", None) or type(loaded.dataset).__name__)


def _get_subflavors(loaded: LoadedDataset) -> dict:
    """Those that its samples carry: of data sets that are joined, the first one's."""
    dataset = loaded.dataset
    if inner := getattr(dataset, "inner_datasets", None):
        dataset = next(iter(inner.values() if isinstance(inner, dict) else inner))
    return getattr(dataset, "subflavors", None) or {}


def _get_shards(loaded: LoadedDataset) -> list[ShardInfo]:
    dataset = loaded.dataset
    if isinstance(dataset, CrudeJsonlDatasetFactory):
        return [ShardInfo(name=dataset.path.name, path=dataset.path, count=len(dataset))]
    return getattr(dataset, "shards", [])


def _load_split(path: str, split: str) -> LoadedDatasetList:
    """Load what is known of the data sets of a split without reading samples.

    Raises:
        ValueError: one is not there, has a key that nothing reads or samples of a type that is not read; names file and remedy.
    """
    if "://" not in path and not Path(path).exists():
        raise ValueError(f"--data-path {path}: it does not exist; {_REMEDY}")
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    try:
        check_mixture(path, [split])
    except ValueError as error:
        raise ValueError(
            f"--data-path {path}, split {split!r}: {error}{_suggest_remedy(path, split, str(error))}"
        ) from error
    try:
        loaded = load_dataset(path).get_datasets(training=split == "train", split_part=split, worker_config=config)
        for each in loaded.datasets:
            check_type(each.dataset)
    except Exception as error:  # whatever Energon comes upon
        reason = _name_leaf(path, split) + (" ".join(str(error).split()) or type(error).__name__)
        raise ValueError(
            f"--data-path {path}, split {split!r}: {reason}{_suggest_remedy(path, split, reason)}"
        ) from error
    return loaded


def _name_leaf(path: str, split: str) -> str:
    """Name the first data set of a mixture that cannot be loaded: Energon's own errors say what is wrong, not with which."""
    try:
        leaves = traverse_metadataset(path, split_part=split)
    except Exception:  # it is no mixture, or not one that can be walked
        return ""
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    for leaf in leaves:
        try:
            load_dataset(leaf.path).get_datasets(training=False, split_part=leaf.split_part, worker_config=config)
        except Exception:
            return f"{leaf.path}: "
    return ""


def _load(path: str, split: str) -> list[LoadedDataset]:
    return _load_split(path, split).datasets


def _suggest_remedy(path: str, split: str, error: str) -> str:
    if Path(path, "mixture.yaml").is_file():
        return f"; name {Path(path, 'mixture.yaml')}"
    if "unknown key" in error or ".nv-meta/dataset.yaml" in error:
        return ""  # it says what to do
    if any(
        said in error
        for said in (": rename ", "is broken YAML", ".yaml is empty", "names itself", "it must be a number")
    ):
        return ""
    if "split part" in error.lower() and split == "train":
        return "; leave it out of the data, or name its shards of this split in its .nv-meta/split.yaml"
    if "split part" in error.lower():
        return (
            "; hold samples out for validation (rsa-megatron data pack --val), or disable evaluation (--eval-iters 0 "
            "--mutual-knn-samples 0)"
        )
    return f"; {_REMEDY}"
