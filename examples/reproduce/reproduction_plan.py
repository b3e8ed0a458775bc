"""What `make reproduce` runs: the paper's comparisons scaled down, as jobs (job_queue.py) with their flags.

Of each seed: parts of its own (pretrain_backbones.py), what they are worth before any training, and from them
    main        the three stages with RSA and without, and stage 2 right after stage 1 (figures E.1 and 4); each model
                after stage 2 is exported and asked (score_answers.py)
    ablations   stage 1 under other settings of RSA (tables 2, F.1 and G.1), as long as the main one, whose stage 1 is
                a row of each of these tables
With --data openmoji: stage 1 with RSA and without on OpenMoji's pictures and names (prepare_openmoji.py), from the parts of
the scenes: the names are too few to pretrain a language model on, and its pictures have no labels. Its validation part is
what is measured on; no setting was chosen on it.
All stages take micro-batches of a whole batch on one process: the RSA loss compares 32 pairs in stage 1. The default form
shows pictures as one tile in all stages: AnyRes, which the recipes of stages 1.5 and 2 have, costs four times as much.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from rsa_megatron.example_files import EXAMPLES
from rsa_megatron.job_commands import folder_name, get_checkpoint_flags, get_evaluation_interval, python, torchrun
from rsa_megatron.job_queue import Job

BATCH = 32
WITHOUT = ("--rsa-weight", "0")
ANYRES = ("--image-aspect-ratio", "anyres", "--seq-length", "448")
ALL_LEARN = ("--trainable", "vision", "projector", "embeddings", "language")
# Stages 1.5 and 2 learn the answers alone, at the rate of the parts. With LLaVA's labels so short a stage 2 learns the
# template, and greedy decoding begins every answer with a token of it: of 1280 questions of val none was right after 60
# iterations. With these 0.15 of them were, and after 120 iterations 0.37.
LATER_STAGES = ("--label-style", "answer_only", "--lr", "2e-3", "--vision-lr", "4e-4")
MAIN = {"with RSA": (), "without": WITHOUT}
#: Data sets of a stage's mixture beside the captions.
MIXED = {"1": (), "1.5": ("data/words", "data/texts"), "2": ("data/questions",)}
ANYRES_ARMS = {
    "AnyRes, base pooling": ANYRES,
    "AnyRes, full pooling": (*ANYRES, "--rsa-image-pooling", "full"),
}
#: Stage 1 under other settings. The recipe's: Euclidean, weight 0.001, one tile, a frozen language model.
ABLATIONS = {
    "Euclidean, weight 0.0001": ("--rsa-weight", "0.0001"),
    "Euclidean, weight 0.01": ("--rsa-weight", "0.01"),
    "cosine, weight 1": ("--rsa-distance", "cosine", "--rsa-weight", "1"),
    "cosine, weight 10": ("--rsa-distance", "cosine", "--rsa-weight", "10"),
    "cosine, weight 100": ("--rsa-distance", "cosine", "--rsa-weight", "100"),
    "mean-distance, weight 1": ("--rsa-normalize", "mean-distance", "--rsa-weight", "1"),
    "caption read alone": ("--rsa-text-source", "caption"),
    "all learns, RSA moves both": ALL_LEARN,
    "all learns, RSA moves the tower": (*ALL_LEARN, "--rsa-stop-gradient", "text"),
    "all learns, without": (*ALL_LEARN, *WITHOUT),
    **ANYRES_ARMS,
}
OPENMOJI_ABLATIONS = {"mean-distance, weight 1": ABLATIONS["mean-distance, weight 1"]}
OPENMOJI_SAMPLES = 384
# Seconds on one core of two that are both at work: to start a process, of an iteration of 32 samples of one tile each, how
# many times as long it takes with AnyRes, and of a held-out pair's LM loss and vectors.
START = 15.0
ITERATION = {"parts": 0.8, "1": 0.75, "1.5": 1.0, "2": 1.0}
ANYRES_TIMES = 4
EVALUATED_PAIR = 0.018


@dataclass(frozen=True)
class Form:
    """How much of everything."""

    iterations: dict[str, int]
    """Of "parts" and of each stage."""
    samples: int
    """Held-out pairs of each evaluation, a multiple of the batch."""
    scenes: int
    """Training scenes of each data set."""
    evaluations: dict[str, int]
    """How often each stage of the main runs is evaluated, its end included, and each of the "ablations"."""
    anyres: bool
    """Whether stages 1.5 and 2 cut pictures into tiles, as their recipes do, and every seed has the AnyRes ablations, not
    the first alone."""


DEFAULT = Form(
    {"parts": 150, "1": 60, "1.5": 40, "2": 80}, 512, 6000, {"1": 3, "1.5": 1, "2": 1, "ablations": 1}, anyres=False
)
FULL = Form(
    {"parts": 400, "1": 600, "1.5": 300, "2": 300},
    1024,
    10000,
    {"1": 12, "1.5": 6, "2": 6, "ablations": 4},
    anyres=True,
)


@dataclass(frozen=True)
class TrainingRun(Job):
    """A stage of a run, which becomes a line of the results."""

    arm: str = ""
    seed: int = 0
    stage: str = ""
    iterations: int = 0
    flags: tuple[str, ...] = ()
    before: str = ""
    """The job that measures what its arm begins from."""
    score: str | None = None
    """The job that asks its model, after stage 2."""


@dataclass(frozen=True)
class Place:
    """Where everything lies, and what the figures are taken on."""

    out: Path
    data: str
    """ "scenes" or "openmoji"."""
    part: str
    """Which is held out."""

    @property
    def mixtures(self) -> Path:
        return self.out / "data" / f"reproduce-{self.part}"

    def write_mixtures(self) -> None:
        """Write the mixtures of the stages, with the split that is measured on."""
        self.mixtures.mkdir(parents=True, exist_ok=True)
        for file in (EXAMPLES / "mixtures" / "reproduce").glob("*.yaml"):
            text = file.read_text().replace("split_part: test", f"split_part: {self.part}")
            (self.mixtures / file.name).write_text(text)

    def mixture(self, stage: str) -> Path:
        """Return the value of --data-path."""
        if self.data == "openmoji":
            return self.out / "data" / "openmoji"
        return self.mixtures / f"stage{stage.replace('.', '_')}.yaml"

    def of_seed(self, seed: int) -> str:
        """Return the folder of a seed's runs on this data."""
        return f"seed-{seed}" if self.data == "scenes" else f"seed-{seed}/{self.data}"

    def num_samples(self, form: "Form") -> int:
        return OPENMOJI_SAMPLES if self.data == "openmoji" else form.samples


