"""Figures of alignment, from the JSON lines of rsa-megatron measure, of `make reproduce` and of `rsa-megatron realign report`.

    rsa-megatron plot heatmap results/x.jsonl --out results/heatmap
    rsa-megatron plot bars results/*.jsonl --out results/bars
    rsa-megatron plot stages results/reproduce.jsonl --out results/stages
    rsa-megatron plot steps results/reproduce.jsonl --figure "lm loss" --out results/loss
    rsa-megatron plot ablation results/reproduce.jsonl --out results/ablation
    rsa-megatron plot gap results/clip.jsonl --out results/clip

In the paper: figures 3 and C.1; figure 1(b); figure E.1; figure 4, with alignment or a loss; tables F.1 and G.1 as dots. The
last is the page of `rsa-megatron realign report`, for one pair of encoders.
Each writes OUT.png and OUT.svg, the same bytes each time. A bad file is reported in one line `error: ...` with its name,
the line and the key, and nothing is written.
"""

import argparse
from pathlib import Path

from rsa_megatron.command_line import Parser, report_errors
from rsa_megatron.plots import style
from rsa_megatron.plots.alignment import draw_bars, draw_heatmaps
from rsa_megatron.plots.alignment_records import STAGES, Run, read_alignments, read_runs
from rsa_megatron.plots.gap import draw_gap
from rsa_megatron.plots.gap_records import read_gap
from rsa_megatron.plots.runs import draw_ablation, draw_stages, draw_steps

MAIN_ARMS = ("with RSA", "without")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with report_errors(), style.styled():
        paths = style.save(args.draw(args), args.out)
    print(f"figure: {', '.join(map(str, paths))}")


def parse(arguments: list[str] | None):
    parser = Parser(prog="rsa-megatron plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    commands = {name: verbs.add_parser(name, help=function.__doc__) for name, function in VERBS.items()}
    for name, command in commands.items():
        command.set_defaults(draw=VERBS[name])
        command.add_argument("records", type=Path, nargs="+", metavar="JSONL", help="files with the lines to draw")
        command.add_argument("--out", type=Path, required=True, help="OUT.png and OUT.svg are written")
        if name in ("heatmap", "bars"):
            command.add_argument("--metric", help="metric to draw, if the files hold several")
        elif name != "gap":
            command.add_argument(
                "--figure",
                default="mutual-knn",
                help='what to draw: "lm loss", "accuracy on questions", ...; default: %(default)s',
            )
            command.add_argument(
                "--arms",
                nargs="+",
                metavar="ARM",
                help="arms to draw, in this order; default: all, or in stages and steps those with and without RSA",
            )
    commands["heatmap"].add_argument(
        "--scale",
        choices=("shared", "panel"),
        default="shared",
        help="one colour scale for all panels, or one for each; default: %(default)s",
    )
    commands["ablation"].add_argument("--stage", choices=STAGES, default="1", help="stage; default: %(default)s")
    return parser.parse_args(arguments)


def heatmap(args):
    """all pairs of layers"""
    return draw_heatmaps(read_alignments(args.records, args.metric), scale=args.scale)


def bars(args):
    """the best pair of each model and data set, with the baselines"""
    return draw_bars(read_alignments(args.records, args.metric))


def stages(args):
    """after each stage of training"""
    return draw_stages(select_arms(read_runs(args.records), args.arms, MAIN_ARMS), figure=args.figure)


def steps(args):
    """against the training step"""
    return draw_steps(select_arms(read_runs(args.records), args.arms, MAIN_ARMS), figure=args.figure)


def ablation(args):
    """before and after a stage, arm by arm"""
    return draw_ablation(select_arms(read_runs(args.records), args.arms), figure=args.figure, stage=args.stage)


def gap(args):
    """the page of a pair of encoders"""
    return draw_gap(read_gap(args.records))


VERBS = {function.__name__: function for function in (heatmap, bars, stages, steps, ablation, gap)}


def select_arms(runs: list[Run], arms: list[str] | None, usual: tuple[str, ...] = ()) -> list[Run]:
    """Select the runs of the requested arms, arm by arm; by default of the usual ones if present, else all."""
    present = style.unique(run.arm for run in runs)
    for arm in arms or ():
        if arm not in present:
            raise ValueError(f"--arms {arm!r}: no run is of that arm; arms: {', '.join(map(repr, present))}")
    chosen = arms or [arm for arm in usual if arm in present] or present
    return [run for arm in chosen for run in runs if run.arm == arm]
