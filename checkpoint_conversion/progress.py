"""The progress bar, and the line at the end that says what was done."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


@contextmanager
def progress(num_tensors: int, num_bytes: int, out: Path) -> Iterator[tqdm]:
    """Yield a bar to update with bytes, shown in a terminal while it grows; when all went well, the figures on standard output."""
    start = time.perf_counter()
    looks = dict(unit="B", unit_scale=True, mininterval=0.5, leave=False)
    with tqdm(total=num_bytes, desc=str(out), file=sys.stderr, disable=not sys.stderr.isatty(), **looks) as bar:
        yield bar
    seconds = time.perf_counter() - start
    gigabytes = num_bytes / 1e9
    print(f"{num_tensors} tensors, {gigabytes:.2f} GB in {seconds:.1f} s ({gigabytes / seconds:.2f} GB/s) to {out}")
