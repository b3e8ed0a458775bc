"""Every flag of Megatron's parser is known to work, or is refused in one line (tests/megatron_flags.py, training/flag_checks.py)."""

import collections
import json
import re

import pytest

from tests import megatron_flags
from tests.support import processes, script


def refuse_each(tokenizer: str) -> dict:
    """Parse once; then give each argument another value than its default, and ask."""
    import argparse
    import copy
    import sys

    from megatron.training.arguments import add_megatron_arguments

    from rsa_megatron.plugin import RSAPlugin
    from rsa_megatron.training import arguments, flag_checks, packing_arguments, unknown_flags
    from tests.support import tiny

    tiny.register()
    sys.argv = ["pretrain_llava_rsa.py", "--model", "tiny", "--tokenizer-model", tokenizer]
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    flags = {action.dest: action.option_strings[0] for action in reversed(parser._actions) if action.dest != "help"}
    arguments.add_arguments(parser, RSAPlugin(), None)
    args = parser.parse_args()
    flag_checks.check_flags(parser, args)  # the defaults pass

    def refuse(name: str) -> str:
        changed = copy.copy(args)
        setattr(changed, name, "another value")
        try:
            flag_checks.check_flags(parser, changed)
        except ValueError as error:
            return str(error)
        return ""

    def refuse_packed(name: str, value) -> str:
        packed = copy.copy(args)
        vars(packed).update({"packing_buffer_size": 8, "micro_batch_size": 1, name: value})
        try:
            packing_arguments.check_packing(packed)
        except ValueError as error:
            return str(error)
        return ""

    families = [*flag_checks.REFUSED.values(), flag_checks.NEEDS_TRANSFORMER_ENGINE, flag_checks.NEEDS_CUDA]
    return {
        "flags": flags,
        "refused": [name for family in families for name in family.split()],
        "choices": list(flag_checks.CHOICES),
        "said": {name: refuse(name) for name in flags},
        "not there": [
            word
            for name in unknown_flags.ELSEWHERE.values()
            for word in re.findall(r"--[a-z-]+", name)
            if word not in parser._option_string_actions and word != "--images"  # of rsa-megatron data pack
        ],
        "there": [name for name in unknown_flags.ELSEWHERE if name in parser._option_string_actions],
        # What needs a GPU or Transformer Engine is refused here for that.
        "packed": {
            name: refuse_packed(name, value)
            for name, value in dict(
                cuda_graph_impl="local", enable_cuda_graph=True, external_cuda_graph=True, tp_comm_overlap=True, seed=5
            ).items()
        },
        "of one value": flag_checks.is_changed(parser, argparse.Namespace(cp_comm_type=["p2p"]), "cp_comm_type"),
    }


@pytest.fixture(scope="module")
def found(demo) -> dict:
    return processes.run(refuse_each, 1, str(demo / "tokenizer"))[0]


def names_of(families) -> list[str]:
    return [
        name for family in (families.values() if isinstance(families, dict) else [families]) for name in family.split()
    ]


WORKS = [
    *(
        name
        for table in (megatron_flags.TESTED, megatron_flags.TRIED, megatron_flags.PASSED_ON)
        for name in names_of(table)
    ),
    *names_of(megatron_flags.ALWAYS_SO),
]


def test_the_table_has_each_of_megatrons_flags_once(found):
    listed = collections.Counter([*WORKS, *names_of(megatron_flags.UNCHECKED), *found["refused"]])
    assert set(found["flags"]) - set(listed) == set(), "flags of this Megatron of which nothing is known"
    assert set(listed) - set(found["flags"]) == set(), "flags that this Megatron does not have"
    assert [name for name, count in listed.items() if count > 1] == []


def test_what_is_refused_is_refused_in_one_line_and_nothing_else_is(found):
    for name, said in found["said"].items():
        if name in found["refused"] or name in found["choices"]:
            assert said.startswith(found["flags"][name]) and said.count("\n") == 0
            assert any(remedy in said for remedy in ("leave it out", "name --", "choose ")), said
        elif name not in ("profile", "wandb_project", "step_batch_size_schedule"):
            assert said == "", name
    assert not found["of one value"]


def test_what_other_trainers_call_it_is_a_flag_here(found):
    assert found["not there"] == [] and found["there"] == []


def test_what_packed_rows_do_not_go_with_is_refused(found):
    said = found["packed"]
    assert said.pop("seed") == "" and said.pop("tp_comm_overlap").startswith(
        "--packing-buffer-size 8 does not go with --tp-comm-overlap, whose buffers are for rows of exactly --seq-length"
    )
    assert all(line.startswith("--packing-buffer-size 8 does not go with CUDA graphs") for line in said.values())