def plan(place: Place, form: Form, seeds: list[int], only: str | None) -> list[Job]:
    """Return all jobs, each after those it needs; `only`: "main" or "ablations", with what these need."""
    if place.data == "openmoji":
        return plan_openmoji(place, form, seeds)
    kinds = ["captions"] if only == "ablations" else ["captions", "questions", "texts", "words"]
    jobs = plan_data(place, form, kinds)
    for seed in seeds:
        jobs += plan_parts(place, form, seed)
    if only != "ablations":
        for seed in seeds:
            jobs += plan_main(place, form, seed)
    if only != "main":
        for seed in seeds:
            arms = (MAIN if only == "ablations" else {}) | ABLATIONS
            left_out = {} if form.anyres or seed == seeds[0] else ANYRES_ARMS
            jobs += [plan_run(place, form, seed, arm, "1", flags) for arm, flags in arms.items() if arm not in left_out]
    return jobs


def plan_openmoji(place: Place, form: Form, seeds: list[int]) -> list[Job]:
    draw = python(EXAMPLES / "reproduce" / "prepare_openmoji.py", "--out", place.mixture("1"))
    jobs = [*plan_data(place, form, ["captions"]), Job("data/openmoji", draw, (), 15)]
    for seed in seeds:
        jobs += plan_parts(place, form, seed)
        jobs += [plan_run(place, form, seed, arm, "1", flags) for arm, flags in (MAIN | OPENMOJI_ABLATIONS).items()]
    return jobs


def plan_data(place: Place, form: Form, kinds: list[str]) -> list[Job]:
    """Return the jobs that write the data sets; with the captions comes the tokenizer."""
    sizes = ("--train", form.scenes, "--validation", form.samples, "--test", form.samples)
    seconds = 5 + 0.004 * (form.scenes + 2 * form.samples)
    return [
        Job(
            f"data/{kind}",
            python(EXAMPLES / "demo" / "prepare_data.py", "--out", place.out, "--kinds", kind, *sizes),
            () if kind == "captions" else ("data/captions",),
            seconds,
        )
        for kind in kinds
    ]


def plan_parts(place: Place, form: Form, seed: int) -> list[Job]:
    """Return the jobs that pretrain a seed's parts and measure them before they are trained together."""
    parts, before, count = f"seed-{seed}/parts", f"{place.of_seed(seed)}/before", form.iterations["parts"]
    data = ("data/captions",) if place.data == "scenes" else ("data/openmoji",)
    train = torchrun(
        EXAMPLES / "demo" / "pretrain_backbones.py",
        *get_common_flags(place, seed),
        *get_checkpoint_flags(place.out / "runs" / parts, count),
        *("--data-path", place.out / "data" / "captions", "--train-iters", count),
    )
    measure = torchrun(
        EXAMPLES / "pretrain_llava_rsa.py",
        *get_common_flags(place, seed),
        *get_evaluation_flags(place.num_samples(form), 1, 1),
        *("--stage", "1", "--skip-train", "--train-iters", 1),
        *("--metrics-file", place.out / "runs" / before / "metrics.jsonl", "--data-path", place.mixture("1")),
        *("--pretrained-checkpoint", place.out / "runs" / parts),
    )
    return [
        Job(parts, train, ("data/captions",), START + count * ITERATION["parts"]),
        Job(before, measure, (parts, *data), START + form.samples * EVALUATED_PAIR),
    ]


