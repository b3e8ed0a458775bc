"""The benchmark runs; its figures are one run's."""

import json
import subprocess
import sys

from tests.support.environment import BENCHMARKS

SCRIPT = BENCHMARKS / "start_up.py"
sys.path.append(str(SCRIPT.parent))


def test_the_parts_of_a_training_run_s_start_are_found(tmp_path):
    import demo_run
    import start_up

    demo_run.prepare(tmp_path, 64)
    parts = start_up.timed_start(tmp_path, threads=1)
    assert list(parts) == list(start_up.PARTS)
    assert all(part["s"] > 0 for part in parts.values())
    # Importing Megatron and torch takes more than a second of any processor; a hundredth is what Linux counts.
    assert parts["interpreter and imports"]["cpu_s"] > 1


def test_commands_are_timed_and_packages_found():
    import start_up

    taken = start_up.timed(["-c", "sum(range(10**6))"], threads=1)
    assert 0 < taken["cpu_s"] < 60
    line = "import time:       163 |     371011 |   torch.nn.functional\n"
    assert start_up._IMPORT.match(line).groups() == ("163", "torch")
    assert start_up._IMPORT.match("import time: self [us] | cumulative | imported package\n") is None
    help_text = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--runs" in help_text


def test_figures_are_medians_of_the_counted_runs(capsys):
    import start_up

    runs = [{"s": 100.0, "cpu_s": 50.0}, *({"s": s, "cpu_s": s / 2} for s in (3.0, 1.0, 2.0))]
    row = start_up.medians(runs)
    assert json.loads(json.dumps(row)) == {"s": 2.0, "cpu_s": 1.0, "spread_s": [1.0, 3.0]}
    start_up.print_table("command", {"x": row})
    assert "| x | 2.00 | 1.00 | 1.00 to 3.00 |" in capsys.readouterr().out
