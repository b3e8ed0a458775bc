"""The demo's "pretrained" parts: decoder and tower learn, neither through the other, and stage 1 can start from them."""

import re
import sys

import torch

from tests.support import processes, script


def train_parts(argv):
    import pretrain_backbones

    from tests.support import tiny

    tiny.register()
    pretrain_backbones.demo_parts = lambda: tiny.settings() | dict(trainable=["vision", "embeddings", "language"])
    sys.argv = ["pretrain_backbones.py", *argv]
    pretrain_backbones.main()
    return processes.output()


def test_both_parts_learn_each_for_itself_and_stage_1_starts_from_them(demo, tmp_path):
    argv = [
        "--model",
        "tiny",
        "--seq-length",
        "128",
        "--data-path",
        str(demo / "data" / "captions"),
        "--tokenizer-model",
        str(demo / "tokenizer"),
        "--train-iters",
        "40",
        "--log-interval",
        "1",
        "--lr",
        "2e-3",
        "--adam-eps",
        "1e-8",
        "--save",
        str(tmp_path),
        "--save-interval",
        "20",
    ]
    figures = script.iterations(processes.run(train_parts, 2, [*argv, "--global-batch-size", "8"]))
    for name in ("lm loss", "scene loss"):
        values = [float(line[name]) for line in figures.values()]
        assert sum(values[-5:]) < 0.8 * sum(values[:5])
    before, after = (script.plain_tensors(tmp_path / f"iter_00000{i}") for i in (20, 40))
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert (
        still
        == {name for name in before if name.startswith(("vision_projection.", "vision_model.ln_post."))}
        != set(before)
    )
    outputs = script.run(2, demo, "--skip-train", "--eval-iters", 2, "--pretrained-checkpoint", tmp_path)
    # Were the decoder not loaded, the loss would be that of random weights.
    loaded = float(re.search(r"lm loss value: ([\d.E+-]+)", "".join(outputs))[1])
    assert loaded < 0.9 * float(figures[1]["lm loss"])
