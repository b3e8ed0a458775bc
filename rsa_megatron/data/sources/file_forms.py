"""What a file holds, told by its content: its name counts only where the content leaves it open."""

import re
from pathlib import Path

from rsa_megatron.data.media_names import FILE_FIELDS, IMAGE_FIELDS
from rsa_megatron.data.records import CAPTION_FIELDS, CONVERSATION_FIELDS
from rsa_megatron.data.sources.compressed import open_bytes
from rsa_megatron.data.sources.json_files import tell_json_form

#: What `tell_form` gives. "json lines": a value a line; "json values": values one after another, over several lines.
FORMS = ("parquet", "json list", "json lines", "json values", "json object", "table", "yaml", "text")
FORMATS = "JSON, JSONL, parquet, a .csv or .tsv, LLaVA-OneVision's .yaml, or a folder of images with texts or of .parquet files"
YAML_SUFFIXES = (".yaml", ".yml")
_TABLE_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_YAML = re.compile(r"^(?:datasets|__module__|__class__|splits)\s*:", re.MULTILINE)
#: Indexes a folder of tars without a question: the last tenth of them, at least one, is the split val.
INDEX_TARS = "energon prepare --non-interactive --sample-type CrudeWebdataset --split-ratio 9,1,0"
# What a file begins with that is none of the formats, at which byte, and what would do.
_OTHERS = (
    (0, b"PK\x03\x04", "a zip archive: unpack it, and name what was in it"),
    (257, b"ustar", f"a tar: index its folder by `{INDEX_TARS} FOLDER`, or unpack it"),
    (0, b"ARROW1", "an Arrow file: save the data set by to_parquet, or to_json"),
    (0, b"\xff\xff\xff\xff", "an Arrow stream: save the data set by to_parquet, or to_json"),
    (0, b"\x89HDF", "an HDF5 file: save its records as JSONL"),
    (0, b"SQLite format 3", "an SQLite database: save its records as JSONL"),
    (0, b"\x80\x04", "a pickle: save its records as JSONL"),
    (0, b"\xff\xfe", "text in UTF-16: save it as UTF-8"),
    (0, b"\xfe\xff", "text in UTF-16: save it as UTF-8"),
    (0, b"\xff\xd8\xff", "a picture: name the file or folder that says what is in it"),
    (0, b"\x89PNG", "a picture: name the file or folder that says what is in it"),
    (0, b"version https://git-lfs", "a Git LFS pointer: fetch the file itself (git lfs pull)"),
    (0, b"<!DOCTYPE", "a web page: fetch the file itself"),
    (0, b"<html", "a web page: fetch the file itself"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it"),
    (0, b"BZh", "a bzip2 archive: unpack it"),
    (0, b"\xfd7zXZ", "an xz archive: unpack it"),
)
_START = 1 << 16


def tell_form(path: Path) -> str:
    """Tell what a file holds: one of FORMS.

    Raises:
        ValueError: it is none of them; says what it is and what would do.
    """
    with open_bytes(path) as file:
        start = file.read(_START)
    if start[:4] == b"PAR1":
        return "parquet"
    for at, mark, what in _OTHERS:
        if start[at : at + len(mark)] == mark:
            raise ValueError(f"{path} is {what}")
    if path.suffix.lower() == ".parquet":  # the reader says what is wrong with it
        return "parquet"
    text = start.decode("utf-8-sig", "replace").lstrip()
    suffix = path.suffix.lower()
    if suffix in YAML_SUFFIXES:
        return "yaml"
    if text[:1] in ("[", "{"):
        return tell_json_form(path)
    if path.name.lower().endswith(_TABLE_SUFFIXES):
        return "table"
    if _YAML.search(text):
        return "yaml"
    if suffix in (".json", ".jsonl"):
        return "table" if is_table_header(text) else "json lines"
    return "table" if is_table_header(text) else "text"


def split_header(text: str) -> list[str]:
    """Return the columns that the first line of a text would name, were it a table."""
    header = text.partition("\n")[0]
    delimiter = max("\t|,;", key=header.count)
    return [name.strip().strip('"') for name in header.split(delimiter)]


def is_table_header(text: str) -> bool:
    """Return whether the first line of a text names a column of conversations among others, or of captions and images."""
    columns = set(split_header(text))
    has_captions = columns & {*CAPTION_FIELDS} and columns & {*IMAGE_FIELDS, *FILE_FIELDS}
    return bool(has_captions or (len(columns) > 1 and columns & {*CONVERSATION_FIELDS}))
