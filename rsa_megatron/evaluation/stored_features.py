"""The features of a backbone for the samples of several seeds: each pair's once, from disk as far as they are there."""

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from rsa_megatron.data.sources.pairs import CaptionedImage, Pairs, load_all, sample
from rsa_megatron.evaluation.extraction import Backbone, extract
from rsa_megatron.evaluation.feature_store import FeatureStore


@dataclass(frozen=True)
class Drawn:
    """The samples of all seeds."""

    #: each pair once
    pairs: list[CaptionedImage]
    #: what says so in a store's manifest
    manifest: dict


def draw(pairs: Pairs, num_samples: int | None, seeds: list[int], *, data: str, **source: str | None) -> Drawn:
    """The samples of each seed.

    Args:
        num_samples: None for all that have a caption.
        data: name of the data in manifests, and in the names of folders.
        source: what else tells where the pairs come from, for the manifest.

    Raises:
        ValueError: there are not so many pairs.
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
    return Drawn(list(union.values()), manifest)


def stored_features(
    backbone: Backbone, drawn: Drawn, folder: Path, *, store_dtype: str, batch_size: int, num_workers: int
) -> FeatureStore:
    """A backbone's features of all samples. What is not on disk is computed and stored.

    Args:
        folder: stores lie below it, by data and samples, model, revision and side.

    Raises:
        ValueError: the store of that name was made otherwise; names what differs.
    """
    manifest = backbone.identity | {"side": backbone.side, "layers": backbone.layers, "store_dtype": store_dtype}
    store = FeatureStore.create(folder / _store_name(backbone, drawn), manifest | drawn.manifest)
    if store.finished:
        print(f"{store.folder}: there already", file=sys.stderr)
    extract(backbone, drawn.pairs, store, batch_size=batch_size, num_workers=num_workers)
    return store


def _store_name(backbone: Backbone, drawn: Drawn) -> Path:
    identity, samples = backbone.identity, drawn.manifest
    reading = "-multimodal" if identity.get("text_reading") == "multimodal" else ""
    if not backbone.layers[0].isdecimal():  # one that has a name: a model's own embedding, what a projector gives
        reading = f"-{backbone.layers[0]}"
    names = [
        f"{samples['data']}-{samples['num_samples']}x{len(samples['seeds'])}",
        f"{identity['model']}-{identity['revision'][-8:]}-{backbone.side}{reading}",  # revisions end in a hash
    ]
    return Path(*[re.sub(r"[^\w.-]+", "-", name) for name in names])
