"""The planner: what it calls possible the training script takes, what it refuses is refused; and what it prints."""

import json
import os
import re
import subprocess
import sys

import pytest

from rsa_megatron.cli import plan as plan_command
from rsa_megatron.cli.plan import format_flags, parse, read_run
from rsa_megatron.models.architectures import ARCHITECTURES
from rsa_megatron.planning.memory import peak_memory
from rsa_megatron.planning.most_tiles import count_most_tiles, count_row_tiles
from rsa_megatron.planning.parallel_layout import Layout
from rsa_megatron.planning.search import find_plans, find_rejection, list_layouts
from rsa_megatron.recipes import STAGES, recipe
from tests.support import processes


def arguments(model: str, stage: str, gpus: int, *flags: str):
    args = parse(
        ["--model", model, "--stage", stage, "--gpus", str(gpus), "--transformer-impl=transformer_engine", *flags]
    )
    return args, *read_run(args)


def accepted(world_size: int, command_lines: list[str], demo) -> list[bool]:
    """Whether the training script takes each command line on so many ranks: its own parse, Megatron's checks in it."""
    import pretrain_llava_rsa
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.training.global_vars import unset_global_variables

    os.environ["WORLD_SIZE"] = str(world_size)
    results = []
    for flags in command_lines:
        flags = [*flags.split(), "--train-iters", "8", "--tokenizer-model", str(demo / "tokenizer")]
        sys.argv = ["pretrain_llava_rsa.py", *flags]
        try:
            pretrain_llava_rsa.parse(pretrain_llava_rsa.RSAPlugin(), reads_data=False)
            results.append(True)
        except SystemExit as end:
            assert end.code == 2, end
            results.append(False)
        unset_global_variables()
        unset_num_microbatches_calculator()
    return results


def on_cpu(flags: str) -> str:
    """Transformer Engine is not there; nothing that is checked here hangs on it."""
    return flags.replace("transformer_engine", "local")


def test_every_split_is_taken_or_refused_as_the_training_script_does(demo):
    args, run, cluster, _ = arguments(
        "demo", "1", 12, "--gpus-per-node", "4", "--global-batch-size", "48", "--seq-length", "162"
    )
    layouts = [one for one in list_layouts(run, cluster) if one.micro_batch_size in (1, 8)]
    reasons = [find_rejection(run, one, cluster) for one in layouts]
    command_lines = [on_cpu(format_flags(one, args)) for one in layouts]
    (actual,) = processes.run(accepted, 1, cluster.num_gpus, command_lines, demo)
    assert actual == [reason is None for reason in reasons]
    assert len(set(reasons)) == 5 and 5 < sum(actual) < len(actual) - 5  # four reasons, and none


@pytest.mark.parametrize(
    "model, stage, gpus",
    [
        ("llava-ov-7b", "1.5", 224),
        ("llava-ov-7b", "revision", 224),
        ("llava-ov-0.5b", "2", 64),
        ("demo", "1", 8),
    ],
)
def test_the_layouts_it_prints_are_taken(demo, model, stage, gpus):
    args, run, cluster, assumed = arguments(model, stage, gpus)
    layouts = [plan.layout for plan in find_plans(run, cluster, assumed)[0]]
    # The fastest, the slowest, which recomputes, and one with the distributed optimizer.
    chosen = [layouts[0], layouts[-1], *[one for one in layouts if one.distributed_optimizer][:1]]
    (actual,) = processes.run(accepted, 1, gpus, [on_cpu(format_flags(one, args)) for one in chosen], demo)
    assert all(actual)


def test_a_sequence_length_that_tensor_parallelism_does_not_divide_is_rejected(demo):
    args, run, cluster, _ = arguments("demo", "1", 2, "--seq-length", "161")
    layout = next(one for one in list_layouts(run, cluster) if one.tensor == 2)
    assert "--seq-length" in find_rejection(run, layout, cluster)
    (actual,) = processes.run(accepted, 1, 2, [on_cpu(format_flags(layout, args))], demo)
    assert actual == [False]


