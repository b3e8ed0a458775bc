"""What `make revision` runs, as jobs (job_queue.py) with their flags, and the mixtures that they read.

`args` are those of examples/revision/revision.py: demo, out, seeds, arms, iterations, encoder_steps, language_iterations, held_out.
"""

from dataclasses import dataclass
from pathlib import Path

from rsa_megatron import atomic
from rsa_megatron.example_files import EXAMPLES
from rsa_megatron.job_commands import folder_name, get_checkpoint_flags, get_evaluation_interval, python, torchrun
from rsa_megatron.job_queue import Job

HERE = Path(__file__).parent
BATCH = 32
#: How each arm's text is moved: flags of `rsa-megatron realign fit`.
MOVED = {
    "raw text": ("--method", "none"),
    "mean shift": ("--method", "mean-shift"),
    "C3": ("--method", "c3"),
    "anchor and trace": ("--method", "realign", "--steps", "anchor", "trace"),
    "ReAlign": ("--method", "realign"),
}
PAIRED, UNTRAINED = "paired images", "untrained projector"
ARMS = (UNTRAINED, *MOVED, PAIRED)
#: What runs unless --arms says otherwise: an ablation would take three minutes more.
USUAL = [arm for arm in ARMS if arm != "anchor and trace"]
EVALUATIONS = 3
# Narrower than the demo's tower: a projector for embeddings of another width than the checkpoint's is re-initialised, from the seed.
WIDTH = 128
LANGUAGE = "language/train"
# Seconds on one core of two that are both at work.
SECONDS = {
    "encoder": 1.1,
    "language": 0.6,
    "iteration": 0.34,
    "evaluation": 3.5,
    "start": 8.0,
    "embed": 22.0,
    "shards": 6.0,
}


@dataclass(frozen=True)
class Arm(Job):
    """The training of one arm, which becomes a line of the results."""

    arm: str = ""
    seed: int = 0
    shards: Path | None = None
    """What it trains on; its val part is what `own` measures."""
    own: str | None = None
    """The job that measures it on held-out embeddings of its own kind."""


def plan(args) -> list[Job]:
    """Return all jobs, each after those it needs."""
    return plan_language(args) + [job for seed in args.seeds for job in plan_seed(args, seed)]


def plan_language(args) -> list[Job]:
    """Return the jobs that train the language model of all seeds. Its pictures are of notes' scenes and pass an untrained tower, which no arm uses."""
    runs, count = args.out / "runs", args.language_iterations
    notes = python(HERE / "prepare_notes.py", "--data", captions(args), "--out", runs / "language" / "notes" / "data")
    train = torchrun(
        EXAMPLES / "demo" / "pretrain_backbones.py",
        *("--model", "demo", "--tokenizer-model", args.demo / "tokenizer", "--seed", 1),
        *("--data-path", runs / "language" / "notes" / "data", "--trainable", "embeddings", "language"),
        *("--num-workers", 1, "--micro-batch-size", BATCH, "--global-batch-size", BATCH, "--train-iters", count),
        *get_checkpoint_flags(runs / LANGUAGE, count),
    )
    return [
        Job("language/notes", notes, (), SECONDS["start"] + SECONDS["embed"]),
        Job(LANGUAGE, train, ("language/notes",), SECONDS["start"] + count * SECONDS["language"]),
    ]


def plan_seed(args, seed: int) -> list[Job]:
    name, runs = f"seed-{seed}", args.out / "runs"
    encoder, images = f"{name}/encoder", f"{name}/{folder_name(PAIRED)}/shards"
    train = python(
        HERE / "train_dual_encoder.py",
        *("--data", captions(args), "--tokenizer", args.demo / "tokenizer", "--seed", seed),
        *("--steps", args.encoder_steps, "--projection-dim", WIDTH, "--out", runs / encoder / "model"),
    )
    of_encoder = ("--encoder", runs / encoder / "model", "--store", runs / encoder / "features")
    jobs = [
        Job(encoder, train, (), SECONDS["start"] + args.encoder_steps * SECONDS["encoder"]),
        Job(
            images,
            python(
                *("-m", "rsa_megatron", "realign", "transform"),
                *of_encoder,
                *("--data", captions(args), "--side", "image", "--out", shards_of(args, seed, PAIRED)),
            ),
            (encoder,),
            SECONDS["embed"],
        ),
    ]
    if UNTRAINED in args.arms:
        jobs.append(plan_untrained(args, seed, images))
    for arm in MOVED:
        if arm in args.arms:
            jobs += plan_shards(args, seed, arm, of_encoder, encoder)
            jobs += plan_training(args, seed, arm, images)
    return jobs + (plan_training(args, seed, PAIRED, images) if PAIRED in args.arms else [])


