"""What the training script says to samples, flags and folders that it cannot use."""

import json
import re

import pytest
from transformers import AutoTokenizer

from tests.support import broken_data, script, tiny_hf
from tests.support.layouts import PP, TP, VPP
from tests.support.processes import Failed


def test_unusable_samples_are_skipped_counted_and_logged_alike_on_both_stages(demo, tmp_path):
    broken_data.write(tmp_path / "data")
    flags = ("--train-iters", 5, "--shuffle-buffer-size", 1)
    outputs = script.run(2, demo, *flags, *PP, data=tmp_path / "data", sabotage=print_skipped_on_every_stage)
    counts = [[int(n) for n in re.findall(r"this stage skipped (\d+)", output)] for output in outputs]
    assert counts[0] == counts[1] and sum(counts[0]) == len(broken_data.REASONS)
    logged = sum(float(line["skipped samples"]) for line in script.iterations(outputs).values())
    assert logged == len(broken_data.REASONS)
    for key, reason in broken_data.REASONS.items():
        (line,) = [line for line in "\n".join(outputs).splitlines() if f"skipped sample {key} " in line]
        assert reason in line


def print_skipped_on_every_stage():
    from rsa_megatron.data import loaders

    right = loaders.TrainLoader.__next__

    def read(self):
        batch = right(self)
        print(f"this stage skipped {batch.num_skipped}")
        return batch

    loaders.TrainLoader.__next__ = read


@pytest.mark.parametrize("saves", [False, True], ids=["", "with a checkpoint to run it again from"])
def test_a_loss_that_is_not_finite_ends_in_one_line_that_names_the_samples(demo, tmp_path, saves):
    flags = ("--save", tmp_path, "--save-interval", 100) if saves else ()
    with pytest.raises(Failed, match="SystemExit: 16" if saves else "SystemExit: 17") as failed:
        script.run(2, demo, *flags, sabotage=poison_the_third_batch)
    said = failed.value.output
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    assert re.match(
        r"error: iteration 3: lm loss is not finite; samples of the batch: captions-train-\d+, captions", line
    )
    assert "Traceback" not in said
    assert saves or "Rerun" not in said.split("training ...")[1]  # Megatron's words on how to go on from the checkpoint
    assert (tmp_path / "iter_0000002").is_dir() == saves


def test_a_loss_that_is_not_finite_is_passed_over_where_that_is_asked_for(demo):
    flags = ("--no-check-for-nan-in-loss-and-grad", "--train-iters", 4)
    figures = script.iterations(script.run(1, demo, *flags, sabotage=poison_the_third_batch))
    assert ["lm loss" in figures[i] for i in (1, 2, 3, 4)] == [True, False, False, False]  # Megatron prints no NaN


def poison_the_third_batch():
    """Of the last rank."""
    import os

    from rsa_megatron.data import loaders

    right, read_so_far = loaders.TrainLoader.__next__, []

    def read(self):
        batch = right(self)
        read_so_far.append(batch)
        if len(read_so_far) == 3 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            batch.images.fill_(float("nan"))
        return batch

    loaders.TrainLoader.__next__ = read


@pytest.mark.parametrize("layout", [PP, VPP], ids=["PP=2", "PP=2 VPP=2"])
def test_stages_that_read_different_samples_are_caught(demo, layout):
    with pytest.raises(Failed, match="the first and the last pipeline stage read different samples .ids 0x"):
        script.run(2, demo, *layout, sabotage=skip_a_batch_on_the_last_stage)


def skip_a_batch_on_the_last_stage():
    import os

    from rsa_megatron.data import loaders

    right = loaders.TrainLoader.__init__

    def start(self, *args, **options):
        right(self, *args, **options)
        if os.environ["RANK"] == "1":
            next(self)

    loaders.TrainLoader.__init__ = start