GIVEN = [
    ("--num-experts 4", "--num-experts: the decoder has no experts; leave it out"),
    ("--mtp-num-layers 1", "--mtp-num-layers: the decoder predicts the next token alone; leave it out"),
    (
        "--rampup-batch-size 8 8 64",
        "--rampup-batch-size: Megatron 0.19 does not read it; name --step-batch-size-schedule and",
    ),
    ("--tp-comm-overlap", "--tp-comm-overlap: it needs Transformer Engine's layers"),
    ("--use-megatron-fsdp", "--use-megatron-fsdp: parameters cannot be sharded here"),
    ("--profile", "--profile: Nsight needs a GPU; add --use-pytorch-profiler, or leave it out"),
    (
        "--ckpt-format fsdp_dtensor",
        "--ckpt-format fsdp_dtensor: it is of parameters sharded by FSDP; choose torch_dist",
    ),
    ("--wandb-project mine", "--wandb-project: name --save or --wandb-save-dir too, for its files"),
    (
        "--step-batch-size-schedule 0:8",
        "--step-batch-size-schedule: name --train-samples beside it, and not --train-iters",
    ),
    ("--attention-backend local", "--attention-backend: it needs Transformer Engine's layers"),
    ("--overlap-param-gather", "--overlap-param-gather only supported with distributed optimizer"),
    (
        "--packing-buffer-size -1",
        "argument --packing-buffer-size: -1 is no number of samples: name 0 (a row a sample) or more",
    ),
    (
        "--packing-buffer-size 8 --micro-batch-size 4",  # the recipe's, and named all the same
        "--packing-buffer-size 8 does not go with --micro-batch-size 4, as a packed row is a micro-batch of its own: leave it out",
    ),
    (
        "--packing-buffer-size 8 --seq-length 1024",
        "",
    ),  # a row, longer than the 512 positions of any sample of this model
    (
        "--packing-max-tiles 4",
        "--packing-max-tiles is of packed rows: name --packing-buffer-size (1000), or leave it out",
    ),
    (
        "--packing-buffer-size 8 --packing-max-tiles 4 --image-aspect-ratio anyres",
        "--packing-max-tiles 4: the largest image alone has 5; name that or more, or smaller --image-grids",
    ),
    (
        "--eval-micro-batch-size 3",
        "--eval-global-batch-size 8 is not a multiple of --eval-micro-batch-size 3 x DP 2: change one of the three",
    ),
    ("--packing-buffer-size 8 --packing-max-tiles 5 --image-aspect-ratio anyres --micro-batch-size 1", ""),
    (
        "--packing-buffer-size 8 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --eval-micro-batch-size 4 "
        "--eval-global-batch-size 4 --eval-iters 1",
        "--eval-global-batch-size 4 is 1 micro-batch(es) a rank, and interleaved pipeline stages take 2 at a time: raise it",
    ),
    (
        "--packing-buffer-size 8 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --eval-micro-batch-size 8 --eval-iters 1",
        "",  # evaluations of 16 samples, though a step has 8 rows
    ),
    ("--packing-buffer-size 8 --eval-micro-batch-size 3", ""),  # evaluations of 12 samples
    ("--packing-buffer-size 8 --calculate-per-token-loss --decrease-batch-size-if-needed", ""),
    ("--num-layer 2", "unrecognized arguments: --num-layer 2; did you mean --num-layers?"),
    ("--rsa-wieght 2", "unrecognized arguments: --rsa-wieght 2; did you mean --rsa-weight?"),
    ("--quite-another-thing", "unrecognized arguments: --quite-another-thing"),
    # What other trainers call it.
    ("--learning_rate 1e-4", "unrecognized arguments: --learning_rate 1e-4; did you mean --lr?"),
    ("--learning-rate=1e-4", "unrecognized arguments: --learning-rate=1e-4; did you mean --lr?"),
    ("--micro_batch_size 2", "unrecognized arguments: --micro_batch_size 2; did you mean --micro-batch-size?"),
    (
        "--gradient_accumulation_steps 2",
        "unrecognized arguments: --gradient_accumulation_steps 2: here it is --global-batch-size (",
    ),
    (
        "--output_dir out --no-such-thing --per_device_train_batch_size 2",
        "unrecognized arguments: --output_dir out --no-such-thing --per_device_train_batch_size 2; --output_dir is --save here; "
        "--per_device_train_batch_size is --micro-batch-size here",
    ),
    ("--bf16 True", "--bf16 takes no value, and True is one: it stands alone, or is left out to turn it off"),
    ("out", "unrecognized arguments: out"),
    # What Megatron's checks would say in names that nobody has typed, or not at all.
    ("--log-interval 0", "--log-interval 0: it is 1 or more"),
    ("--eval-interval 0", "--eval-interval 0: it is 1 or more; --eval-iters 0 turns evaluation off"),
    ("--num-workers -1", "--num-workers -1: it is 0 or more"),
    ("--hidden-dropout 2", "--hidden-dropout 2.0: it is from 0 to below 1"),
    (
        "--seq-length 161",
        "--seq-length 161 is above the 160 positions of --model tiny (--max-position-embeddings): lower",
    ),
    ("--seq-length 160", ""),
    ("--fp16 --bf16", "--fp16 and --bf16 exclude each other: leave one out"),
    ("--min-lr 1", "--min-lr 1 is above --lr 0.001, from which the rate decays to it: lower it"),
    (
        "--lr-warmup-iters 6",
        "--lr-warmup-iters 6 is not below the 6 iterations after which the learning rate has decayed",
    ),
    ("--lr-warmup-iters 5 --lr-decay-iters 5", "--lr-warmup-iters 5 is not below the 5 iterations "),
    ("--lr-warmup-iters 5", ""),
    ("--lr-warmup-iters 2 --lr-warmup-fraction 0.1", "--lr-warmup-fraction and --lr-warmup-iters exclude each other"),
    (
        "--lr-warmup-samples 3",
        "--lr-warmup-samples does not go with a run that is counted in iterations: name --lr-warmup-iters",
    ),
    ("--train-samples 8", "--train-iters and --train-samples both say how long the run is: leave one out"),
    ("--start-weight-decay 0.1", "--start-weight-decay needs --weight-decay-incr-style linear or cosine"),
    (
        "--weight-decay-incr-style linear",
        "--weight-decay-incr-style linear needs --start-weight-decay and --end-weight",
    ),
    (
        "--eval-global-batch-size 3",
        "--eval-global-batch-size 3 is not a multiple of --eval-micro-batch-size 4 x DP 2: change",
    ),
    (
        "--recompute-method uniform",
        "--recompute-method uniform goes with --recompute-granularity full: add it, or leave",
    ),
    (
        "--num-virtual-stages-per-pipeline-rank 2",
        "--num-virtual-stages-per-pipeline-rank needs --pipeline-model-parallel",
    ),
    (
        "--pipeline-model-parallel-size 2 --num-layers 3",
        "--pipeline-model-parallel-size 2 does not divide the decoder's 3",
    ),
    ("--tokenizer-model /nowhere", "--tokenizer-model /nowhere: there is no such folder; name a folder with a"),
    ("--save /nowhere --save-interval -1", "--save-interval -1: it is 0 or more"),
    (
        "--save /nowhere --save-retain-interval 3",
        "--save-retain-interval 3 is not a multiple of --save-interval (which is",
    ),
    ("--save /nowhere", ""),
    # What Megatron's own checks do not survive, and those of its configs.
    (
        "--bf16 --ddp-param-name-patterns-for-fp32-local-accumulation x",
        "Only need to explicitly specify param_name patterns",
    ),
    (
        "--recompute-granularity full",
        "--recompute-granularity full needs --recompute-method and --recompute-num-layers",
    ),
    ("--num-attention-heads 0", "Megatron cannot use these flags: ZeroDivisionError: "),
    # The defaults, and what is so anyway.
    ("--normalization RMSNorm --swiglu --position-embedding-type rope --disable-bias-linear --moe-router-topk 2", ""),
    ("--use-mcore-models --no-create-attention-mask-in-dataloader --tokenizer-type HuggingFaceTokenizer", ""),
]


def test_a_command_line_says_so(demo):
    said = script.parse_errors(demo, [flags.split() for flags, _ in GIVEN])
    for (flags, message), line in zip(GIVEN, said):
        assert line.startswith(f"error: {message}") if message else line == "", (flags, line)


def test_a_schedule_of_batch_sizes_is_followed_and_each_sample_read_once(demo, tmp_path):
    """Of 64 samples: 8 of 4 and 4 of 8 (thresholds count tokens, 128 a sample); the rate decays over all of them."""
    flags = [
        "--step-batch-size-schedule",
        "0:4 4096:8",
        "--train-samples",
        64,
        "--metrics-file",
        tmp_path / "metrics.jsonl",
    ]
    without = ("--train-iters", "--global-batch-size")
    outputs = script.run(1, demo, *flags, "--lr-decay-style", "linear", "--min-lr", 0, without=without)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "lm loss" in line]
    assert [line["batch-size"] for line in lines] == [line["samples"] for line in lines] == [4] * 8 + [8] * 4
    assert lines[-1]["learning-rate"] == 0 < lines[-2]["learning-rate"]
    assert [float(line["skipped samples"]) for line in script.iterations(outputs).values()] == [0] * 12
