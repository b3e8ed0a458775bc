"""A command that trains on what `rsa-megatron data` has written at the first try, however little it is."""

import os
from collections.abc import Mapping
from pathlib import Path

from rsa_megatron.example_files import EXAMPLES

#: `make demo` writes it, and examples/demo/prepare_data.py
TOKENIZER = "demo/tokenizer"
MICRO_BATCH_SIZE = 4


def format_first_run(data: Path, counts: Mapping[str, int], *, takes_part: bool) -> str:
    """Format a short run of the demo's model on one process, with the validation that the split allows; first what makes its tokenizer.

    Args:
        counts: samples of the splits train and val.
        takes_part: whether the data takes part in RSA.
    """
    size = max(1, min(MICRO_BATCH_SIZE, counts["train"] // 2, counts["val"] or MICRO_BATCH_SIZE))
    num_evaluated = counts["val"] // size * size  # in full micro-batches
    flags = [
        "--model demo --stage 1 --tokenizer-model " + TOKENIZER,
        f"--data-path {data} --train-iters 20 --micro-batch-size {size} --global-batch-size {2 * size} --num-workers 1",
    ]
    if num_evaluated:
        flags[-1] += f" --eval-interval 10 --eval-iters {min(4, max(1, num_evaluated // (2 * size)))}"
    else:
        flags[-1] += " --eval-iters 0"
    neighbours = max(
        min(1, num_evaluated - 1), min(10, num_evaluated // 4)
    )  # of more than half of the pairs it says little
    flags[-1] += f" --mutual-knn-k {neighbours}" if neighbours > 0 else " --mutual-knn-samples 0"
    if not takes_part:
        flags[-1] += " --rsa-weight 0"
    command = " \\\n            ".join(["torchrun --nproc-per-node 1 -m rsa_megatron.training", *flags])
    if not Path(TOKENIZER).is_dir():
        script = os.path.relpath(EXAMPLES / "demo" / "prepare_data.py")
        command = f"python {script} --out {Path(TOKENIZER).parent} --kinds texts  # the demo's tokenizer, once\n        {command}"
    return f"        {command}"
