"""Takes the features of pairs from a backbone into a store: prepared ahead in threads, in batches, part by part.

A pair that fails (an image that does not open, a caption without a token) fails when it is prepared; it is then skipped,
and the store records the reason.

Shapes: n pairs of a batch, D width of a layer.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from rsa_megatron import screen
from rsa_megatron.data.sources.pairs import CaptionedImage
from rsa_megatron.evaluation.feature_store import FeatureStore

# Pairs of a part, all layers of which are held before they are written: 7B's 29 layers of 3584 in float32 are 106 MB. A
# run that was killed loses no more than this.
PART_SIZE = 256
_SECONDS_BETWEEN_LINES = 30


class Backbone(Protocol):
    """Anything whose layers can be measured."""

    #: "vision" or "text"
    side: str
    #: "0" before the first layer, then "1" to "L" after each
    layers: list[str]
    #: goes into the manifest: "model", "revision", "pooling", and whatever else changes the features
    identity: dict[str, Any]
    #: captions prepared so far that were longer than the model reads
    num_truncated: int

    def prepare(self, pair: CaptionedImage) -> Any:
        """Return a pair's pixels or tokens; called from several threads. Raises ValueError, with the reason, to skip it."""

    def features(self, batch: list[Any]) -> dict[str, Tensor]:
        """Return [n, D] of every layer for n prepared pairs, each independent of the others."""


def extract(
    backbone: Backbone,
    pairs: Sequence[CaptionedImage],
    store: FeatureStore,
    *,
    batch_size: int,
    num_workers: int = 2,
    part_size: int = PART_SIZE,
) -> None:
    """Fill a store with what it lacks, and finish it.

    Args:
        pairs: of the keys of the store's manifest, in their order.
        num_workers: threads that prepare pairs.
        part_size: pairs of a part. Batches do not reach from one part into the next, so that a resumed run makes the
            same ones.

    Raises:
        ValueError: not one pair of the first part can be used.
    """
    if store.finished:
        return
    with ThreadPoolExecutor(num_workers) as pool, _Progress(backbone, len(pairs), store.num_done) as progress:
        for start in range(store.num_done, len(pairs), part_size):
            part = pairs[start : start + part_size]
            keys, left_out, batches = [], {}, []
            for prepared in _prepare_ahead(backbone.prepare, part, batch_size, pool):
                good = {key: item for key, item in prepared.items() if not isinstance(item, ValueError)}
                left_out |= {key: str(item) for key, item in prepared.items() if isinstance(item, ValueError)}
                if good:
                    batches.append(backbone.features([*good.values()]))
                    keys += good
                progress.update(len(prepared))
            if not (keys or store.num_done):  # more likely to be wrong with all than with each
                key, reason = next(iter(left_out.items()))
                raise ValueError(f"none of the first {len(part)} pairs can be used; {key}: {reason}")
            features = (
                {name: torch.cat([batch.pop(name) for batch in batches]) for name in backbone.layers} if keys else {}
            )
            store.append(keys, features, left_out)
    store.finish()
    if backbone.num_truncated:
        screen.show_aside(
            f"{backbone.num_truncated} of {len(pairs)} texts are longer than {backbone.identity['model']} reads and were truncated; "
            "texts with the same beginning may have equal features"
        )


def _prepare_ahead(
    prepare: Callable[[CaptionedImage], Any], pairs: Sequence[CaptionedImage], batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[dict[str, Any]]:
    """Yield batches of prepared pairs, or their errors, by key; the next batch is prepared while one is used."""
    waiting: dict[str, Future] = {}
    for start in range(0, len(pairs), batch_size):
        submitted = {pair.key: pool.submit(prepare, pair) for pair in pairs[start : start + batch_size]}
        if waiting:
            yield _collect_results(waiting)
        waiting = submitted
    if waiting:
        yield _collect_results(waiting)


def _collect_results(futures: dict[str, Future]) -> dict[str, Any]:
    found = {}
    for key, future in futures.items():
        error = future.exception()
        if error is not None and not isinstance(error, ValueError):
            raise error
        found[key] = error or future.result()
    return found


class _Progress:
    """Samples done and samples per second on standard error: a bar in a terminal, elsewhere a line now and then."""

    def __init__(self, backbone: Backbone, total: int, done: int):
        self._name = f"{backbone.identity['model']}, {backbone.side}"
        self._bar = None
        if sys.stderr.isatty():  # tqdm starts a thread even for a bar that is not shown
            self._bar = tqdm(total=total, initial=done, desc=self._name, unit="sample")
        self._total, self._done, self._before = total, done, done
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exception) -> None:
        if self._bar:
            self._bar.close()
        else:
            self._print_line()

    def update(self, count: int) -> None:
        self._done += count
        if self._bar:
            self._bar.update(count)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        rate = (self._done - self._before) / max(self._last_line - self._start, 1e-9)
        screen.show_aside(f"{self._name}: {self._done} of {self._total} samples, {rate:.1f} a second")
