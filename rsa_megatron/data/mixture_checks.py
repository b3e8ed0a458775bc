"""The keys of a mixture's YAML, looked at before Energon reads it: its own errors name another key than the wrong one.

What a mixture may say is what Energon's classes have as fields. The keys of `subflavors` are the user's; of these `rsa` is read
here, and of `aux` the images of a JSONL file.
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable
from pathlib import PurePosixPath

import yaml
from megatron.energon.epathlib import EPath
from megatron.energon.eyaml import load_yaml
from megatron.energon.flavors.webdataset.metadata import EnergonDatasetType, get_dataset_type
from megatron.energon.metadataset import metadataset, metadataset_v2

_ROOT = ("__module__", "__class__", "path", "splits")
_LEAST_LIKENESS = 0.6
_RSA = "rsa"
# Keys of the user's own are often short: "src" is no misspelt "rsa".
_LEAST_LIKENESS_OF_RSA = 0.75


def check_mixture(path: str, splits: Iterable[str] = ()) -> None:
    """Raise ValueError, naming file, place, key and what it may have meant, for a key that nothing reads.

    Args:
        path: of a mixture; anything else passes.
        splits: those that it must have.
    """
    _check_file(EPath(path), tuple(splits), above=())


def _check_file(path: EPath, splits: tuple[str, ...], above: tuple[str, ...]) -> None:
    kind = get_dataset_type(path)
    if kind == EnergonDatasetType.WEBDATASET:
        for name in ("dataset.yaml", "split.yaml"):
            if (file := path / ".nv-meta" / name).is_file():
                _load(file)
    if kind != EnergonDatasetType.METADATASET:
        return
    name = os.path.realpath(str(path)) if path.is_local() else str(path)
    if name in above:
        raise ValueError(
            f"{path} names itself{', by way of ' + above[-1] if above[-1] != name else ''}: remove it from its splits"
        )
    content = _load(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a mixture: it needs __class__: MetadatasetV2 and splits")
    _check_keys(content, _ROOT, str(path))
    found = content.get("splits")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} names no splits: it needs `splits: {{train: ..., val: ...}}`")
    for split in splits:
        if split not in found:
            close = difflib.get_close_matches(split, map(str, found), n=1, cutoff=_LEAST_LIKENESS)
            remedy = f": rename {close[0]} to {split}" if close else ""
            raise ValueError(f"{path} has no split part {split!r}, its splits are {', '.join(found)}{remedy}")
    is_v2 = content.get("__class__") == "MetadatasetV2"
    for part, split in found.items():
        place = f"{path}, splits: {part}"
        for leaf in _check_v2(split, place) if is_v2 else _check_v1(split, place):
            if isinstance(leaf.get("path"), str):
                _check_file(path.parent / leaf["path"], (), (*above, name))


def _load(path: EPath) -> object:
    """Load a YAML file as Energon does.

    Raises:
        ValueError: it is broken or empty; says where.
    """
    data = path.read_bytes()
    try:  # before Energon's parser, which writes lines of its own on the screen, and says nothing in its error
        is_empty = yaml.compose(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) is None
        if not is_empty:
            return load_yaml(data)
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is broken YAML{place}: {what}") from error
    raise ValueError(f"{path} is empty")


def _check_v2(node, place: str) -> list[dict]:
    """Check a split, a blend's entry or a join's; return the references to data sets below it."""
    _check_is_object(node, place)
    for key, entry_class, blend_class in (
        ("blend", metadataset_v2.BlendDatasetReference, metadataset_v2.MetadatasetBlend),
        ("blend_epochized", metadataset_v2.BlendEpochizedDatasetReference, metadataset_v2.MetadatasetBlendEpochized),
    ):
        if key in node:
            _check_keys(node, _names(blend_class), place)
            return _check_entries(node[key], entry_class, f"{place}: {key}")
    if "join" in node:
        _check_keys(node, _names(metadataset_v2.MetadatasetJoin), place)
        return []  # each is a data set of its own
    if "path" not in node:
        _check_keys(node, (*_names(metadataset_v2.DatasetReference), "blend", "blend_epochized", "join"), place)
        raise ValueError(f"{place} has none of path, blend, blend_epochized and join")
    _check_reference(node, metadataset_v2.DatasetReference, place)
    return [node]


def _check_v1(node, place: str) -> list[dict]:
    _check_is_object(node, place)
    if "datasets" not in node:
        raise ValueError(
            f"{place} has no `datasets`; a mixture with path, blend or blend_epochized needs `__class__: MetadatasetV2` beside "
            "`__module__: megatron.energon`"
        )
    _check_keys(node, _names(metadataset.MetadatasetBlender), place)
    return _check_entries(node["datasets"], metadataset.DatasetReference, f"{place}: datasets")


def _check_entries(entries, entry_class: type, place: str) -> list[dict]:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{place} is {entries!r}, not a list of data sets")
    for number, entry in enumerate(entries, 1):
        _check_is_object(entry, f"{place}, entry {number}")
        if "join" not in entry:
            _check_reference(entry, entry_class, f"{place}, entry {number}")
    return [entry for entry in entries if "join" not in entry]


def _check_reference(node: dict, reference_class: type, place: str) -> None:
    if isinstance(node.get("path"), str):
        place += f" ({PurePosixPath(node['path']).name})"
    _check_keys(node, _names(reference_class), place)
    if "path" not in node:
        raise ValueError(f"{place} has no path")
    for key in ("weight", "repetitions"):
        if key in node and not _is_share(node[key]):
            raise ValueError(f"{place}: {key} is {node[key]!r}; it must be a number, 0 or larger")
    if isinstance(node.get("subset"), dict):
        _check_keys(node["subset"], _names(metadataset_v2.Subset), f"{place}: subset")
    if isinstance(node.get("aux"), dict):
        _check_keys(node["aux"], ("images",), f"{place}: aux")
    if isinstance(node.get("subflavors"), dict):
        _check_subflavors(node["subflavors"], place)


def _check_subflavors(subflavors: dict, place: str) -> None:
    for key in subflavors:
        likeness = difflib.SequenceMatcher(None, str(key).lower(), _RSA).ratio()
        if key != _RSA and _RSA not in subflavors and likeness >= _LEAST_LIKENESS_OF_RSA:
            raise ValueError(f"{place}: subflavors: unknown key {key!r}; did you mean {_RSA!r}?")


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _names(dataclass: type) -> list[str]:
    return [field.name for field in dataclasses.fields(dataclass) if field.init and not field.name.startswith("_")]


def _check_is_object(node, place: str) -> None:
    if not isinstance(node, dict):
        raise ValueError(f"{place} is {node!r}; it needs a path, or a blend of data sets")


def _check_keys(node: dict, known: Iterable[str], place: str) -> None:
    known = list(known)
    for key in node:
        if key not in known:
            close = difflib.get_close_matches(str(key).lower(), known, n=1, cutoff=_LEAST_LIKENESS)
            raise ValueError(
                f"{place}: unknown key {key!r}; "
                + (f"did you mean {close[0]!r}?" if close else f"it may have {', '.join(known)}")
            )
