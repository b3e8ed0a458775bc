"""The demo's data sets, small, and its tokenizer, as examples/demo/prepare_data.py writes them.

They are kept from run to run, under a name that is a hash of what makes them: code, settings and versions.
"""

import fcntl
import hashlib
import importlib.metadata
import os
import shutil
from pathlib import Path

from tests.support.environment import EXAMPLES, ROOT

SETTINGS = ("--train", "240", "--validation", "64", "--shard-size", "60")
#: what makes the data, beside the project's own code
PACKAGES = ("megatron-energon", "numpy", "pillow", "tokenizers", "transformers", "webdataset")


def make_demo(out: Path) -> Path:
    """Write data and tokenizer into a folder."""
    import prepare_data

    prepare_data.main(["--out", str(out), *SETTINGS])
    return out


def cached_demo() -> Path:
    """The folder with data and tokenizer, made at the first call on this machine; to be read alone.

    Lies in $XDG_CACHE_HOME/rsa-megatron-tests (~/.cache by default) and can be removed at any time.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rsa-megatron-tests"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / _hash_of_makers()
    with open(cache / "lock", "w") as lock:
        # Workers of pytest-xdist, and test runs side by side, ask at the same time: one makes it, the others wait.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make_demo(unfinished).rename(folder)
    return folder


def _hash_of_makers() -> str:
    found = hashlib.sha256(repr(SETTINGS).encode())
    data = ROOT / "rsa_megatron" / "data"
    code = [
        EXAMPLES / "demo" / "prepare_data.py",
        *(EXAMPLES / "mixtures" / "demo").glob("*.yaml"),
        *(data / "synthetic").glob("*.py"),
        *(data / "prepare").glob("*.py"),
    ]
    for path in sorted(code):
        found.update(path.read_bytes())
    for package in PACKAGES:
        found.update(f"{package} {importlib.metadata.version(package)}".encode())
    return found.hexdigest()[:16]