def plan_shards(args, seed: int, arm: str, of_encoder: tuple, encoder: str) -> list[Job]:
    """Return the jobs that fit an arm's operator and write its shards. The first arm's jobs store the embeddings, which the others wait for."""
    first, mine = (
        f"seed-{seed}/{folder_name(name)}" for name in (next(name for name in MOVED if name in args.arms), arm)
    )
    runs, begins = args.out / "runs", mine == first
    fit = python(
        *("-m", "rsa_megatron", "realign", "fit"),
        *of_encoder,
        *("--data", args.out / "images.yaml", "--text-data", args.out / "texts.yaml"),
        *MOVED[arm],
        *("--out", runs / mine / "operator" / "fitted"),
    )
    transform = python(
        *("-m", "rsa_megatron", "realign", "transform"),
        *of_encoder,
        *("--operator", runs / mine / "operator" / "fitted", "--data", captions(args), "--side", "text"),
        *("--out", shards_of(args, seed, arm)),
    )
    seconds = SECONDS["embed" if begins else "start"]
    return [
        Job(f"{mine}/operator", fit, (encoder,) if begins else (f"{first}/operator",), seconds),
        Job(
            f"{mine}/shards",
            transform,
            (f"{mine}/operator", *([] if begins else [f"{first}/shards"])),
            seconds + SECONDS["shards"],
        ),
    ]


def plan_training(args, seed: int, arm: str, images: str) -> list[Job]:
    """Return the jobs that train an arm's projector and measure it on held-out embeddings of the arm's kind."""
    mine, count = f"seed-{seed}/{folder_name(arm)}", args.iterations
    folder, own = args.out / "runs" / mine / "train", f"{mine}/own"
    train = build_stage_command(
        args,
        seed,
        mixture(args, seed, arm),
        *("--train-iters", count, "--eval-interval", get_evaluation_interval(count, EVALUATIONS)),
        *("--save", folder, "--load", folder, "--save-interval", count),
        *("--pretrained-checkpoint", args.out / "runs" / LANGUAGE),
    )
    on_own = build_stage_command(
        args,
        seed,
        mixture(args, seed, arm, of=arm),
        *("--metrics-file", args.out / "runs" / own / "metrics.jsonl", "--skip-train", "--train-iters", 1),
        *("--pretrained-checkpoint", folder),
    )
    is_paired = arm == PAIRED  # its own kind is real images
    seconds = SECONDS["start"] + count * SECONDS["iteration"] + EVALUATIONS * SECONDS["evaluation"]
    job = Arm(
        f"{mine}/train",
        train,
        (f"{mine}/shards", images, LANGUAGE),
        seconds,
        arm=arm,
        seed=seed,
        shards=shards_of(args, seed, arm),
        own=None if is_paired else own,
    )
    return [job] if is_paired else [job, Job(own, on_own, (job.name,), SECONDS["start"] + SECONDS["evaluation"])]


def plan_untrained(args, seed: int, images: str) -> Job:
    """Return the job that measures the projector as it is initialised, without any stage."""
    name = f"seed-{seed}/{folder_name(UNTRAINED)}"
    measure = build_stage_command(
        args,
        seed,
        mixture(args, seed, PAIRED),
        *("--metrics-file", args.out / "runs" / name / "metrics.jsonl", "--skip-train", "--train-iters", 1),
        *("--pretrained-checkpoint", args.out / "runs" / LANGUAGE),
    )
    return Arm(name, measure, (images, LANGUAGE), SECONDS["start"] + SECONDS["evaluation"], arm=UNTRAINED, seed=seed)


def build_stage_command(args, seed: int, data: Path, *flags) -> tuple[str, ...]:
    return torchrun(
        EXAMPLES / "pretrain_llava_rsa.py",
        *("--model", "demo", "--stage", "revision", "--tokenizer-model", args.demo / "tokenizer"),
        *("--image-embedding-width", WIDTH, "--seed", seed, "--num-workers", 1, "--micro-batch-size", BATCH),
        *("--global-batch-size", BATCH, "--eval-iters", args.held_out // BATCH, "--mutual-knn-samples", 0),
        *("--data-path", data),
        *flags,
    )


def captions(args) -> Path:
    return args.demo / "data" / "captions"


def shards_of(args, seed: int, arm: str) -> Path:
    return args.out / "runs" / f"seed-{seed}" / folder_name(arm) / "shards" / "data"


def mixture(args, seed: int, arm: str, *, of: str = PAIRED) -> Path:
    """Return the mixture that trains an arm, validated on held-out embeddings `of` an arm; default: real images."""
    name = f"seed-{seed}-{folder_name(arm)}{'' if of == PAIRED else '-own'}"
    return args.out / "mixtures" / f"{name}.yaml"


# All evaluations are of the same scenes: validation goes on where it was, and begins again at the end of the part.
MIXTURE = """\
__module__: megatron.energon
__class__: MetadatasetV2
splits:
  train: {{path: {train}, subset: {{range: [{first}, {last}]}}}}
  val: {{path: {val}, subset: {{range: [0, {held_out}]}}}}
"""


def write_mixtures(args) -> None:
    """Write mixtures of the two halves of the training scenes, and of the second half of each arm's shards."""
    (args.out / "mixtures").mkdir(parents=True, exist_ok=True)
    numbers = {"held_out": args.held_out, "first": "50%", "last": "100%"}
    for name, first, last in (("images", "0%", "50%"), ("texts", "50%", "100%")):
        halves = numbers | {"first": first, "last": last}
        atomic.write_text(args.out / f"{name}.yaml", MIXTURE.format(train=captions(args), val=captions(args), **halves))
    for seed in args.seeds:
        for arm in (*MOVED, PAIRED):
            for of in (PAIRED, arm):
                train, val = (shards_of(args, seed, name) for name in (arm, of))
                atomic.write_text(mixture(args, seed, arm, of=of), MIXTURE.format(train=train, val=val, **numbers))
