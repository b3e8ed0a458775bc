"""The training script, run as a user runs it: log, resume, checkpoints, layouts, and what it says to bad input."""

import dataclasses
import re
import signal

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rsa_megatron.huggingface import read_architecture
from tests.support import broken_data, script, tiny, tiny_hf
from tests.support.processes import Failed

TP = ("--tensor-model-parallel-size", 2)
PP = ("--pipeline-model-parallel-size", 2)
VPP = (*PP, "--num-virtual-stages-per-pipeline-rank", 2)


def test_the_log_shows_the_figures_and_tensorboard_has_them(demo, tmp_path):
    outputs = script.run(
        2, demo, "--eval-interval", 3, "--eval-iters", 2, "--mutual-knn-samples", 64, "--mutual-knn-k", 5,
        "--tensorboard-dir", tmp_path, "--global-batch-size", 16,
        "--wandb-project", "tests", "--wandb-exp-name", "a run", "--wandb-save-dir", tmp_path, sabotage=wandb_offline,
    )  # fmt: skip
    figures = script.iterations(outputs)
    assert list(figures) == [1, 2, 3, 4, 5, 6]
    for line in figures.values():
        assert float(line["rsa pairs"]) == 8  # micro-batch 4 on 2 ranks
        assert float(line["unusable samples"]) == 0
        for name in ("lm loss", "rsa loss", "rsa dist vision", "rsa dist text"):
            assert float(line[name]) > 0
    found = re.findall(r"mutual-knn@5 at iteration (\d+) \| mutual-knn value: ([\d.]+) \| (\d+) pairs.*chance ([\d.]+)", outputs[1])
    assert [(i, pairs, chance) for i, _, pairs, chance in found] == [(i, "64", "0.0794") for i in ("3", "6", "6")]
    assert all(0 < float(score) < 1 for _, score, *_ in found)
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in ("lm loss", "rsa loss", "rsa pairs", "rsa dist vision", "rsa dist text", "unusable samples"):
        assert len(events.Scalars(name)) == 6
    for name in ("lm loss validation", "rsa loss validation", "mutual-knn validation"):
        assert [event.step for event in events.Scalars(name)][:2] == [3, 6]
    (written,) = tmp_path.rglob("*.wandb")
    for name in ("lm loss", "rsa loss", "rsa pairs", "rsa dist vision", "rsa dist text", "mutual-knn validation"):
        assert name.encode() in written.read_bytes()


def wandb_offline():
    import os

    os.environ["WANDB_MODE"] = "offline"


def test_weight_0_leaves_no_trace(demo):
    (output,) = script.run(1, demo, "--rsa-weight", 0, sabotage=no_taps_allowed)
    assert all("rsa loss" not in line and float(line["lm loss"]) > 0 for line in script.iterations([output]).values())


def no_taps_allowed():
    from rsa_megatron import plugin

    plugin.Taps = None  # making one would raise


def test_dry_run_prints_what_would_run_and_stops(demo):
    flags = ["--trainable", "projector", "vision", "--tensor-model-parallel-size", "2", "--make-vocab-size-divisible-by", "768"]
    output, _ = script.run(2, demo, "--dry-run", *flags)
    counts = {part: sum(pieces.values()) for part, pieces in tiny.TINY.parameter_counts().items()}
    for part, learns in (("vision", "0.001"), ("projector", "0.001"), ("embeddings", "frozen"), ("language", "frozen")):
        assert re.search(rf"^{part} +{counts[part]:,}  {learns} ", output, flags=re.MULTILINE)
    assert re.search(r"^projector .* two linear layers 2,624, image_newline 32$", output, flags=re.MULTILINE)
    assert re.search(rf"^all +{sum(counts.values()):,}  {counts['vision'] + counts['projector']:,} learn$", output, re.M)
    assert "word embeddings: 1,024 rows, and 512 of padding, which are not counted" in output
    assert "RSAConfig(weight=0.01" in output and "tensor_model_parallel_size ...." in output
    assert "iteration        1" not in output


