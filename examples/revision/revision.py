"""A scaled-down reproduction of ReVision: `make revision`. Can realigned text stand in for the images of stage 1?

    python examples/revision/revision.py --demo demo                     half an hour on two cores
    python examples/revision/revision.py --demo demo --dry-run           what would run, and for how long

On the demo's scenes, once:
    language    a language model that has read captions after notes (prepare_notes.py) and never had an image; frozen from then on
and of each seed:
    encoder     a small CLIP (train_dual_encoder.py)
    operator    each way to move text embeddings onto images, fitted by `rsa-megatron realign fit`
    shards      for each arm the captions with an embedding instead of the picture, by `rsa-megatron realign transform`
    train       one run an arm of pretrain_llava_rsa.py --stage revision: the projector alone learns, with equal steps, captions
                and order. Validation is on embeddings of REAL images of held-out scenes in all arms
    own         the same projector on held-out embeddings of its own arm's kind: what is lost from there to real images
The statistics are unpaired on purpose: those of images are of the first half of the training scenes, those of texts, and the
captions that are trained on, of the second half. "mean shift" is also ReAlign with its anchor step alone: move the mean, project.

What runs is in revision_plan.py. Finished jobs are not repeated; a run that was killed starts again.

    OUT/runs/seed-1/...     a folder a job: command.json, run.log, done.json, and what it wrote
    RESULTS/revision.jsonl  a line an arm and seed (revision_results.py); revision.md, revision.png and revision.svg from them
"""

import argparse
import json
from pathlib import Path

import revision_results as results
from revision_plan import ARMS, BATCH, PAIRED, USUAL, Arm, plan, shards_of, write_mixtures

from rsa_megatron import atomic
from rsa_megatron.job_commands import environment
from rsa_megatron.job_queue import Queue, add_arguments, exit_on_mistakes, lock_folder, print_plan, run_and_report
from rsa_megatron.plots import style

ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    jobs = plan(args)
    if args.dry_run:
        return print_plan(jobs, args.jobs, args.jsonl)
    with exit_on_mistakes():
        check_demo(args.demo)
        write_mixtures(args)
        lock = lock_folder(args.out)
        queue = Queue(jobs, args.out / "runs", args.jobs, environment())
    with lock:
        run_and_report(queue, args.time_limit, lambda job: None, lambda: report(queue, args))


def report(queue: Queue, args) -> None:
    arms = [job for job in queue.jobs if isinstance(job, Arm) and {job.name, job.own or job.name} <= queue.done]
    lines = [results.line_of(queue, job, args, shards_of(args, job.seed, PAIRED)) for job in arms]
    if lines:
        atomic.write_text(args.jsonl, "".join(json.dumps(line) + "\n" for line in lines))
        table = results.table_of(lines)
        print(table)
        atomic.write_text(args.results / "revision.md", table + "\n")
    if any(line["curve"] for line in lines):
        with style.styled():
            paths = style.save(results.draw(lines), args.results / "revision")
        print(f"figure: {', '.join(map(str, paths))}")


def parse(arguments: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--demo", type=Path, default=ROOT / "demo", help="folder that prepare_data.py has written; %(default)s"
    )
    parser.add_argument("--out", type=Path, help="folder for the runs; revision below that of the demo")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder for the results; %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        default=USUAL,
        metavar="ARM",
        help=f"of {', '.join(ARMS)}; all but an ablation",
    )
    parser.add_argument("--iterations", type=int, default=240, help="of each arm, 32 captions each; %(default)s")
    parser.add_argument("--language-iterations", type=int, default=500, help="of the language model; %(default)s")
    parser.add_argument("--encoder-steps", type=int, default=200, help="of the dual encoder; %(default)s")
    parser.add_argument(
        "--held-out", type=int, default=512, help=f"scenes to measure on, a multiple of {BATCH}; %(default)s"
    )
    add_arguments(parser, jobs=2)
    args = parser.parse_args(arguments)
    if args.held_out < BATCH or args.held_out % BATCH:
        parser.error(f"--held-out {args.held_out} is no multiple of the batch, {BATCH}")
    args.arms = [arm for arm in ARMS if arm in args.arms]
    args.jsonl = args.results / "revision.jsonl"
    args.demo, args.out = args.demo.resolve(), (args.out or args.demo / "revision").resolve()
    return args


def check_demo(folder: Path) -> None:
    for part in ("data/captions", "tokenizer"):
        if not (folder / part).exists():
            raise ValueError(f"{folder / part} is missing: `make revision` makes it")


if __name__ == "__main__":
    main()