BAD_FLAGS = [
    (
        ["--model", "llava-9000"],
        "error: --model llava-9000: neither a folder with a config.json nor one of demo, llava-ov-0.5b",
    ),
    (
        ["--pretrained-checkpoint", "/nowhere"],
        "error: --pretrained-checkpoint /nowhere: no latest_checkpointed_iteration.txt there",
    ),
    (
        ["--drop-last"],
        "error: --drop-last is about a single pass over the data; leave it out, or leave out the number of iter",
    ),
    (["--vision-lr", 0, "--lr-warmup-init", 1e-7], "error: --vision-lr needs a warm-up from 0"),
    (["--vision-lr", -1], "error: --vision-lr -1.0: a learning rate is 0 or more"),
    (["--image-grids", "2x2", "3"], "error: argument --image-grids: 3 is no grid of ROWSxCOLUMNS, such as 2x3"),
    (["--label-style", "mine"], "error: argument --label-style: invalid choice: 'mine'"),
    (["--stage", "7"], "error: --stage 7: no such recipe; there is revision, 1, 1.5, 2"),
    (
        ["--data-path", "/nowhere"],
        "error: --data-path /nowhere: it does not exist; name a folder that rsa-megatron data",
    ),
    (["--data-path", "data/nowhere"], "error: --data-path data/nowhere: it does not exist; name a folder that"),
    (
        ["--tokenizer-model", "no where"],
        "error: --tokenizer-model no where: there is no such folder, and the Hugging Face Hub does not give one of that name; name a",
    ),
    (["--tokenizer-model", "/"], "error: --tokenizer-model /: there is no tokenizer_config.json in it; name a folder"),
    (
        ["--load", "/nowhere"],
        "error: --load /nowhere: no latest_checkpointed_iteration.txt there; name the folder that --save",
    ),
    (
        ["--num-query-groups", 1, *TP],
        "error: --tensor-model-parallel-size 2 does not divide the decoder's query groups, 1",
    ),
    ([*PP, "--num-virtual-stages-per-pipeline-rank", 4], "error: --pipeline-model-parallel-size 2 with 4 chunk"),
    (["--tensor-model-parallel-size", 3], "error: 2 process.es. cannot be divided by TP 3: start a multiple of 3"),
    ([*TP, "--sequence-parallel", "--seq-length", 127], "error: --seq-length 127 must be a multiple of .* 2"),
    (["--transformer-impl", "transformer_engine"], "Transformer Engine is not installed"),
    (["--rsa-weight", "-1"], "error: --rsa-weight must be 0 or more, not -1.0"),
    (["--mutual-knn-layers=-1:-1,2"], "error: argument --mutual-knn-layers: -1:-1,2 is no list of VISION:TEXT layers"),
    (["--mutual-knn-layers=-1:9"], "error: --mutual-knn-layers 9: it has 4 layers; 0 is what goes into the first"),
    (["--micro-batch-size", 0], "error: --micro-batch-size 0: it is 1 or more"),
    (["--data-path", "one", "two"], "error: --data-path takes one data set, not 2: name a mixture"),
    (["--full-validation"], "error: --full-validation: it does not go with this script's data"),
    (["--context-parallel-size", 2], "error: --context-parallel-size above 1 needs Transformer Engine"),
    (
        ["--eval-iters", 1, "--micro-batch-size", 40, "--global-batch-size", 80],
        "error: --data-path .*the 64 samples of its validation split, divided between 2 data workers",
    ),
]


def test_rsa_that_would_be_off_is_one_line_on_several_ranks(demo):
    questions = demo / "data" / "questions"
    line = script.error_line(2, demo, "--data-path", questions)
    assert f"error: --data-path {questions}: RSA is on (--rsa-weight 0.01), but no data set takes part in it" in line


def test_without_rsa_or_training_no_data_set_need_take_part(demo):
    flags = ("--data-path", demo / "data" / "questions")
    commands = [(*flags, "--rsa-weight", 0), (*flags, "--skip-train", "--eval-iters", 1), flags]
    assert [error.partition(": RSA is on")[1] for error in script.parse_errors(demo, commands)] == [
        "",
        "",
        ": RSA is on",
    ]


def test_pairs_that_would_stand_alone_are_warned_of(demo):
    flags = ("--micro-batch-size", 1, "--global-batch-size", 2, "--dry-run")
    warning = (
        "WARNING: RSA is on (--rsa-weight 0.01), but compares the pairs of a micro-batch on all data-parallel ranks"
    )
    assert warning in script.run(1, demo, *flags)[0]
    assert warning not in script.run(2, demo, *flags)[0]
    assert warning not in script.run(1, demo, *flags, "--rsa-scope", "global-batch")[0]