@pytest.mark.parametrize("name, flags", [
    ("lm loss", ["--rsa-weight", 0]),
    ("rsa loss", ["--rsa-weight", 1, "--trainable", "vision"]),
])  # fmt: skip
def test_each_loss_is_learnt(demo, name, flags):
    flags = ["--train-iters", 60, "--lr", "2e-3", "--adam-eps", "1e-8", *flags]
    figures = [float(line[name]) for line in script.iterations(script.run(1, demo, *flags)).values()]
    assert sum(figures[-10:]) < 0.6 * sum(figures[:10])  # ten micro-batches each: single ones differ by a factor


@pytest.mark.parametrize("optimizer", [(), ("--use-distributed-optimizer",)], ids=["", "distributed optimizer"])
def test_only_what_is_to_learn_moves(demo, tmp_path, optimizer):
    """Stage 1, language model frozen, on two pipeline stages: nothing on the last stage learns."""
    flags = ("--trainable", "vision", "projector", "--save-interval", 3, "--save", tmp_path, *PP, *optimizer)
    script.run(2, demo, "--train-iters", 6, *flags)
    before, after = (script.plain_tensors(tmp_path / f"iter_000000{i}") for i in (3, 6))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # The tower's last norm is only kept, and square images have no newline.
    unused = {"vision_model.ln_post.weight", "vision_model.ln_post.bias", "vision_projection.image_newline"}
    assert moved == {name for name in before if name.startswith(("vision_model.", "vision_projection."))} - unused
    flags = ("--train-iters", 6, *flags, "--load", tmp_path, "--ckpt-step", 3)
    assert list(script.iterations(script.run(2, demo, *flags))) == [4, 5, 6]


def test_mutual_knn_is_of_base_tiles_however_images_are_cut(demo):
    def scores(*flags):
        flags = ("--skip-train", "--eval-iters", 1, "--seq-length", 160, "--mutual-knn-samples", 48, "--mutual-knn-k", 5, *flags)
        outputs = "".join(script.run(2, demo, *PP, *flags))
        return [re.search(pattern, outputs)[1] for pattern in (r"mutual-knn value: ([\d.]+)", r"lm loss value: ([\d.E+-]+)")]

    (square, square_loss), (anyres, anyres_loss) = scores(), scores("--image-aspect-ratio", "anyres")
    assert square == anyres and square_loss != anyres_loss


def collapsed_images():
    from rsa_megatron.llava import measure

    right = measure.image_vectors
    measure.image_vectors = lambda *args: {layer: torch.ones_like(v) for layer, v in right(*args).items()}


def test_a_collapsed_space_has_no_neighbours_and_the_run_goes_on(demo):
    flags = ("--train-iters", 2, "--eval-interval", 1, "--eval-iters", 1, "--mutual-knn-samples", 48)
    outputs = script.run(1, demo, *flags, sabotage=collapsed_images)
    assert "mutual-knn value: nan" in outputs[0] and list(script.iterations(outputs)) == [1, 2]


# Kill and resume


def test_a_killed_run_resumes_to_the_last_digit(demo, tmp_path):
    flags = ("--train-iters", 40, "--num-workers", 1, "--global-batch-size", 16, "--save-interval", 4)
    flags_of = {name: (*flags, "--save", tmp_path / name, "--tensorboard-dir", tmp_path / name) for name in "ab"}
    uninterrupted = script.run(2, demo, *flags_of["a"])
    killed = script.run(2, demo, *flags_of["b"], kill_when=lambda output: re.search(r"iteration +10/", output))
    reached = max(script.iterations(killed))
    assert 10 <= reached < 40
    resumed = script.run(2, demo, *flags_of["b"], "--load", tmp_path / "b")
    expected, actual = script.losses(uninterrupted), script.losses(resumed)
    first, second = sorted(actual)[:2]
    assert 4 < first <= reached + 1 and max(actual) == 40
    # Megatron prints the first iteration of a run twice, alone and in the mean with the second.
    del actual[second]
    assert actual == {i: expected[i] for i in actual}
    expected, actual = (scalars(tmp_path / name, first) for name in "ab")
    assert len(actual["lm loss"]) == 41 - first and actual == expected
    # It is the data position that does it: with the data from the beginning the same weights see other samples.
    flags = (*flags, "--exit-interval", first, "--load", tmp_path / "a", "--ckpt-step", first - 1)
    restarted = script.losses(script.run(2, demo, *flags, "--restart-data"))
    assert restarted[first] != script.losses(uninterrupted)[first]


