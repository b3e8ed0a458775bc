"""Energon shards of samples whose image is an embedding: 000123.npy beside 000123.json.

The embedding stands where an image would: one vector in numpy's format, beside the record's conversation, in which
exactly one <image> says where. For ReVision's first stage it is that of a text, moved onto images; for the stages with
images, a real image's. Embeddings are looked up by key; a sample without one of its own ends the writing, for a wrong
image is nothing that training would notice.

Shapes: N rows of embeddings; D their width.
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from rsa_megatron import atomic
from rsa_megatron.data.conversation import IMAGE_TOKEN
from rsa_megatron.data.prepare.shard_writer import TarShards, index_shards
from rsa_megatron.data.records import CAPTION_PROMPT, add_image_tokens, read_record
from rsa_megatron.data.sources.record import Unusable

#: The file of a sample that holds its embedding.
PART = "npy"
# The most missing or repeated keys that are named.
_NAMED = 5


class EmbeddingTable:
    """Embeddings by key.

    Args:
        keys: of the rows, N.
        rows_ND: in memory or memory-mapped.

    Raises:
        ValueError: keys are repeated, or there are not as many as rows.
    """

    def __init__(self, keys: Sequence[str], rows_ND: numpy.ndarray):
        if len(keys) != len(rows_ND):
            raise ValueError(f"there are {len(keys)} keys for {len(rows_ND)} embeddings; each embedding needs its own")
        self._row = {key: number for number, key in enumerate(keys)}
        if len(self._row) < len(keys):
            raise ValueError(f"{_describe_keys(_find_repeated(keys))} more than one embedding; keep one of each")
        self._rows_ND = rows_ND

    def get(self, key: str) -> numpy.ndarray | None:
        """Return the embedding, [D], or None for a key without one."""
        row = self._row.get(key)
        return None if row is None else numpy.asarray(self._rows_ND[row])


@dataclass(frozen=True)
class EmbeddingInfo:
    """What goes with an embedding in a shard."""

    #: by which the embedding is looked up
    key: str
    id: str | int
    #: with one <image>
    conversations: list[dict]


def make_embedding_info(key: str, record: dict | None, caption: str, *, by_id: bool = False) -> EmbeddingInfo:
    """Take key, id and conversation from a sample's record; without one, its caption as the answer to a question for it.

    A conversation without an <image> gets one in its first human turn.

    Args:
        by_id: look its embedding up by the record's id, not by its key.

    Raises:
        Unusable: it has several, or is not a conversation.
    """
    if record is None:
        turns = [{"from": "human", "value": CAPTION_PROMPT}, {"from": "gpt", "value": caption}]
        return EmbeddingInfo(key, key, turns)
    read = read_record(record, texts_alone=True)
    count = sum(text.count(IMAGE_TOKEN) for text in read.texts)
    if count > 1:
        raise Unusable(
            f"whose text has several {IMAGE_TOKEN}", f"{key}: its text has {count} {IMAGE_TOKEN} for one embedding"
        )
    found = key if read.id is None else read.id
    return EmbeddingInfo(str(found) if by_id else key, found, read.turns if count else add_image_tokens(read.turns))


@dataclass(frozen=True)
class EmbeddedSample:
    """A sample as it lies in a shard."""

    #: its name there
    key: str
    info: EmbeddingInfo
    #: [D]
    embedding_D: numpy.ndarray

    def in_shard(self) -> dict[str, bytes]:
        """Return its files by name."""
        record = json.dumps({"id": self.info.id, "conversations": self.info.conversations}, ensure_ascii=False).encode()
        return {PART: as_npy(self.embedding_D), "json": record}


def as_npy(x_D: numpy.ndarray) -> bytes:
    """Write an array in numpy's format, without pickle."""
    out = io.BytesIO()
    numpy.lib.format.write_array(out, numpy.ascontiguousarray(x_D), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def write_embedding_shards(
    folder: str | Path,
    splits: Mapping[str, Iterable[EmbeddingInfo]],
    table: EmbeddingTable,
    *,
    rsa: bool,
    shard_size: int = 1000,
    num_workers: int = 1,
) -> dict[str, int]:
    """Write a folder of shards, which appears under its name when it is whole; return how many samples each split has.

    Args:
        splits: "train", "val", and what is in each. A key may occur only once in all of them.
        rsa: whether its samples enter the RSA loss.
        shard_size: samples of a tar.
        num_workers: processes that index them.

    Raises:
        ValueError: samples have no embedding, or share one (the message counts and names them), or the folder exists.
    """
    folder = Path(folder)
    check_free(folder)
    with atomic.new_folder(folder) as unfinished:
        counts = _write(unfinished, splits, table, shard_size)
        index_shards(unfinished, subflavors={"rsa": rsa}, num_workers=num_workers)
    return counts


def check_free(path: Path) -> None:
    """Raise ValueError if the path exists and is not an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} already exists: name another --out, or remove it")


def _write(
    folder: Path, splits: Mapping[str, Iterable[EmbeddingInfo]], table: EmbeddingTable, shard_size: int
) -> dict[str, int]:
    counts, keys, missing = {}, [], []
    for split, samples in splits.items():
        shards, counts[split] = TarShards(folder, split, shard_size, None), 0
        for info in samples:
            keys.append(info.key)
            embedding_D = table.get(info.key)
            if embedding_D is None:
                missing.append(info.key)
                continue
            # Energon wants names that no two samples of a data set have, in whichever split.
            shards.write(EmbeddedSample(f"{len(keys) - 1:06d}", info, embedding_D))
            counts[split] += 1
        shards.close()
    if missing:
        raise ValueError(
            f"{_describe_keys(missing)} no embedding, of {len(keys)} samples; embed them, or remove these samples"
        )
    if repeated := _find_repeated(keys):
        raise ValueError(
            f"{_describe_keys(repeated)} more than one sample, which would share an embedding; give each its own key"
        )
    if not keys:
        raise ValueError("no samples to write; name other data")
    return counts


def _find_repeated(keys: Sequence[str]) -> list[str]:
    return [key for key, count in Counter(keys).items() if count > 1]


def _describe_keys(keys: list[str]) -> str:
    """Return "3 keys (a, b, c) have", for what they have or lack."""
    named = ", ".join(map(str, keys[:_NAMED])) + (", ..." if len(keys) > _NAMED else "")
    return f"{len(keys)} keys ({named}) have" if len(keys) > 1 else f"1 key ({named}) has"
