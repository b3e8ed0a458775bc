"""The Slurm scripts, run on two CPU processes; where there is no Slurm, a stand-in starts the tasks as srun does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.environment import ROOT

pytestmark = pytest.mark.usefixtures("preloaded_commands")

SMALL = (
    "--train-iters",
    "3",
    "--micro-batch-size",
    "2",
    "--global-batch-size",
    "4",
    "--eval-iters",
    "0",
    "--mutual-knn-samples",
    "0",
    "--log-interval",
    "1",
    "--num-workers",
    "0",
    "--shuffle-buffer-size",
    "1",
)

SRUN = r"""#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || exit 1; done
"""
SCONTROL = "#!/bin/bash\necho 127.0.0.1\necho other-node\n"


def run(script, demo, out, *flags, **environment):
    bin_folder = out / "bin"
    bin_folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    environment = (
        os.environ
        | {
            "PATH": f"{bin_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DATA": str(demo / "data" / "captions"),
            "TOKENIZER": str(demo / "tokenizer"),
            "OUT": str(out / "run"),
        }
        | environment
    )
    command = ["bash", f"examples/slurm/{script}", *SMALL, *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


SLURM = dict(SLURM_JOB_NODELIST="node[1-2]", SLURM_JOB_ID="71", SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2")


def test_each_trains_saves_and_goes_on_from_the_others_checkpoint(demo, tmp_path):
    one_node, several = ("one_node.sh", dict(GPUS="2")), ("multi_node.sbatch", SLURM)
    for iteration, (script, environment) in enumerate((one_node, several, one_node), start=1):
        result = run(script, demo, tmp_path, "--exit-interval", "1", "--save-interval", "1", **environment)
        lines = re.findall(r"iteration +(\d)/ +3 .*rsa loss", result.stdout)
        assert lines == [str(iteration)], result.stdout + result.stderr
    assert result.returncode == 0


@pytest.mark.parametrize("script", ["one_node.sh", "multi_node.sbatch"])
def test_what_is_not_set_is_named(demo, tmp_path, script):
    result = run(script, demo, tmp_path, **SLURM, OUT="")
    assert result.returncode != 0 and "set OUT to the folder" in result.stderr
