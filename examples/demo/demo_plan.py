"""What `make demo`, `make demo-compare`, `make demo-stages` and `demo.py --packing` run, as jobs (job_queue.py) with their flags.

`args` are those of examples/demo/demo.py: out, data, results, seed, seeds, processes, scenes, backbone_iterations, flags.
"""

from dataclasses import dataclass
from pathlib import Path

from rsa_megatron.example_files import EXAMPLES
from rsa_megatron.job_commands import folder_name, python, torchrun
from rsa_megatron.job_queue import Job

WITHOUT_RSA = ("--rsa-weight", "0")
#: Folders and flags of the three stages of --stages; stage 1 is shorter than in the demo.
STAGES = {
    "1": ("stage1", ("--train-iters", "150", "--eval-interval", "1000")),
    "1.5": ("stage1_5", ("--train-iters", "60")),
    "2": ("stage2", ("--train-iters", "40")),
}
ARMS = {"with RSA": (), "without": WITHOUT_RSA}
#: Stage 1 of --packing, which both of its arms start from.
PACKING_STAGE_1 = ("--train-iters", "80", "--eval-interval", "1000")
#: Flags of its arms in stages 1.5 and 2, and their iterations, of as many samples in both: 32 samples a step, a row each; or 4 rows of 8, and
#: 6 of 5. The tokens of a step weigh alike in both, and evaluations are the same.
PACKING_ARMS = {
    "unpacked": ("--packing-buffer-size", "0", "--seq-length", "448")
    + ("--micro-batch-size", "8", "--global-batch-size", "32", "--calculate-per-token-loss"),
    "packed": ("--packing-buffer-size", "250", "--micro-batch-size", "1")
    + ("--eval-micro-batch-size", "8", "--eval-global-batch-size", "32"),
}
PACKING_STAGES = {
    "1.5": {
        "unpacked": ("--train-iters", "40"),
        "packed": ("--train-iters", "39", "--seq-length", "2048", "--global-batch-size", "4"),
    },
    "2": {
        "unpacked": ("--train-iters", "30"),
        "packed": ("--train-iters", "32", "--seq-length", "1696", "--global-batch-size", "6"),
    },
}
# Seconds on two cores.
SECONDS = {"data": 25, "pretraining": 100, "before": 20, "1": 120, "1.5": 120, "2": 80, "figures": 6, "export": 12}


@dataclass(frozen=True)
class Step(Job):
    """A job of which the user reads when it starts."""

    number: int = 0
    sentence: str = ""
    shows_output: bool = False
    """Whether its output is the result that the user waits for."""
    measured_by: str | None = None
    """The job whose figures are the first of this one's metrics.jsonl, at iteration 0."""


def plan(args) -> list[Step]:
    """Return all jobs, each after those it needs."""
    if args.stages:
        return plan_stages(args)
    if args.compare:
        return plan_comparison(args)
    if args.packing:
        return plan_packing(args)
    arms = {"with RSA": "stage1", "without": "without-rsa"}
    return [
        plan_captions(args),
        *plan_backbones(args, "", args.seed),
        *plan_stage_1(args, "", arms["with RSA"], args.seed),
        *plan_stage_1(args, "", arms["without"], args.seed, WITHOUT_RSA, number=5),
        plan_curves(args, arms),
        *plan_results(args, arms["with RSA"]),
    ]


def plan_comparison(args) -> list[Step]:
    """Return the demo of several seeds, with RSA and without, and the figure of all."""
    jobs = [plan_captions(args)]
    groups = {"with RSA": ("stage1", ()), "without": ("without-rsa", WITHOUT_RSA)}
    for seed in args.seeds:
        jobs += plan_backbones(args, f"seed-{seed}/", seed)
        for name, flags in groups.values():
            jobs += plan_stage_1(args, f"seed-{seed}/", name, seed, flags)
    runs = {label: [f"seed-{seed}/{name}" for seed in args.seeds] for label, (name, _) in groups.items()}
    files = [("--group", label, *(args.out / run / "metrics.jsonl" for run in names)) for label, names in runs.items()]
    compare = python(
        EXAMPLES / "demo" / "plot_runs.py",
        *(word for group in files for word in group),
        *("--out", args.results / "demo.png", "--jsonl", args.results / "demo.jsonl"),
    )
    needs = tuple(run for names in runs.values() for run in names)
    name = f"comparison-{'-'.join(map(str, args.seeds))}"
    return [*jobs, Step(name, compare, needs, SECONDS["figures"], 5, "all seeds, with RSA and without", True)]


