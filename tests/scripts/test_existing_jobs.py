"""The jobs of examples/existing_jobs: what the marked lines add, and that without them nothing of RSA is left."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.support import bridge_stand_in, processes, script
from tests.support.environment import EXAMPLES

HAS_BRIDGE = importlib.util.find_spec("megatron.bridge") is not None
JOBS = EXAMPLES / "existing_jobs"
TP = ("--tensor-model-parallel-size", "2", "--micro-batch-size", "8")
PP = ("--pipeline-model-parallel-size", "2", "--micro-batch-size", "8")


def without_rsa(job: Path, folder: Path) -> Path:
    """The job as it was before: a copy without the lines that end in "# RSA"."""
    kept = [line for line in job.read_text().splitlines(keepends=True) if not line.rstrip().endswith("# RSA")]
    (folder / job.name).write_text("".join(kept))
    return folder / job.name


def run(job: Path, *flags, world_size: int = 2) -> list[str]:
    return processes.run(_main, world_size, job, list(map(str, flags)))


def _main(job, flags) -> str:
    module = bridge_stand_in.load_job(job)
    sys.argv = [str(job), *flags]
    module.main()
    return processes.output()


def figures(outputs: list[str]) -> dict[int, dict[str, str]]:
    """Of each iteration's line, what does not depend on the clock."""
    return {
        i: {name: value for name, value in line.items() if not name.startswith("elapsed")}
        for i, line in script.iterations(outputs).items()
    }


