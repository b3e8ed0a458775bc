"""Which files of a folder are read: those of one split and one format, as Hugging Face's datasets chooses, and never in silence.

    split     what a file's or a folder's name says: train, training; validation, valid, dev, val; test, testing, eval, evaluation, a
              word of its own (train-00000-of-00005.parquet, test/a.parquet); data/NAME-00000-of-00005 says NAME, and goes first
    format    parquet, if no other format of tables or records has more files

Where the names say one split or none, all files are read. Files whose name begins with a dot do not count.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_KEYWORDS = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_NAMED = {
    split: re.compile(rf"(?:^|[-._ 0-9/])(?:{'|'.join(words)})(?=[-._ 0-9/]|$)", re.IGNORECASE)
    for split, words in _KEYWORDS.items()
}
_SHARD = re.compile(r"(?:^|/)data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
_RECORD_SUFFIXES = (".parquet", ".json", ".jsonl", ".csv", ".tsv")
# They lie beside data and hold none.
_NO_DATA = {"dataset_info.json", "dataset_infos.json", "config.json", "state.json", "summary.json", "skipped.jsonl"}
_LISTED = 8


@dataclass
class Chosen:
    #: sorted
    files: list[Path]
    #: files that are not read: how many, by why and what reads them
    left_out: Counter[str] = field(default_factory=Counter)


def choose_tables(folder: Path, split: str) -> Chosen:
    """Choose the parquet files of a folder of folders; none where it has none.

    Raises:
        ValueError: it has no file of this split, but of others, or more files of another format; names them and the flag.
    """
    files = _list_files(folder)
    tables = [name for name in files if name.lower().endswith(".parquet")]
    if not tables:
        return Chosen([])
    chosen, left_out = choose_split(folder, tables, split)
    others = [name for name in files if name not in set(tables)]
    suffix, most = (
        Counter(os.path.splitext(name)[1].lower() for name in others).most_common(1)[0] if others else ("", 0)
    )
    if most > len(tables):
        raise ValueError(
            f"{folder} has {len(tables)} files .parquet and {most} {suffix} ({_list(others)}): name the one to read"
        )
    return Chosen([folder / name for name in chosen], left_out + leave_out_formats(others, ".parquet"))


def leave_out_formats(others: list[str], than: str) -> Counter[str]:
    """Count the files of tables or records that are not read beside those of another format."""
    reason = f"file(s) of another format than {than} (name one to read it; found: {_list(others)})"
    return Counter({reason: len(others)} if others else {})


def list_records(folder: Path) -> list[str]:
    """List a folder's files of records and tables but parquet, which nobody reads where there are images with texts."""
    return [name for name in _list_files(folder) if not name.lower().endswith(".parquet")]


def choose_split(
    folder: Path, names: Iterable[str], split: str, *, by: Callable[[str], str] = str
) -> tuple[list[str], Counter[str]]:
    """Choose the files of one split.

    Args:
        names: paths below the folder.
        split: train, val, test, or another name that the files give; none for those that give no name.
        by: what of a path counts; the path.

    Returns:
        The paths, sorted, and the number of the others by why.
    """
    of_split = defaultdict(list)
    for name in sorted(names):
        of_split[name_split(by(name))].append(name)
    if any(_SHARD.search(by(name)) for group in of_split.values() for name in group):
        unsharded = [name for group in of_split.values() for name in group if not _SHARD.search(by(name))]
        of_split = {found: [name for name in group if name not in unsharded] for found, group in of_split.items()}
        of_split = {found: group for found, group in of_split.items() if group} | (
            {None: unsharded} if unsharded else {}
        )
    wanted = None if split == "none" else _get_split(split)
    if len(of_split) == 1:
        (wanted,) = of_split
    named = sorted((name or "none", len(group)) for name, group in of_split.items() if name != wanted)
    found = ", ".join(f"{name} ({count})" for name, count in named)
    if wanted not in of_split:
        raise ValueError(
            f"{folder} has no files of the split {split!r}, but by their names of {found}: --split selects one, or name a file"
        )
    num_others = sum(len(group) for name, group in of_split.items() if name != wanted)
    reason = f"file(s) of another split than {split!r} (--split selects it; found: {found})"
    return of_split[wanted], Counter({reason: num_others} if num_others else {})


def name_split(path: str) -> str | None:
    """Return the split that a path below a folder names; None where it names none."""
    shard = _SHARD.search(path)
    if shard:
        return _get_split(shard[1])
    places = {split: match.start() for split, pattern in _NAMED.items() if (match := pattern.search(path))}
    return min(places, key=places.get) if places else None


def _get_split(word: str) -> str:
    """Return the split that a word stands for: itself, or the one whose other name it is."""
    return next((split for split, words in _KEYWORDS.items() if word.lower() in words), word)


def walk_folders(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk a folder of folders as os.walk does, each folder once, also through links; folders before links to them."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        found = os.stat(place)
        if (found.st_dev, found.st_ino) in seen:
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        folders.sort(key=lambda name: (os.path.islink(os.path.join(place, name)), name))
        yield place, folders, names


def list_named(folder: Path, is_wanted: Callable[[str], bool]) -> list[Path]:
    """List the files in a folder of folders whose own name is wanted, sorted."""
    return sorted(Path(place, name) for place, _, names in walk_folders(folder) for name in names if is_wanted(name))


def has_parquet(folder: Path) -> bool:
    return any(name.endswith(".parquet") for _, _, names in walk_folders(folder) for name in names)


def _list_files(folder: Path) -> list[str]:
    """List the files of records and tables in a folder of folders, by their paths below it."""
    found = []
    for place, folders, names in walk_folders(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in names:
            is_data = name.lower().endswith(_RECORD_SUFFIXES) and name not in _NO_DATA
            if is_data and not name.startswith("."):
                found.append(Path(place, name).relative_to(folder).as_posix())
    return sorted(found)


def _list(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + ", ..." * (len(names) > _LISTED)