def plan_main(place: Place, form: Form, seed: int) -> list[Job]:
    """Return three stages and, from the first, the last without the one between; each final model is scored on questions."""
    jobs = []
    for arm, flags in MAIN.items():
        first = plan_run(place, form, seed, arm, "1", flags)
        second = plan_run(place, form, seed, arm, "1.5", flags, begin=first.name)
        # Stage 2 is without RSA in all arms: its recipe says so.
        whole = plan_run(place, form, seed, arm, "2", (), begin=second.name)
        shortened = plan_run(place, form, seed, f"{arm}, no stage 1.5", "2", (), begin=first.name)
        jobs += [first, second, *plan_scoring(place, form, whole), *plan_scoring(place, form, shortened)]
    return jobs


def plan_run(
    place: Place, form: Form, seed: int, arm: str, stage: str, flags: tuple[str, ...], begin: str | None = None
) -> TrainingRun:
    """Return a stage that starts from the weights of the job `begin`, or else from the seed's parts."""
    name, count = f"{place.of_seed(seed)}/{folder_name(arm)}/stage-{stage}", form.iterations[stage]
    begin, before = begin or f"seed-{seed}/parts", f"{place.of_seed(seed)}/before"
    if stage != "1":
        flags = (*LATER_STAGES, *(() if form.anyres else ("--image-aspect-ratio", "square")), *flags)
    evaluations = form.evaluations["ablations" if arm in ABLATIONS else stage]
    command = torchrun(
        EXAMPLES / "pretrain_llava_rsa.py",
        *get_common_flags(place, seed),
        *get_evaluation_flags(place.num_samples(form), count, evaluations),
        *get_checkpoint_flags(place.out / "runs" / name, count),
        *("--stage", stage, "--data-path", place.mixture(stage), "--train-iters", count),
        *("--pretrained-checkpoint", place.out / "runs" / begin),
        *flags,
    )
    is_anyres = "anyres" in flags or (stage != "1" and form.anyres)
    seconds = START + count * ITERATION[stage] * (ANYRES_TIMES if is_anyres else 1)
    seconds += evaluations * form.samples * EVALUATED_PAIR
    return TrainingRun(
        name,
        command,
        (begin, before, *MIXED[stage]),
        seconds,
        arm=arm,
        seed=seed,
        stage=stage,
        iterations=count,
        flags=flags,
        before=before,
    )


def plan_scoring(place: Place, form: Form, run: TrainingRun) -> list[Job]:
    """Return the run, its export to Hugging Face and its scoring on questions."""
    folder, export, score = place.out / "runs" / run.name, f"{run.name}/export", f"{run.name}/score"
    to_hf = python(
        *("-m", "checkpoint_conversion", "megatron-to-hf", "--checkpoint", folder, "--out", folder / "hf-export"),
        "--overwrite",
    )
    data = [place.out / "data" / kind for kind in ("questions", "captions")]
    ask = python(
        EXAMPLES / "reproduce" / "score_answers.py",
        *("--hf", folder / "hf-export", "--data"),
        *data,
        *("--part", place.part, "--samples", form.samples),
        *("--image-aspect-ratio", "anyres" if form.anyres else "square"),
        *("--out", place.out / "runs" / score / "scores.json"),
    )
    return [
        replace(run, score=score),
        Job(export, to_hf, (run.name,), 6.0),
        Job(score, ask, (export,), 12 + form.samples * (0.06 if form.anyres else 0.02)),
    ]


def get_common_flags(place: Place, seed: int) -> tuple:
    return (
        *("--model", "demo", "--tokenizer-model", place.out / "tokenizer", "--seed", seed, "--num-workers", 1),
        *("--micro-batch-size", BATCH, "--global-batch-size", BATCH),
    )


def get_evaluation_flags(samples: int, iterations: int, times: int) -> tuple:
    """Return flags that measure on the whole held-out split each time, so that a resumed run measures the same."""
    interval = get_evaluation_interval(iterations, times)
    return "--eval-interval", interval, "--eval-iters", samples // BATCH, "--mutual-knn-samples", samples
