"""From a crude sample, of a tar or of a line of a JSONL file, to its images and its record: Energon's first step, its "cooker".

A stored sample is an image (png, jpg, ...) and a json with LLaVA's "conversations". Several images are numbered
files in its place: 0.png, 1.jpg, ...; only text has none. An image may also be a precomputed embedding, as ReVision's
are (image_embeddings.py). Or a sample is a line of a JSONL file, whose images lie as files below the folder that the mixture
names as `aux: {images: filesystem://FOLDER}`.
"""

import json
from pathlib import Path

from megatron.energon import basic_sample_keys, stateless
from megatron.energon.cache import FileStore
from megatron.energon.epathlib import EPath

from rsa_megatron.data.records import read_record
from rsa_megatron.data.sources.record import Unusable, relate, resolve_inside
from rsa_megatron.data.stored_parts import StoredSample, pick_parts


@stateless
def cook(stored: dict, images: FileStore | None = None) -> StoredSample:
    """Pick the images and the record out of a crude sample: of a tar, or of a JSONL file with `images` beside it."""
    record = stored.get("json")
    if isinstance(record, bytes | None):
        try:
            found, record = pick_parts(stored)
        except Unusable as fault:
            found, record = {}, fault
        return StoredSample(**basic_sample_keys(stored), images=found, record=record)
    # Energon calls each line by its number.
    keys = basic_sample_keys(stored) | {"__key__": f"{stored['__shard__']}/{stored['__key__']}"}
    # What goes wrong is stored, not raised: the sample is counted and named where all skipped ones are.
    try:
        read = read_record(record)
    except Unusable as fault:
        return StoredSample(**keys, images={}, record=fault)
    record = (record if isinstance(record, dict) else {}) | read.as_dict()
    return StoredSample(**keys, images=_read_images(read.images, images), record=record)


def _read_images(paths: list[str | bytes], images: FileStore | None) -> dict[str, bytes | Exception]:
    parts = {}
    for number, path in enumerate(paths):
        name = f"{number}.npy" if isinstance(path, str) and path.endswith(".npy") else f"{number}.png"
        try:
            parts[name] = _read_image(path, images)  # whatever picture it is: its bytes say so
        except Exception as error:
            parts[name] = error
    return parts


def _read_image(path: str | bytes, images: FileStore | None) -> bytes:
    if isinstance(path, bytes):
        return path
    if images is None:
        raise ValueError("its mixture names no images: add `aux: {images: filesystem://FOLDER}` to the data set")
    root = EPath(images.get_path())
    if root.is_local():
        folder = Path(images.get_path()).resolve()
        file = resolve_inside(folder, path)
        if not file.is_file():  # reading a pipe would never end
            raise ValueError(f"its image {path} is not a file in {root}")
        path = relate(folder, path, file)
    return images[path][0]


def read_stored_record(record: bytes | dict | Unusable | None, num_images: int, kind: str = "image(s)") -> dict:
    """Read a sample's record, beside which so many images of a kind lie; its fields that are not ours stay.

    Raises:
        ValueError, Unusable: it has none, or it cannot be trained on.
    """
    if record is None:
        raise ValueError("it has no .json")
    if isinstance(record, Unusable):
        raise record
    try:
        content = json.loads(record) if isinstance(record, bytes) else record
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise ValueError(f"its .json cannot be read: {error}") from error
    read = read_record(content, images_beside=num_images, beside=kind)
    return (content if isinstance(content, dict) else {}) | read.as_dict()


def check_readable(images: dict[str, bytes | Exception]) -> dict[str, bytes]:
    for part in images.values():
        if isinstance(part, Exception):
            raise part
    return images