def scalars(folder, first):
    """Every figure of the loss that TensorBoard has from iteration `first` on; of a resumed run, the later ones."""
    events = EventAccumulator(str(folder)).Reload()
    names = ("lm loss", "rsa loss", "rsa pairs", "rsa dist vision", "rsa dist text", "grad-norm")
    return {name: {e.step: e.value for e in events.Scalars(name) if e.step >= first} for name in names}


def test_a_finished_run_evaluates_as_what_it_is(demo, tmp_path):
    flags = ("--train-iters", 3, "--save", tmp_path, "--load", tmp_path, "--save-interval", 3, "--eval-iters", 1,
             "--mutual-knn-samples", 32)  # fmt: skip
    first, again = (script.run(1, demo, *flags)[0] for _ in range(2))
    assert script.iterations([first]) and not re.search(r"iteration +\d+/", again)
    assert re.findall(r"mutual-knn@10 at iteration (\d+) .*value: ([\d.]+)", again) == re.findall(
        r"mutual-knn@10 at iteration (\d+) .*value: ([\d.]+)", first
    )
    assert "at iteration 3 | mutual-knn" in again


def test_a_frozen_language_model_without_a_checkpoint_is_warned_of(demo):
    flags = ("--train-iters", 1, "--trainable", "vision", "projector")
    assert "the language model is frozen and no checkpoint is named" in script.run(1, demo, *flags)[0]


def test_a_signal_ends_the_run_with_a_checkpoint(demo, tmp_path):
    flags = ("--train-iters", 1000, "--num-workers", 1, "--save", tmp_path, "--save-interval", 1000)
    outputs = script.run(
        2, demo, *flags, "--exit-signal-handler",
        kill_when=lambda output: re.search(r"iteration +5/", output), kill_with=signal.SIGTERM,
    )  # fmt: skip
    reached = max(script.iterations(outputs))
    assert 5 <= reached < 1000
    resumed = script.run(2, demo, *flags, "--load", tmp_path, "--exit-interval", reached + 3)
    assert min(script.iterations(resumed)) == reached + 1


@pytest.mark.parametrize("world_size, change, message", [
    (1, [], "data-parallel size of 2, this run has 1; an exact resume is impossible"),
    (2, ["--num-workers", 1], "--num-workers = 0, this run has 1; an exact resume is impossible"),
    (2, ["--micro-batch-size", 2], "--micro-batch-size = 4, this run has 2; an exact resume is impossible"),
])  # fmt: skip
def test_a_resume_that_cannot_be_exact_is_refused(demo, tmp_path, world_size, change, message):
    script.run(2, demo, "--exit-interval", 2, "--save", tmp_path, "--save-interval", 2)
    with pytest.raises(Failed) as failed:
        script.run(world_size, demo, "--load", tmp_path, *change)
    assert message in str(failed.value) and "--restart-data" in str(failed.value)
    resumed = script.run(world_size, demo, "--load", tmp_path, *change, "--restart-data")
    assert list(script.iterations(resumed)) == [3, 4, 5, 6]


def test_interleaved_pipelines_say_that_the_data_position_is_not_saved(demo, tmp_path):
    flags = (*VPP, "--save", tmp_path, "--save-interval", 2)
    outputs = script.run(2, demo, "--exit-interval", 2, *flags)
    assert "cannot save the data position of interleaved pipelines; a resumed run will need --restart-data" in outputs[0]
    with pytest.raises(Failed, match="no data position is saved for iteration 2"):
        script.run(2, demo, *flags, "--load", tmp_path)
    resumed = script.run(2, demo, *flags, "--load", tmp_path, "--restart-data")
    assert list(script.iterations(resumed)) == [3, 4, 5, 6]