def test_what_it_prints_and_in_how_little_time_to_load(capsys):
    assert plan_command.main("--model llava-ov-7b --stage 1.5 --gpus 224 --gpu-memory 80 --show 3".split()) == 0
    printed = capsys.readouterr().out
    # PP of 7: 224 = 2^5 x 7 ranks, and DP must divide a batch of 256 = 2^8.
    assert len(re.findall(r"^ +\d+ +(?:7|14|28) +\d+ .*\d$", printed, flags=re.MULTILINE)) == 3
    parts = dict(re.findall(r"^    (\w[\w ]*?) +([\d.]+)$", printed, flags=re.MULTILINE))
    total = float(parts.pop("total"))
    assert sum(map(float, parts.values())) == pytest.approx(total, abs=0.05) and total < 74
    assert "None of this has been measured at this size" in printed
    code = "import sys; from rsa_megatron.cli import plan; print([m for m in ('megatron', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_rejected_layouts_are_counted_and_printed(capsys):
    assert plan_command.main("--model demo --stage 1 --gpus 8 --show-refused".split()) == 0
    printed = capsys.readouterr().out
    counted = int(re.search(r"(\d+) are rejected", printed)[1])
    by_reason = re.findall(r"^ +(\d+)  (.*)$", printed, flags=re.MULTILINE)
    by_reason = [(int(count), reason) for count, reason in by_reason if reason.startswith(("TP", "PP", "micro"))]
    assert counted == sum(count for count, _ in by_reason) == printed.count(", recompute none: ")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--model llava-ov-8b --stage 1 --gpus 8", "llava-ov-8b"),
        ("--model demo --stage 3 --gpus 8", "--stage 3"),
        ("--model demo --stage 1 --gpus 8 --fill 0.9", "--fill is of packed rows: name --packing-buffer-size (1000)"),
        ("--model demo --stage 1 --gpus 8 --packing-buffer-size 9 --fill 1.5", "--fill 1.5 is a share of a row"),
        (
            "--model demo --stage 1 --gpus 8 --packing-buffer-size 9 --mean-length 500",
            "a packed row has --seq-length 160",
        ),
        ("--model demo --stage 1 --gpus 8 --packing-buffer-size -1", "--packing-buffer-size -1 must be above 0"),
        (
            "--model llava-ov-7b --stage 2 --gpus 8 --packing-max-tiles 9",
            "--packing-max-tiles 9: one sample may have 37",
        ),
        (
            "--model demo --stage 1 --gpus 8 --lengths x --mean-length 9",
            "leave out --mean-length, --mean-tiles and --fill",
        ),
        ("--model demo --stage 1 --gpus 8 --lengths /none.json", "/none.json"),
        (f"--model demo --stage 1 --gpus 8 --lengths {__file__}", "is not what `rsa-megatron data fill --out` writes"),
        ("--model demo --stage 1 --gpus 0", "--gpus 0"),
        ("--model demo --stage 1 --gpus 8 --mean-tiles 0", "--mean-tiles 0"),
        ("--model demo --stage revision --gpus 8 --mean-length 0", "--mean-length 0"),
        ("--model llava-ov-7b --stage 1.5 --gpus 5", "--gpus 4 does, or pass another --global-batch-size"),
        ("--model llava-ov-7b --stage 1.5 --gpus 16383", "--gpus 10752 does, or pass another --global-batch-size"),
        ("--model llava-ov-7b --stage 2 --gpus 1", "the smallest is TP 1, PP 1, DP 1, micro-batch 1, recompute full"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        plan_command.main(flags.split())
    assert end.value.code == 2
    printed, error = capsys.readouterr()
    assert not printed and error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_more_memory_never_takes_a_layout_away_and_less_adds_recomputation():
    def plans(memory):
        _, run, cluster, assumed = arguments("llava-ov-7b", "1.5", 32, "--gpu-memory", str(memory))
        return [plan.layout for plan in find_plans(run, cluster, assumed)[0]]

    def splits(layouts):
        return {(one.tensor, one.pipeline, one.micro_batch_size, one.recompute) for one in layouts}

    def part_recomputed(layouts):
        return sum(one.recompute == "full" for one in layouts) / len(layouts)

    small, large = plans(40), plans(141)
    assert splits(small) < splits(large) and part_recomputed(small) > part_recomputed(large)


@pytest.mark.parametrize("stage, on_8_gpus", [("revision", None), ("1", None), ("1.5", 62), ("2", 54)])
def test_the_command_of_a_recipe_fits_the_gpus_that_it_names(stage, on_8_gpus):
    said = STAGES[stage].__doc__
    nodes = re.search(r"--nodes (\d+)", said)
    for gpus, gibibytes in (
        (8 * int(nodes[1]) if nodes else 8, re.search(r"; (\d+) GiB each", said)[1]),
        (8, on_8_gpus),
    ):
        if not gibibytes:
            continue
        _, run, cluster, assumed = arguments("llava-ov-7b", stage, gpus)
        tensor = int((re.search(r"--tensor-model-parallel-size (\d+)", said) or (0, 1))[1])
        settings = recipe("llava-ov-7b", stage)
        (plan,) = (
            plan
            for plan in find_plans(run, cluster, assumed)[0]
            if (plan.layout.tensor, plan.layout.pipeline, plan.layout.recompute) == (tensor, 1, "none")
            and plan.layout.micro_batch_size == settings["micro_batch_size"]
        )
        assert (
            plan.layout.sequence_parallel == ("--sequence-parallel" in said) and settings["use_distributed_optimizer"]
        )
        assert plan.layout.distributed_optimizer and f"{plan.total / 2**30:.0f}" == str(gibibytes)
        assert not on_8_gpus or f"{on_8_gpus} GiB." in said
    # What it was before fits no GPU of 80 GB: Adam's state on every rank.
    if stage in ("1.5", "2"):
        whole = Layout(data=8, num_micro_batches=32, micro_batch_size=1)
        assert peak_memory(run, whole)[1]["optimizer"] > 80 * 2**30


def test_among_equal_times_the_larger_kernel_is_first():
    _, run, cluster, assumed = arguments("llava-ov-7b", "1", 8)
    plans = find_plans(run, cluster, assumed)[0]
    keys = [(plan.layout.num_rows < 2, float(f"{plan.seconds:.2g}"), -plan.layout.num_rows) for plan in plans]
    assert keys == sorted(keys) and plans[0].layout.num_rows == 32 and len(set(keys)) > 5


def test_a_small_model_has_readable_figures_and_first_a_layout_with_pairs(capsys):
    """Of the demo on 8 GPUs the fastest has micro-batches of one sample on one data-parallel rank: N = 1."""
    assert plan_command.main("--model demo --stage 1 --gpus 8 --show 54".split()) == 0
    printed = capsys.readouterr().out
    head, *rows = re.findall(r"^ +(?:TP|\d+) .*(?:samples/s|\d)$", printed, flags=re.MULTILINE)[:55]
    assert "MiB" in head and "ms/step" in head
    memory, pairs, milliseconds = ([float(row.split()[column]) for row in rows] for column in (-4, -3, -2))
    assert min(memory) > 1 and 0.01 < min(milliseconds) and pairs[0] > 1
    alone = [number == 1 for number in pairs]
    assert alone == sorted(alone) and any(alone) and milliseconds[alone.index(True)] < milliseconds[0]
    assert plan_command.main("--model demo --stage 1 --gpus 1 --global-batch-size 1".split()) == 0
    assert "no layout that fits has pairs for RSA to compare" in capsys.readouterr().out


def test_without_transformer_engine_its_layers_are_no_default(capsys):
    """The flags that are printed run in the environment that prints them; there is none here."""
    assert plan_command.main("--model llava-ov-7b --stage 1 --gpus 8".split()) == 0
    printed = capsys.readouterr().out
    assert "--transformer-impl local" in printed and "Transformer Engine is not installed here" in printed


@pytest.fixture
def lengths(tmp_path):
    """Measured samples as `rsa-megatron data fill --out` writes them: long and short ones, one longer than a row."""
    short, long = [1000] * 300, [6000] * 99
    content = {"positions": [*long, 9000, *short], "tiles": [5] * 100 + [1] * 300}
    (tmp_path / "lengths.json").write_text(json.dumps(content | {"data": "captions", "stage": "1.5"}))
    return str(tmp_path / "lengths.json")


def test_measured_lengths_are_packed_as_training_packs_them(capsys, lengths):
    command = f"--model llava-ov-7b --stage 1.5 --gpus 8 --transformer-impl transformer_engine --lengths {lengths}"
    assert plan_command.main(command.split()) == 0
    printed = capsys.readouterr().out
    # 99 rows of a long sample and two short ones, one of the sample that is cut to 8192, and the other 102 short ones in 13 rows.
    num_rows, positions = 99 + 1 + 13, 300 * 1000 + 99 * 6000 + 8192
    samples, fill = 400 / num_rows, positions / num_rows / 8192
    assert f"{samples:.3g} samples a row, which fill it to {fill:.3g}" in printed
    assert f"{96 * samples:.0f} samples" in printed and f"samples of {lengths}" in printed
    assert f"mean length {positions / 400:.5g}, mean tiles 2;" in printed
    assert "--packing-buffer-size 1000 --packing-max-tiles 17" in printed
    assert "the fastest with a row a sample (--packing-buffer-size 0 --global-batch-size" in printed
    # 7 tiles a row: of a long sample two short ones beside it, of short ones alone seven.
    assert plan_command.main([*command.split(), "--packing-max-tiles", "7"]) == 0
    assert f"{400 / (99 + 1 + 15):.3g} samples a row" in capsys.readouterr().out
    assert plan_command.main([*command.split(), "--packing-buffer-size", "0"]) == 0
    printed = capsys.readouterr().out
    assert "packed" not in printed and "--global-batch-size 256 --seq-length 8192 --packing-buffer-size 0" in printed


def test_a_row_a_sample_is_as_ever_where_the_recipe_does_not_pack(capsys):
    assert plan_command.main("--model llava-ov-7b --stage 1 --gpus 8".split()) == 0
    assert "pack" not in capsys.readouterr().out


def test_a_reader_that_ends_early_gets_no_traceback():
    command = f"{sys.executable} -m rsa_megatron plan --model llava-ov-7b --stage 1 --gpus 8 --show-refused | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout.startswith("llava-ov-7b") and result.stderr == ""


def test_the_largest_image_is_that_of_the_recipe():
    architecture = ARCHITECTURES["llava-ov-7b"]
    settings = [recipe("llava-ov-7b", stage) for stage in ("1", "1.5", "2")]
    # One tile; a base tile and 2 x 2; a base tile and 6 x 6. A packed row may have half as many again as fill it.
    assert [count_most_tiles(one, architecture) for one in settings] == [1, 5, 37]
    assert [count_row_tiles(one, architecture).default for one in settings] == [5, 17, 37]
    assert count_row_tiles(recipe("llava-ov-7b", "revision"), architecture).default == 6  # 576 positions each