@pytest.fixture(scope="module")
def errors(demo) -> list[str]:
    """Of each of the bad flags, for two ranks."""
    return script.parse_errors(demo, [flags for flags, _ in BAD_FLAGS])


@pytest.mark.parametrize("number", range(len(BAD_FLAGS)), ids=[" ".join(map(str, flags)) for flags, _ in BAD_FLAGS])
def test_bad_flags_are_one_line(errors, number):
    assert re.search(BAD_FLAGS[number][1], errors[number])


def test_good_flags_are_taken(demo):
    """By the same way of asking: the errors above are those of the flags."""
    assert script.parse_errors(demo, [[], ["--trainable", "vision"], [*TP, "--sequence-parallel"]]) == ["", "", ""]


@pytest.mark.parametrize("flags, message", [BAD_FLAGS[0], BAD_FLAGS[-1]], ids=["a flag", "data"])
def test_several_ranks_say_it_once(demo, flags, message):
    assert re.search(message, script.error_line(2, demo, *flags))


def test_a_hugging_face_folder_of_another_kind_is_one_line(demo, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava", "vision_config": {}}')
    assert "config.json: model_type is 'llava'; only llava_onevision is supported" in script.error_line(
        2, demo, "--model", tmp_path
    )


def test_what_does_not_go_with_a_hugging_face_folder_is_one_line(demo, tmp_path):
    hf = tiny_hf.write(tmp_path / "hf", demo / "tokenizer", tied=True)
    assert (
        f"error: --pretrained-checkpoint {hf} is a Hugging Face folder, not a Megatron checkpoint; rsa-megatron convert hf-to-megatron "
        f"--hf {hf} --out" in script.error_line(1, demo, "--pretrained-checkpoint", hf)
    )
    flags = ("--model", hf, "--tokenizer-model", hf)
    for change in (("--rotary-base", 10000), ("--num-layers", 2), ("--norm-epsilon", "1e-5")):
        assert "its sizes are those of its config.json; leave out the flags" in script.error_line(
            1, demo, *flags, *change
        )
    other = AutoTokenizer.from_pretrained(hf)
    other.add_tokens(["another"])
    other.save_pretrained(tmp_path / "other")
    line = script.error_line(1, demo, "--model", hf, "--tokenizer-model", tmp_path / "other")
    assert "other has other ids than the tokenizer in --model" in line
    for change in (("--rotary-percent", 0.5), ("--kv-channels", 12)):
        assert "the model is a Qwen2, which has neither" in script.error_line(1, demo, *flags, *change)


def test_files_that_must_agree_are_compared_before_anything_is_built(demo, tmp_path):
    hf = tiny_hf.write(tmp_path / "hf", demo / "tokenizer", tied=True)
    config = json.loads((hf / "config.json").read_text())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("release")
    for place, change in ((hf, {"image_token_index": 5}), (tmp_path / "run" / "hf", {"image_token_index": 6})):
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps(config | change))
    model, checkpoint = script.parse_errors(
        demo,
        [["--model", hf, "--tokenizer-model", hf], ["--pretrained-checkpoint", tmp_path / "run"]],
        world_size=1,
    )
    assert f"error: the id of <image> is 5 in {hf}/config.json and 3 in {hf}/tokenizer.json: correct" in model
    of_run = f"{tmp_path}/run/hf/config.json"
    assert f"hidden_size is 60 in {of_run} and " in checkpoint and " by --model tiny" in checkpoint
    assert f"the id of <image> is 6 in {of_run} and 3 in the tokenizer {demo}/tokenizer" in checkpoint


def test_a_tokenizer_of_another_model_is_one_line(demo, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(demo / "tokenizer")
    tokenizer.add_tokens([f"word{i}" for i in range(100)])
    tokenizer.save_pretrained(tmp_path)
    line = script.error_line(2, demo, "--tokenizer-model", tmp_path)
    assert re.search("error: the tokenizer .* has 1124 ids, --model tiny 1024 word embeddings", line)