def plan_stages(args) -> list[Step]:
    """Return the three stages with RSA and without, each from the weights of the one before."""
    jobs = [*plan_all_data(args), *plan_backbones(args, "", args.seed)]
    folders = {arm: args.out / "stages" / folder_name(arm) for arm in ARMS}
    last = []
    for arm, arm_flags in ARMS.items():
        begin = "parts"
        for stage, (folder, flags) in STAGES.items():
            name = f"stages/{folder_name(arm)}/{folder}"
            command = build_training_command(
                args,
                *("--model", "demo", "--stage", stage),
                *get_common_flags(args, f"{folder}.yaml", args.seed),
                *("--pretrained-checkpoint", args.out / begin),
                *get_run_flags(args, name),
                *flags,
                *args.flags,
                *arm_flags,
            )
            needs = (begin, "before", "prepare/others")
            jobs.append(Step(name, command, needs, SECONDS[stage], 4, f"stage {stage}, {arm}"))
            begin = name
        last.append(begin)
    compare = python(
        EXAMPLES / "demo" / "plot_stages.py",
        *("--before", args.out / "before" / "metrics.jsonl"),
        *(word for arm, folder in folders.items() for word in ("--run", arm, folder)),
        *("--out", args.out / "stages" / "stages.png", "--jsonl", args.out / "stages" / "stages.jsonl"),
    )
    return [*jobs, Step("stages/figures", compare, tuple(last), SECONDS["figures"], 5, "results", True)]


def plan_packing(args) -> list[Step]:
    """Return stages 1.5 and 2, packed and unpacked, of several seeds; both begin with the seed's stage 1."""
    jobs = [*plan_all_data(args), *plan_backbones(args, "", args.seed)]
    last = []
    for seed in args.seeds:
        folder = f"packing/seed-{seed}"
        first = f"{folder}/stage1"
        jobs.append(plan_packing_stage(args, "1", first, "parts", seed, PACKING_STAGE_1, "for both"))
        for arm, flags in PACKING_ARMS.items():
            begin = first
            for stage, of_arms in PACKING_STAGES.items():
                name = f"{folder}/{arm}/{STAGES[stage][0]}"
                jobs.append(plan_packing_stage(args, stage, name, begin, seed, flags + of_arms[arm], arm))
                begin = name
            last.append(begin)
    compare = python(
        EXAMPLES / "demo" / "plot_packing.py",
        *("--runs", *(args.out / "packing" / f"seed-{seed}" for seed in args.seeds)),
        *("--before", args.out / "before" / "metrics.jsonl"),
        *("--out", args.results / "demo-packing.png", "--jsonl", args.results / "demo-packing.jsonl"),
    )
    name = f"packing/figures-{'-'.join(map(str, args.seeds))}"
    return [*jobs, Step(name, compare, tuple(last), SECONDS["figures"], 5, "packed and unpacked", True)]


def plan_packing_stage(args, stage: str, name: str, begin: str, seed: int, flags: tuple, what: str) -> Step:
    command = build_training_command(
        args,
        *("--model", "demo", "--stage", stage),
        *get_common_flags(args, f"{STAGES[stage][0]}.yaml", seed),
        *("--pretrained-checkpoint", args.out / begin),
        *get_run_flags(args, name),
        *("--log-interval", "1"),  # each step's number of samples is in the figure
        *flags,
        *args.flags,
    )
    needs = (begin, "before", "prepare/others")
    return Step(name, command, needs, 0.6 * SECONDS[stage], 4, f"stage {stage}, seed {seed}, {what}")


def plan_all_data(args) -> list[Step]:
    """Return the jobs that write all data sets, the mixtures and the tokenizer."""
    others = ("questions", "texts", "words")
    command, sentence = build_prepare_command(args, *others), f"data: {', '.join(others)}"
    return [plan_captions(args), Step("prepare/others", command, ("prepare/captions",), 75, 1, sentence)]


def plan_captions(args) -> Step:
    """Return the job that writes the captions and the tokenizer."""
    sentence = "data: scenes with captions, as Energon shards, and a tokenizer"
    return Step("prepare/captions", build_prepare_command(args, "captions"), (), SECONDS["data"], 1, sentence)