def checkpoint(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every tensor of it: weights and the optimizer's."""
    path = folder / f"iter_{iteration:07d}"
    return script.plain_tensors(path) | script.plain_tensors(path, "optimizer")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("layout", [(), TP, PP], ids=["DP=2", "TP=2", "PP=2"])
def test_weight_0_is_the_job_without_the_marked_lines_bit_for_bit(tmp_path, layout):
    plain = without_rsa(JOBS / "megatron_lm.py", tmp_path)
    before = run(plain, *layout, "--train-iters", 3, "--save", tmp_path / "before")
    off = run(JOBS / "megatron_lm.py", *layout, "--train-iters", 3, "--save", tmp_path / "off", "--rsa-weight", 0)
    assert list(figures(before)) == [1, 2, 3] and figures(before) == figures(off)
    assert same(checkpoint(tmp_path / "before", 3), checkpoint(tmp_path / "off", 3))


def test_with_rsa_the_checkpoint_has_the_same_names_and_other_weights(tmp_path):
    plain = without_rsa(JOBS / "megatron_lm.py", tmp_path)
    run(plain, "--train-iters", 3, "--save", tmp_path / "before")
    outputs = run(JOBS / "megatron_lm.py", "--train-iters", 3, "--save", tmp_path / "after")
    assert all(float(line["rsa pairs"]) == 8 and float(line["rsa loss"]) > 0 for line in figures(outputs).values())
    before, after = checkpoint(tmp_path / "before", 3), checkpoint(tmp_path / "after", 3)
    assert {name: x.shape for name, x in before.items()} == {name: x.shape for name, x in after.items()}
    assert not same(before, after)  # the comparison of the test above can fail


def test_the_figures_are_the_same_in_every_layout(tmp_path):
    # Layouts draw weights and dropout differently: all begin from one checkpoint (its step has a rate of 0), without dropout.
    run(JOBS / "megatron_lm.py", "--train-iters", 1, "--lr", 0, "--save", tmp_path, "--rsa-weight", 0)
    flags = ["--train-iters", 1, "--load", tmp_path, "--finetune", "--hidden-dropout", 0, "--attention-dropout", 0]
    flags += ["--rsa-weight", 1]
    expected, *others = (figures(run(JOBS / "megatron_lm.py", *flags, *layout))[1] for layout in ((), TP, PP))
    for actual in others:
        for name in ("lm loss", "rsa loss", "rsa pairs", "rsa dist vision", "rsa dist text", "grad norm"):
            # fp32 sums in another order: the printed digits (six after the point, three for the norm) may differ in the last.
            assert float(actual[name]) == pytest.approx(
                float(expected[name]), rel=1e-5, abs=1.1e-3 if "norm" in name else 0
            )
    # Negative control: the norm is that of both losses.
    weight_0 = figures(run(JOBS / "megatron_lm.py", *flags, "--rsa-weight", 0))[1]
    assert float(weight_0["grad norm"]) != pytest.approx(float(expected["grad norm"]), rel=1e-2)


@pytest.mark.parametrize(
    "name, marked", [("megatron_lm.py", 5), ("megatron_bridge.py", 4), ("huggingface_trainer.py", 5)]
)
def test_all_of_rsa_is_in_the_marked_lines(tmp_path, name, marked):
    before = without_rsa(JOBS / name, tmp_path).read_text()
    assert len((JOBS / name).read_text().splitlines()) - len(before.splitlines()) == marked
    code = before.split('"""', 2)[2]  # the docstring speaks of it
    # What is left is where the plain layers' settings and the CPU come from.
    assert not re.search(r"\brsa\.|RSA", code) and not re.search(r"rsa_megatron.(plugin|huggingface)", code)


def bridge_job_without_bridge() -> str:
    try:
        bridge_stand_in.load_job(JOBS / "megatron_bridge.py")
    except SystemExit as end:
        return end.code
    return "imported"


@pytest.mark.skipif(HAS_BRIDGE, reason="Megatron-Bridge is installed")
def test_without_bridge_one_line_says_what_to_install():
    (message,) = processes.run(bridge_job_without_bridge, 1)
    assert re.fullmatch(r"error: Megatron-Bridge cannot be imported \(.*\): pip install .*megatron-bridge.*", message)


@pytest.mark.skipif(not HAS_BRIDGE, reason="Megatron-Bridge is not installed; it needs Transformer Engine")
def test_with_bridge_its_own_training_loop_trains_and_logs_the_figures():
    lines = figures(run(JOBS / "megatron_bridge.py"))
    assert list(lines) == [1, 2, 3, 4, 5]
    assert all(float(line["rsa pairs"]) == 8 and float(line["rsa loss"]) > 0 for line in lines.values())


@pytest.mark.parametrize(
    "form, layout", [("function", ()), ("functor", ()), ("function", PP)], ids=["function", "functor", "PP=2"]
)
def test_a_step_and_a_wrapped_model_of_bridges_forms_train_as_megatron_lms(form, layout):
    flags = [*layout, "--train-iters", "3", "--rsa-weight", "1"]
    expected = figures(run(JOBS / "megatron_lm.py", *flags))
    actual = figures(processes.run(bridge_stand_in.train, 2, JOBS / "megatron_lm.py", form, flags))
    assert actual == expected and float(actual[3]["rsa loss"]) > 0


def train_on_trainer(runs: list[tuple[Path, list[str]]]) -> list[list[dict[str, str]]]:
    """What each run's Trainer has logged, but for times."""
    logs = []
    torch.cuda.is_available = lambda: False  # as it is without megatron_on_cpu, which these processes are forked with
    for job, flags in runs:
        before = len(processes.output())
        sys.argv = [str(job), *flags]
        bridge_stand_in.load_job(job).main()
        lines = processes.output()[before:].splitlines()
        logs.append([ast.literal_eval(line) for line in lines if line.startswith("{'loss'")])
    return logs


def test_transformers_trainer_gives_the_same_figures_on_one_process_and_on_two(tmp_path):
    job, out = JOBS / "huggingface_trainer.py", ["--steps", "3", "--out", str(tmp_path / "run")]
    plain = without_rsa(job, tmp_path)
    one = [*out, "--batch", "8"]
    runs = [(job, one), (job, [*one, "--rsa-weight", "0"]), (plain, one)]
    ((on, off, without),) = processes.run(train_on_trainer, 1, runs)
    (two, _) = processes.run(train_on_trainer, 2, [(job, [*out, "--batch", "4"])])
    # As printed, four digits: float32 sums in another order may differ in the last.
    assert len(on) == 3 and all(float(line["rsa_pairs"]) == 8 and float(line["rsa_loss"]) > 0 for line in on)
    for actual, expected in zip(two[0], on, strict=True):
        for figure in ("loss", "lm_loss", "rsa_loss", "grad_norm", "rsa_pairs"):
            assert float(actual[figure]) == pytest.approx(float(expected[figure]), rel=2e-3), figure
    assert off == without and off != on  # weight 0 is the job without the marked lines
    assert float(off[2]["loss"]) != pytest.approx(float(on[2]["lm_loss"]), rel=1e-4)
