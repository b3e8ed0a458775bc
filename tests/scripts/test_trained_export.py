"""What the main job has trained goes back to Hugging Face, and says there what it says here."""

import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from checkpoint_conversion import __main__ as conversion
from checkpoint_conversion import forward_comparison
from tests.support import hf_parity, layouts, processes, script, tiny_hf

NUM_NEW_TOKENS = 12


@pytest.fixture(scope="module")
def trained(models, demo, tmp_path_factory):
    """A few steps of the main job under TP=2, AnyRes and RSA on, all parts learning."""
    save = tmp_path_factory.mktemp("trained") / "run"
    script.run(
        2,
        demo,
        "--model",
        models.hf,
        "--tokenizer-model",
        models.hf,
        "--pretrained-checkpoint",
        models.megatron,
        "--image-aspect-ratio",
        "anyres",
        "--template",
        "qwen_1_5",
        "--trainable",
        "vision",
        "projector",
        "embeddings",
        "language",
        "--tensor-model-parallel-size",
        "2",
        "--micro-batch-size",
        "4",
        "--seq-length",
        "320",
        "--lr",
        "1e-3",
        "--eval-iters",
        "0",
        "--save",
        save,
        "--save-interval",
        "6",
    )
    return save


def greedy(argv, batches) -> list[list[int]]:
    """The Megatron model's own greedy continuation of each prompt, by its logits for the whole row each time."""
    trainer = layouts.Trainer(argv)
    continuations = []
    for batch in batches:
        new = []
        for _ in range(NUM_NEW_TOKENS):
            logits, _ = hf_parity.forward(trainer, batch)
            # The row's last position: no text stands after it.
            new.append(int(logits[0, -1].argmax()))
            batch.tokens = torch.cat([batch.tokens, torch.tensor([[new[-1]]])], dim=1)
        continuations.append(new)
    return continuations


def test_a_trained_model_says_the_same_in_transformers(models, trained, tmp_path):
    conversion.main(["megatron-to-hf", "--checkpoint", str(trained), "--out", str(tmp_path / "hf")])
    model, info = LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    processor = tiny_hf.load_processor(tmp_path / "hf")
    samples = [sample for sample in models.samples if sample.name in ("80 x 60", "two images", "no image")]
    expected = []
    for sample in samples:
        text = processor.decode(sample.batch.tokens[0])  # an image is one token, which the processor makes many
        images = [sample.images] if sample.images else None
        inputs = processor(text=text, images=images, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, do_sample=False, eos_token_id=None)
        expected.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    argv = models.flags(
        "--load",
        str(trained),
        "--micro-batch-size",
        "1",
        "--global-batch-size",
        "1",
        "--no-load-optim",
        "--no-load-rng",
        "--restart-data",
    )
    (actual,) = processes.run(greedy, 1, argv, [sample.batch for sample in samples])
    assert actual == expected
    assert len({tuple(row) for row in expected}) == len(expected)
    # It is another model than before training.
    before, after = (
        forward_comparison.run_hugging_face(folder, samples[:1], torch.float32)[0]["logits"]
        for folder in (models.hf, tmp_path / "hf")
    )
    assert (before - after).abs().max() > 0.1
