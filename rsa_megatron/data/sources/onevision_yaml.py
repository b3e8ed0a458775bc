"""LLaVA-OneVision's YAML of data sets, each with a sampling strategy (LLaVA-NeXT, llava/train/train.py:
LazySupervisedDataset)."""

import bisect
import difflib
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import yaml

from rsa_megatron.data.sources.record import Record, Source

_STRATEGY = re.compile(r"(first|end|random):([0-9]+(?:\.[0-9]+)?%|[0-9]+)")


class Mixture:
    """LLaVA-OneVision's YAML: several sources one after the other, some of each."""

    def __init__(self, path: Path, open_source: Callable[..., Source], *, seed: int, split: str = "train"):
        self.image_root = path.parent
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        if isinstance(content, dict) and "__class__" in content:
            raise ValueError(f"{path} is a mixture of Energon's: --data-path {path} trains on it")
        entries = content.get("datasets") if isinstance(content, dict) else None
        named = [isinstance(e, dict) and isinstance(e.get("json_path"), str) for e in entries or []]
        if not isinstance(entries, list) or not all(named):
            raise ValueError(f"{path} needs a list `datasets:` of {{json_path: ..., sampling_strategy: ...}}")
        _check_keys(f"{path}", content, ("datasets",))
        for entry in entries:
            _check_keys(f"{path}: {entry['json_path']}", entry, ("json_path", "sampling_strategy"))
        #: of each entry its source, the numbers of the records chosen from it, in order, and its json_path
        self._parts: list[tuple[Source, Sequence[int], str]] = []
        #: what the entries leave out, by why
        self.left_out = Counter()
        for position, entry in enumerate(entries):
            source = open_source(path.parent / entry["json_path"], seed=seed, split=split)
            self.left_out += source.left_out
            strategy = entry.get("sampling_strategy") or "all"
            try:
                chosen = choose(len(source), strategy, seed=f"{seed}/{position}")
            except ValueError as error:
                raise ValueError(f"{path}: {entry['json_path']}: {error}") from error
            self._parts.append((source, chosen, entry["json_path"]))

    def __len__(self) -> int:
        return sum(len(chosen) for _, chosen, _ in self._parts)

    def records(self, start: int = 0) -> Iterator[Record]:
        number = 0
        for source, chosen, name in self._parts:
            skipped = min(max(start - number, 0), len(chosen))
            number += skipped
            for record in _select_records(source, chosen[skipped:]):
                # Two entries may have files of the same name.
                yield replace(record, number=number, place=f"{name}: {record.place}")
                number += 1


def _check_keys(where: str, content: dict, known: tuple[str, ...]) -> None:
    """Raise ValueError for a key that nobody reads; it may be one that is misspelt."""
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}; remove it"
            raise ValueError(f"{where}: key {key!r} is not read: {remedy}")


def choose(count: int, strategy: str, *, seed: str) -> Sequence[int]:
    """Choose which of `count` records LLaVA's sampling_strategy takes: all, first:N, end:N or random:N; N or P%, rounded up.

    Those of "random" keep their order, so that a file can be read from front to end.
    """
    if strategy == "all":
        return range(count)
    match = _STRATEGY.fullmatch(str(strategy))
    if not match:
        raise ValueError(
            f"sampling_strategy {strategy!r} is not one of all, first:N, end:N, random:N (N a number or P%)"
        )
    which, amount = match.groups()
    wanted = math.ceil(Fraction(amount[:-1]) * count / 100) if amount.endswith("%") else int(amount)
    wanted = min(wanted, count)
    if which == "random":
        return sorted(random.Random(seed).sample(range(count), wanted))
    return range(wanted) if which == "first" else range(count - wanted, count)


def _select_records(source: Source, chosen: Sequence[int]) -> Iterator[Record]:
    if not chosen:
        return
    for record in source.records(chosen[0]):
        position = bisect.bisect_left(chosen, record.number)
        if chosen[position] == record.number:
            yield record
            if position == len(chosen) - 1:
                return
