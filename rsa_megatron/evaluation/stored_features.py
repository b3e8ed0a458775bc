"""The features of a backbone for the samples of several seeds: each pair's once, from disk where they are stored."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from rsa_megatron import screen
from rsa_megatron.data.sources.pairs import CaptionedImage, Pairs, load_all, sample
from rsa_megatron.evaluation.extraction import Backbone, extract
from rsa_megatron.evaluation.feature_store import FeatureStore


@dataclass(frozen=True)
class SampleSet:
    """The samples of all seeds."""

    #: each pair once
    pairs: list[CaptionedImage]
    #: their description in a store's manifest
    manifest: dict


def draw_samples(
    pairs: Pairs, num_samples: int | None, seeds: list[int], *, data: str, **source: str | None
) -> SampleSet:
    """Draw the samples of each seed.

    Args:
        num_samples: None for all that have a caption.
        data: name of the data in manifests, and in the names of folders.
        source: what else specifies where the pairs come from, for the manifest.

    Raises:
        ValueError: there are fewer pairs.
    """
    samples = [sample(pairs, num_samples, seed) if num_samples is not None else load_all(pairs) for seed in seeds]
    num_samples = num_samples or len(samples[0])
    union = {pair.key: pair for chosen in samples for pair in chosen}
    place = {key: number for number, key in enumerate(union)}
    digest = hashlib.sha256(json.dumps([[pair.key, pair.caption] for pair in union.values()]).encode())
    manifest = {
        "data": data,
        **source,
        "num_samples": num_samples,
        "seeds": seeds,
        "fingerprint": f"keys and captions, sha256:{digest.hexdigest()}",
        "samples": [[place[pair.key] for pair in chosen] for chosen in samples],
        "keys": list(union),
    }
    return SampleSet(list(union.values()), manifest)


def extract_to_store(
    backbone: Backbone, chosen: SampleSet, folder: Path, *, store_dtype: str, batch_size: int, num_workers: int
) -> FeatureStore:
    """Return a backbone's features of all samples. What is not on disk is computed and stored.

    Args:
        folder: stores lie below it, by data and samples, model, revision and side.

    Raises:
        ValueError: the store of that name was made otherwise; names what differs.
    """
    manifest = backbone.identity | {"side": backbone.side, "layers": backbone.layers, "store_dtype": store_dtype}
    store = FeatureStore.create(folder / _format_store_name(backbone, chosen), manifest | chosen.manifest)
    if store.finished:
        screen.show_aside(f"{store.folder}: already complete")
    extract(backbone, chosen.pairs, store, batch_size=batch_size, num_workers=num_workers)
    return store


def _format_store_name(backbone: Backbone, chosen: SampleSet) -> Path:
    identity, samples = backbone.identity, chosen.manifest
    reading = "-multimodal" if identity.get("text_reading") == "multimodal" else ""
    if not backbone.layers[0].isdecimal():  # one that has a name: a model's own embedding, what a projector gives
        reading = f"-{backbone.layers[0]}"
    names = [
        f"{samples['data']}-{samples['num_samples']}x{len(samples['seeds'])}",
        f"{identity['model']}-{identity['revision'][-8:]}-{backbone.side}{reading}",  # revisions end in a hash
    ]
    return Path(*[re.sub(r"[^\w.-]+", "-", name) for name in names])
