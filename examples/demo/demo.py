"""Train the demo model with the RSA loss and without, and show the results: `make demo`.

    python examples/demo/demo.py                                  six minutes on two cores
    python examples/demo/demo.py --out other -- --rsa-weight 0.01 stage 1 with any flags of Megatron or of RSA
    python examples/demo/demo.py --compare                        four seeds, with RSA and without: `make demo-compare`
    python examples/demo/demo.py --stages                         three stages, with RSA and without: `make demo-stages`
    python examples/demo/demo.py --packing                        stages 1.5 and 2 packed and unpacked, three seeds
    python examples/demo/demo.py --dry-run                        what would run

What runs is in demo_plan.py. Finished steps are not repeated; a run that was killed resumes from its checkpoint. A step that
fails is named with its log, and the exit status is 1. A folder that holds a run with other settings is rejected.

    OUT/data, OUT/tokenizer     what is trained on; --data names another folder, which several runs can share
    OUT/parts                   the pretrained backbones
    OUT/stage1                  the run: run.log, metrics.jsonl, checkpoints, and `exported` in Hugging Face format
    OUT/without-rsa             the same with --rsa-weight 0
    OUT/curves.png              both
    OUT/seed-1/...              the same for each seed of --compare; the figure goes to RESULTS/demo.png
    OUT/stages/...              the stages of --stages, stages.png and stages.jsonl
    OUT/packing/seed-1/...      those of --packing; the figure goes to RESULTS/demo-packing.png
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from conclusion import format_conclusion
from demo_plan import Step, plan
from follower import Follower

from rsa_megatron.job_commands import environment
from rsa_megatron.job_queue import Queue, add_arguments, exit_on_mistakes, lock_folder, print_plan, run_and_report

ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    jobs = plan(args)
    if args.dry_run:
        return print_plan(jobs, args.jobs)
    with exit_on_mistakes():
        lock = lock_folder(args.out)
        queue = Queue(jobs, args.out, args.jobs, environment(count_threads(args)))
    with lock:
        run(queue, args)
        if not (args.compare or args.stages or args.packing):
            say(format_conclusion(args.out, args.data))


def run(queue: Queue, args) -> None:
    """Run the steps; print each when it starts, figures of training while it runs, and results when they are there."""
    follower = Follower(queue, say)

    def before_start(step: Step) -> None:
        announce(step)
        if step.measured_by and not queue.metrics(step.name).exists():
            queue.metrics(step.name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(queue.metrics(step.measured_by), queue.metrics(step.name))
        follower.start(step.name)

    for step in queue.jobs:
        if step.name in queue.done and step.shows_output:
            announce(step)
            show_output(queue, step)
    run_and_report(
        queue,
        args.time_limit,
        when_done=lambda step: show_output(queue, step),
        report=follower.read,
        say=lambda event: None,
        before_start=before_start,
        each_turn=follower.read,
    )


def announce(step: Step) -> None:
    """Print the number and the sentence of a step that starts."""
    say(f"[{step.number}] {step.sentence}")


def show_output(queue: Queue, step: Step) -> None:
    """Print what a step has printed, where that is a result."""
    if step.shows_output:
        say(queue.log(step.name).read_text(errors="replace").strip("\n"))


def say(text: str) -> None:
    print(text, flush=True)


def parse(arguments: list[str] | None):
    arguments = sys.argv[1:] if arguments is None else arguments
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="After -- come flags of examples/pretrain_llava_rsa.py, for the stages; the last one counts.",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="folder for the runs; %(default)s")
    parser.add_argument("--data", type=Path, help="folder for data and tokenizer; that of --out")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "results", help="where --compare and --packing draw; %(default)s"
    )
    parser.add_argument("--seed", type=int, default=1, help="%(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", help="of --compare, 1 2 3 1234, and of --packing, 1 2 3")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--compare", action="store_true", help="several seeds, with RSA and without")
    kind.add_argument("--stages", action="store_true", help="all three stages, with RSA and without")
    kind.add_argument("--packing", action="store_true", help="stages 1.5 and 2, packed and unpacked")
    parser.add_argument("--processes", type=int, help="of a run; one a GPU and at most two, or two on the CPU")
    parser.add_argument(
        "--scenes", type=int, nargs=2, metavar=("TRAIN", "HELD_OUT"), help="of each data set; those of prepare_data.py"
    )
    parser.add_argument("--backbone-iterations", type=int, help="iterations that pretrain the backbones; 200")
    add_arguments(parser, jobs=1)
    args = parser.parse_args(arguments[:end])
    args.flags = tuple(arguments[end + 1 :])
    args.out, args.results = args.out.resolve(), args.results.resolve()
    args.data = args.data.resolve() if args.data else args.out
    args.processes = args.processes or count_processes()
    args.seeds = args.seeds or ([1, 2, 3] if args.packing else [1, 2, 3, 1234])
    return args


def count_processes() -> int:
    """Return how many processes a run has: one a GPU and at most two; on the CPU two."""
    import torch

    return min(torch.cuda.device_count(), 2) or 2


def count_threads(args) -> int:
    """Return the threads of a process: all processes of all jobs share the cores."""
    return -(-len(os.sched_getaffinity(0)) // (args.processes * args.jobs))


if __name__ == "__main__":
    main()
