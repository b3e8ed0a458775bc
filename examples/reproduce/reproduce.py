"""Train with RSA and without, from one seed after the other, and report the results: `make reproduce`.

    python examples/reproduce/reproduce.py                        59 minutes on two cores
    python examples/reproduce/reproduce.py --full --jobs 10       longer runs, for a machine with many cores or a GPU
    python examples/reproduce/reproduce.py --dry-run              what would run, and for how long

What runs is in reproduction_plan.py. Finished jobs are not repeated; a run that was killed resumes from its checkpoint. A run that fails is named with its log, the others' results are written, and the exit status is 1.

    OUT/data, OUT/tokenizer     what is trained on
    OUT/runs/seed-1/...         a folder a run: command.json, run.log, done.json, its last checkpoint
    RESULTS/reproduce.jsonl     a line a stage of a run, with all its figures (reproduction_results.py), and pictures of them;
                                with --full, --data openmoji, --part val: reproduce-full.jsonl, and so on
"""

import argparse
import contextlib
import io
import shutil
from dataclasses import replace
from pathlib import Path

import reproduction_results as results
from reproduction_plan import BATCH, DEFAULT, FULL, Place, TrainingRun, plan

from rsa_megatron.cli import plot
from rsa_megatron.job_commands import environment
from rsa_megatron.job_queue import Job, Queue, add_arguments, exit_on_mistakes, lock_folder, print_plan, run_and_report

ROOT = Path(__file__).parents[2]
PICTURES = {
    "stages": ("stages",),
    "steps": ("steps",),
    "loss": ("steps", "--figure", "validation lm loss"),
    "questions": ("stages", "--figure", "accuracy on questions"),
    "ablation": ("ablation",),
}


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    jobs = plan(args.place, args.form, args.seeds, args.only)
    if args.skip_recorded:
        jobs = without_recorded(jobs, args)
    if args.dry_run:
        return print_plan(jobs, args.jobs, args.jsonl)
    with exit_on_mistakes():
        args.place.write_mixtures()
        lock = lock_folder(args.place.out)
        queue = Queue(jobs, args.place.out / "runs", args.jobs, environment())
    with lock:
        run(queue, args)


def run(queue: Queue, args) -> None:
    """Run the jobs; write the results after each and, at the end or when it is interrupted, tables and figures."""

    def when_done(job: Job) -> None:
        tidy(queue, job)
        results.write_lines(args.jsonl, collected(queue, args))

    run_and_report(queue, args.time_limit, when_done, lambda: report(queue, args))


def parse(arguments: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the longer form")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "demo" / "reproduce", help="folder for data and runs; %(default)s"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder for the results; %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument(
        "--data",
        choices=["scenes", "openmoji"],
        default="scenes",
        help="openmoji: stage 1 on pictures that the packages of [openmoji] bring; %(default)s",
    )
    parser.add_argument(
        "--only", choices=["main", "ablations"], help="the three stages, or stage 1 under other settings"
    )
    parser.add_argument(
        "--part",
        choices=["test", "val"],
        default="test",
        help="what is measured on; settings are chosen on val alone; %(default)s",
    )
    parser.add_argument(
        "--iterations",
        type=iterations,
        default={},
        metavar="STAGE=COUNT,...",
        help="another length of stages, as parts=200,1=100,1.5=60,2=60",
    )
    parser.add_argument("--samples", type=int, help=f"held-out pairs, a multiple of {BATCH}")
    parser.add_argument("--scenes", type=int, help="training scenes of each data set")
    parser.add_argument(
        "--skip-recorded",
        action="store_true",
        help="leave out runs whose lines are in the results already, as from another machine",
    )
    add_arguments(parser, jobs=2)
    args = parser.parse_args(arguments)
    form = FULL if args.full else DEFAULT
    sizes = {name: getattr(args, name) for name in ("samples", "scenes") if getattr(args, name)}
    args.form = replace(form, iterations=form.iterations | args.iterations, **sizes)
    if args.form.samples % BATCH:
        parser.error(f"--samples {args.form.samples} is no multiple of the batch, {BATCH}")
    if args.data == "openmoji" and (args.only or args.samples):
        parser.error(
            "--data openmoji has stage 1 alone and a validation part of its own: leave out --only and --samples"
        )
    args.place = Place(args.out.resolve(), args.data, "val" if args.data == "openmoji" else args.part)
    # Runs that settings are chosen by must not stand in for those that are reported.
    names = ["full"] * args.full + ["openmoji"] * (args.data == "openmoji") + ["val"] * (args.part == "val")
    args.jsonl = args.results / f"{'-'.join(['reproduce', *names])}.jsonl"
    args.about = about(args)
    return args


def iterations(text: str) -> dict[str, int]:
    """Parse "1=100,1.5=60" as {"1": 100, "1.5": 60}."""
    found = dict(item.partition("=")[::2] for item in text.split(","))
    for stage, count in found.items():
        if stage not in DEFAULT.iterations or not count.isdecimal() or not int(count):
            raise argparse.ArgumentTypeError(f"{text} is not as 1=100,1.5=60 of {', '.join(DEFAULT.iterations)}")
    return {stage: int(count) for stage, count in found.items()}


def about(args) -> dict:
    """Return what all lines share."""
    form = " ".join(f"{stage}={count}" for stage, count in args.form.iterations.items())
    form += f" scenes={args.form.scenes} anyres={args.form.anyres}"
    return {"data": args.data, "part": args.place.part, "num_samples": args.place.num_samples(args.form), "form": form}


def without_recorded(jobs: list[Job], args) -> list[Job]:
    """Return the jobs that lead to a line that is not there yet."""
    there = {results.key(line): line for line in results.merged(results.read_lines(args.jsonl), [], args.about)}
    wanted = set()
    for job in reversed(jobs):
        if isinstance(job, TrainingRun):
            line = there.get((args.about["data"], job.arm, job.seed, job.stage))
            if line is None or (job.score and not line["accuracy"]):
                wanted |= {job.name, job.before, *([job.score] if job.score else [])}
    for job in reversed(jobs):
        if job.name in wanted:
            wanted |= set(job.needs)
    return [job for job in jobs if job.name in wanted]


def tidy(queue: Queue, job: Job) -> None:
    """Remove the checkpoints of a run that is done, except the last where another run starts from it."""
    checkpoints = sorted((queue.folder / job.name).glob("iter_*"))
    needed = any(job.name in other.needs for other in queue.jobs)
    for checkpoint in checkpoints[: -1 if needed else None]:
        shutil.rmtree(checkpoint)


def collected(queue: Queue, args) -> list[dict]:
    """Return all lines: those of runs that are done, and what the file holds of others."""
    runs = [job for job in queue.jobs if isinstance(job, TrainingRun) and job.name in queue.done]
    new = [results.line_of(queue, run, args.about) for run in runs]
    return results.merged(results.read_lines(args.jsonl), new, args.about)


def report(queue: Queue, args) -> None:
    """Write results, tables and figures of what is done."""
    lines = collected(queue, args)
    if lines:
        results.write_lines(args.jsonl, lines)
        text = results.tables(lines)
        print(text)
        results.fill_page(args.results / "README.md", args.jsonl.stem, text)
        for name, (verb, *flags) in PICTURES.items():
            draw(verb, args.jsonl, *flags, "--out", args.results / f"{args.jsonl.stem}-{name}")


def draw(*arguments) -> None:
    """Draw a figure, where there is something to draw."""
    try:
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            plot.main([str(argument) for argument in arguments])
    except SystemExit:
        print(f"no figure: {errors.getvalue().strip()}")


if __name__ == "__main__":
    main()