@pytest.mark.parametrize("optimizer", [(), ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")],
                         ids=["", "distributed optimizer"])  # fmt: skip
def test_a_checkpoint_of_tp_2_goes_on_under_pp_2_and_alone(demo, tmp_path, optimizer):
    flags = (*optimizer, "--save-interval", 3, "--lr", "5e-3")
    script.run(2, demo, *flags, *TP, "--exit-interval", 3, "--save", tmp_path)
    load = (*flags, "--load", tmp_path)
    expected = script.iterations(script.run(2, demo, *load, *TP))
    for world_size, layout in ((2, PP), (1, ())):
        actual = script.iterations(script.run(world_size, demo, *load, *layout))
        assert list(actual) == list(expected) == [4, 5, 6]
        for iteration in actual:
            for name in ("lm loss", "rsa loss", "grad norm"):
                # The noise floor of fp32 in another order, seen through three decimals of the grad norm.
                a, e = float(actual[iteration][name]), float(expected[iteration][name])
                assert a == pytest.approx(e, rel=2e-5, abs=1e-3 if name == "grad norm" else 0)
    # The optimizer's state came along: without it the second step already goes elsewhere.
    without = script.iterations(script.run(1, demo, *load, "--no-load-optim"))
    assert float(without[5]["lm loss"]) != pytest.approx(float(expected[5]["lm loss"]), rel=1e-3)


# Layouts


def validation_figures(outputs):
    text = "\n".join(outputs)
    scores = re.findall(r"(mutual-knn(?: -?\d+:-?\d+)?) value: ([\d.]+)", text)
    return {name: float(score) for name, score in scores} | {
        name: float(value) for name, value in re.findall(r"\| ([a-z ]+) value: ([\d.E+-]+)", text.split("validation loss")[1])
    }


@pytest.fixture(scope="module")
def initial_weights(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("initial")
    script.run(1, demo, "--train-iters", 1, "--save", folder, "--save-interval", 1)
    return folder


@pytest.mark.parametrize("rsa", [(), ("--rsa-weight", 0)], ids=["with RSA", "without"])
def test_evaluation_gives_the_same_under_every_layout(demo, initial_weights, rsa):
    flags = ("--skip-train", "--pretrained-checkpoint", initial_weights, "--eval-iters", 2, "--mutual-knn-samples", 64,
             "--mutual-knn-layers=-1:-1,0:0,1:3,2:4,-2:1", "--micro-batch-size", 2, *rsa)  # fmt: skip
    expected = validation_figures(script.run(1, demo, *flags))
    layers = [name for name in expected if name.startswith("mutual-knn")]
    assert layers == ["mutual-knn", "mutual-knn 0:0", "mutual-knn 1:3", "mutual-knn 2:4", "mutual-knn -2:1"]
    assert all(expected[name] > 0 for name in layers) and ("rsa loss" in expected) == (not rsa)
    # -1 is the last of 2 and of 4; the others are other spaces.
    assert expected["mutual-knn 2:4"] == expected["mutual-knn"] and len({expected[name] for name in layers}) >= 4
    for world_size, layout in ((2, TP), (2, (*TP, "--sequence-parallel")), (2, PP), (2, VPP), (4, TP + PP)):
        actual = validation_figures(script.run(world_size, demo, *flags, *layout))
        assert actual.keys() == expected.keys()
        assert all(actual[name] == expected[name] for name in layers)  # counts of neighbours
        assert all(value == pytest.approx(expected[name], rel=2e-5) for name, value in actual.items())
    # Two data-parallel ranks read other batches, but all 64 pairs: the measure is the same.
    parallel = validation_figures(script.run(2, demo, *flags))
    assert all(parallel[name] == expected[name] for name in layers)


def test_interleaved_pipelines_measure_an_odd_number_of_micro_batches(demo, initial_weights):
    flags = ("--skip-train", "--pretrained-checkpoint", initial_weights, "--eval-iters", 2, "--mutual-knn-samples", 30,
             "--micro-batch-size", 2)  # fmt: skip
    expected, actual = (script.run(size, demo, *flags, *layout) for size, layout in ((1, ()), (2, VPP)))
    assert validation_figures(actual)["mutual-knn"] == validation_figures(expected)["mutual-knn"]
    assert "| 30 pairs" in "".join(actual)


def test_a_micro_batch_of_text_alone_trains_on_every_layout(demo):
    for world_size, layout in ((1, ()), (2, ()), (2, PP), (2, VPP), (2, (*TP, "--sequence-parallel"))):
        outputs = script.run(
            world_size, demo, *layout, "--train-iters", 2, data=demo / "data" / "texts"
        )
        for line in script.iterations(outputs).values():
            assert float(line["rsa pairs"]) == float(line["rsa loss"]) == float(line["rsa dist vision"]) == 0
            assert float(line["lm loss"]) > 0 and int(line["number of nan iterations"]) == 0


# Bad input


def test_unusable_samples_are_skipped_counted_and_logged_alike_on_both_stages(demo, tmp_path):
    broken_data.write(tmp_path / "data")
    flags = ("--train-iters", 5, "--shuffle-buffer-size", 1)
    outputs = script.run(2, demo, *flags, *PP, data=tmp_path / "data", sabotage=print_skipped_on_every_stage)
    counts = [[int(n) for n in re.findall(r"this stage skipped (\d+)", output)] for output in outputs]
    assert counts[0] == counts[1] and sum(counts[0]) == len(broken_data.REASONS)
    logged = sum(float(line["unusable samples"]) for line in script.iterations(outputs).values())
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


@pytest.mark.parametrize("mode", [(), ("--rerun-mode", "disabled")], ids=["default", "without reruns"])
def test_a_loss_that_is_not_finite_names_the_samples(demo, mode):
    with pytest.raises(Failed) as failed:
        script.run(1, demo, *mode, sabotage=poison_the_third_batch)
    said = failed.value.output if not mode else str(failed.value)  # a rerun's report is in the log
    assert re.search(r"lm loss is not finite; samples of the batch: captions-train-\d+, captions", said)


def poison_the_third_batch():
    from rsa_megatron.data import loaders

    right, read_so_far = loaders.TrainLoader.__next__, []

    def read(self):
        batch = right(self)
        read_so_far.append(batch)
        if len(read_so_far) == 3:
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


@pytest.mark.parametrize("flags, message", [
    (["--model", "llava-9000"], "error: --model llava-9000: neither a folder with a config.json nor one of demo, llava-ov-0.5b"),
    (["--pretrained-checkpoint", "/nowhere"], "error: --pretrained-checkpoint /nowhere: no latest_checkpointed_iteration.txt there"),
    (["--drop-last"], "error: --drop-last is about a single pass over the data; leave it out, or leave out the number of iter"),
    (["--vision-lr", 0, "--lr-warmup-init", 1e-7], "error: --vision-lr goes with a warm-up from 0 alone"),
    (["--vision-lr", -1], "error: --vision-lr -1.0: a learning rate is 0 or more"),
    (["--image-grids", "2x2", "3"], "error: argument --image-grids: 3 is no grid of ROWSxCOLUMNS, such as 2x3"),
    (["--label-style", "mine"], "error: argument --label-style: invalid choice: 'mine'"),
    (["--stage", "7"], "error: --stage 7: no such recipe; there is revision, 1, 1.5, 2"),
    (["--data-path", "/nowhere"], "error: --data-path /nowhere, part 'train': .*it is not there"),
    (["--load", "/nowhere"], "error: --load /nowhere: no latest_checkpointed_iteration.txt there; name the folder that --save"),
    (["--tensor-model-parallel-size", 4, "--num-query-groups", 2],
     "error: --tensor-model-parallel-size 4 does not divide the decoder's query groups, 2"),
    ([*PP, "--num-virtual-stages-per-pipeline-rank", 4], "error: --pipeline-model-parallel-size 2 with 4 chunk"),
    (["--tensor-model-parallel-size", 3], "error: world size .* is not divisible by total_model_size"),
    ([*TP, "--sequence-parallel", "--seq-length", 127], "error: --seq-length 127 must be a multiple of .* 2"),
    (["--transformer-impl", "transformer_engine"], "Transformer Engine is not installed"),
    (["--rsa-weight", "-1"], "error: --rsa-weight must be 0 or more, not -1.0"),
    (["--mutual-knn-layers=-1:-1,2"], "error: argument --mutual-knn-layers: -1:-1,2 is no list of VISION:TEXT layers"),
    (["--mutual-knn-layers=-1:9"], "error: --mutual-knn-layers 9: it has 4 layers; 0 is what goes into the first"),
    (["--micro-batch-size", 0], "error: .*micro_batch_size"),
    (["--data-path", "one", "two"], "error: --data-path takes one data set, not 2: name a mixture"),
    (["--full-validation"], "error: --full-validation does not go with this script's data"),
    (["--context-parallel-size", 2], "error: --context-parallel-size above 1 needs Transformer Engine"),
    (["--eval-iters", 1, "--micro-batch-size", 40, "--global-batch-size", 80],
     "error: --data-path .*the 64 samples of its validation part, divided between 2 data workers"),
])  # fmt: skip
def test_bad_flags_are_one_line(demo, flags, message):
    world_size = 4 if 4 in flags and "--num-query-groups" in flags else 2
    assert re.search(message, error_line(world_size, demo, *flags))


def error_line(world_size, demo, *flags) -> str:
    with pytest.raises(Failed) as failed:
        script.run(world_size, demo, *flags)
    (line,) = [line for line in failed.value.output.splitlines() if re.search("error: ", line)]
    return line


def test_help_lists_the_flags_of_script_plugin_and_megatron(demo):
    (output,) = script.run(1, demo, "--help")
    for flag in ("--image-aspect-ratio", "--rsa-weight", "--tensor-model-parallel-size"):
        assert flag in output


def test_a_hugging_face_folder_of_another_kind_is_one_line(demo, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava", "vision_config": {}}')
    assert "config.json: model_type is 'llava'; llava_onevision is what can be read" in error_line(2, demo, "--model", tmp_path)


def test_what_does_not_go_with_a_hugging_face_folder_is_one_line(demo, tmp_path):
    hf = tiny_hf.write(tmp_path / "hf", demo / "tokenizer", tied=True)
    flags = ("--model", hf, "--tokenizer-model", hf)
    for change in (("--rotary-base", 10000), ("--num-layers", 2), ("--norm-epsilon", "1e-5")):
        assert "its sizes are those of its config.json; leave out the flags" in error_line(1, demo, *flags, *change)
    other = AutoTokenizer.from_pretrained(hf)
    other.add_tokens(["another"])
    other.save_pretrained(tmp_path / "other")
    line = error_line(1, demo, "--model", hf, "--tokenizer-model", tmp_path / "other")
    assert "other has other ids than the tokenizer in --model" in line
    for change in (("--rotary-percent", 0.5), ("--kv-channels", 12)):
        assert "the model is a Qwen2, which has neither" in error_line(1, demo, *flags, *change)


def test_what_an_export_needs_is_beside_the_checkpoints_and_of_this_model(demo, tmp_path):
    def run(*flags):
        return script.run(1, demo, "--train-iters", 1, "--save", tmp_path / "save", "--save-interval", 1, *flags)

    run("--template", "qwen_1_5", "--rotary-base", 5000)
    hf = tmp_path / "save" / "hf"
    expected = dataclasses.replace(tiny.TINY, name="hf", decoder=dataclasses.replace(tiny.TINY.decoder, rotary_base=5000))
    assert read_architecture(hf) == expected
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(hf).chat_template
    run("--template", "qwen_1_5", "--rotary-base", 5000)  # again: it is the same model
    with pytest.raises(Failed) as failed:
        run()
    assert "save/hf is of another model than this run's: name another --save" in failed.value.output
    # A tokenizer that has no room for <video> cannot be exported: said before training.
    vocabulary = {f"word{i}": i for i in range(1021)} | {"<image>": 1021, "<|endoftext|>": 1022, "[UNK]": 1023}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "full")
    line = error_line(1, demo, "--tokenizer-model", tmp_path / "full", "--save", tmp_path / "never", "--save-interval", 1)
    assert "has 1025 ids (<video> added), the model 1024 word embeddings" in line


def test_a_tokenizer_of_another_model_is_one_line(demo, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(demo / "tokenizer")
    tokenizer.add_tokens([f"word{i}" for i in range(100)])
    tokenizer.save_pretrained(tmp_path)
    line = error_line(2, demo, "--tokenizer-model", tmp_path)
    assert re.search("error: the tokenizer .* has 1124 ids, --model tiny 1024 word embeddings", line)