def build_prepare_command(args, *kinds: str) -> tuple[str, ...]:
    """Return the command that writes data sets of these kinds, the mixtures and the tokenizer."""
    sizes = ("--train", args.scenes[0], "--validation", args.scenes[1]) if args.scenes else ()
    return python(EXAMPLES / "demo" / "prepare_data.py", "--out", args.data, "--kinds", *kinds, *sizes)


def plan_backbones(args, folder: str, seed: int) -> list[Step]:
    """Return the jobs that pretrain the backbones of a seed and measure them before stage 1."""
    parts = f"{folder}parts"
    length = ("--train-iters", args.backbone_iterations) if args.backbone_iterations else ()
    pretrain = torchrun(
        EXAMPLES / "demo" / "pretrain_backbones.py",
        *get_common_flags(args, "captions", seed),
        *("--load", args.out / parts, "--save", args.out / parts),
        *length,
        processes=args.processes,
    )
    measure = build_training_command(
        args,
        *get_stage_1_flags(args, folder, seed),
        *("--skip-train", "--metrics-file", args.out / folder / "before" / "metrics.jsonl"),
    )
    sentence = (
        f"pretrained backbones, seed {seed}: a language model of captions, a vision tower of scenes (two minutes)"
    )
    return [
        Step(parts, pretrain, ("prepare/captions",), SECONDS["pretraining"], 2, sentence),
        Step(f"{folder}before", measure, (parts,), SECONDS["before"], 3, "mutual-kNN of the two before stage 1"),
    ]


def plan_stage_1(args, folder: str, name: str, seed: int, flags: tuple[str, ...] = (), number: int = 4) -> list[Step]:
    """Return the job of stage 1, with the user's flags and then `flags`."""
    before = f"{folder}before"
    command = build_training_command(
        args, *get_stage_1_flags(args, folder, seed), *get_run_flags(args, folder + name), *args.flags, *flags
    )
    sentence = (
        f"stage 1, seed {seed}: vision tower and projector are trained, the language model is frozen (two minutes)"
    )
    sentence = " ".join([sentence, *args.flags, *flags])
    return [Step(folder + name, command, (before,), SECONDS["1"], number, sentence, measured_by=before)]


def plan_curves(args, arms: dict[str, str]) -> Step:
    """Return the job that draws the arms' curves in one figure."""
    groups = ((label, args.out / run / "metrics.jsonl") for label, run in arms.items())
    draw = python(
        EXAMPLES / "demo" / "plot_runs.py",
        *(word for group in groups for word in ("--group", *group)),
        *("--out", args.out / "curves.png"),
    )
    return Step("curves", draw, tuple(arms.values()), SECONDS["figures"], 6, "figures of both", True)


def plan_results(args, run: str) -> list[Step]:
    """Return the jobs that export a run's model and caption a scene with that."""
    folder = args.out / run
    export = python(
        *("-m", "checkpoint_conversion", "megatron-to-hf"),
        *("--checkpoint", folder, "--out", folder / "exported", "--overwrite"),
    )
    caption = python(
        EXAMPLES / "demo" / "caption_image.py",
        *("--hf", folder / "exported", "--data", args.data / "data" / "captions"),
    )
    form = "a held-out scene captioned with transformers (after so little training: expect its form, not its truth)"
    return [
        Step(f"{run}/export", export, (run,), SECONDS["export"], 7, "export to Hugging Face", True),
        Step(f"{run}/caption", caption, (f"{run}/export",), SECONDS["export"], 8, form, True),
    ]


def build_training_command(args, *flags) -> tuple[str, ...]:
    """Return the command of the training script under torchrun."""
    return torchrun(EXAMPLES / "pretrain_llava_rsa.py", *flags, processes=args.processes)


def get_stage_1_flags(args, folder: str, seed: int) -> tuple:
    """Return what the demo's stage 1 and the evaluation before it share."""
    return (
        *("--model", "demo", "--stage", "1", "--train-iters", "200"),
        *get_common_flags(args, "captions", seed),
        *("--pretrained-checkpoint", args.out / folder / "parts"),
    )


def get_common_flags(args, data: str, seed: int) -> tuple:
    """Return flags of the data below args.data, its tokenizer and the seed."""
    return (
        *("--data-path", args.data / "data" / data),
        *("--tokenizer-model", args.data / "tokenizer"),
        *("--seed", seed),
    )


def get_run_flags(args, run: str) -> tuple:
    """Return flags that write a run to its folder and resume it from there."""
    folder: Path = args.out / run
    return "--load", folder, "--save", folder, "--tensorboard-dir", folder / "tensorboard"
