"""What the main job has trained goes back to Hugging Face, and says there what it says here."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlavaOnevisionForConditionalGeneration, LogitsProcessor

from checkpoint_conversion import __main__ as conversion
from checkpoint_conversion import forward_comparison, verify
from tests.support import hf_parity, layouts, processes, script, tiny_hf

NUM_NEW_TOKENS = 12
# Absolute, of a loss of 7: as that of the logits in hf_parity.
TOLERANCE = 1e-5
CAPTION = "A red boat lies in the harbour."


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


@pytest.fixture(scope="module")
def stage_1(trained, tmp_path_factory):
    """The same checkpoint in a folder that says it is of stage 1: what it was shown does not matter to what is compared."""
    run = tmp_path_factory.mktemp("stage 1") / "run"
    run.mkdir()
    for file in trained.iterdir():
        (run / file.name).symlink_to(file)
    said = json.loads((run / "run.json").read_text())
    assert (said["stage"], said["template"], said["image_aspect_ratio"]) == ("1", "qwen_1_5", "anyres")
    (run / "run.json").unlink()
    (run / "run.json").write_text(json.dumps(said | {"template": "plain", "image_aspect_ratio": "square"}))
    return run


@pytest.fixture(scope="module")
def export(stage_1, tmp_path_factory):
    return convert("megatron-to-hf", "--checkpoint", stage_1, out=tmp_path_factory.mktemp("export") / "hf")


def convert(*command, out):
    conversion.main([*map(str, command), "--out", str(out)])
    return out


def caption_losses(argv, batches) -> list[float]:
    """The Megatron model's loss of each caption."""
    trainer, losses = layouts.Trainer(argv), []
    for batch in batches:
        token_loss, mask = hf_parity.forward(trainer, batch, labels=batch.labels, loss_mask=batch.loss_mask)
        losses.append(((token_loss * mask).sum() / mask.sum()).item())
    return losses


def exported_losses(folder, pictures) -> list[float]:
    """The same by what a user has: transformers' classes and the folder's own template, for all but the prompt."""
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32),
        tiny_hf.load_processor(folder),
    )
    losses = []
    for picture in pictures:
        whole = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": CAPTION}]}]
        text = processor.apply_chat_template(whole)
        prompt = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
        inputs = processor(text=text, images=picture, return_tensors="pt")
        length = processor(text=prompt, images=picture, return_tensors="pt")["input_ids"].shape[1]
        labels = inputs["input_ids"].clone()
        labels[:, :length] = -100
        with torch.no_grad():
            losses.append(model(**inputs, labels=labels).loss.item())
    return losses


MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


def test_a_model_of_stage_1_has_the_same_loss_through_its_export(models, stage_1, export, tmp_path):
    pictures = [
        forward_comparison.make_picture(*size, seed) for seed, size in enumerate([(58, 58), (60, 80), (20, 200)])
    ]
    encoder = forward_comparison.make_encoder(export)
    assert encoder.tokens_per_side == 4
    encoder.template = "plain"
    batches = [forward_comparison.make_sample("", [picture], encoder, export, CAPTION).batch for picture in pictures]
    assert all(len(batch.images) == 1 for batch in batches)
    argv = models.flags("--load", str(stage_1), "--micro-batch-size", "1", "--global-batch-size", "1")
    argv += ["--no-load-optim", "--no-load-rng", "--restart-data"]
    (expected,) = processes.run(caption_losses, 1, argv, batches)
    for ours, theirs in zip(expected, exported_losses(export, pictures)):
        assert abs(ours - theirs) < TOLERANCE
    # The control: through LLaVA-OneVision's defaults it is another.
    defaults = convert("megatron-to-hf", "--checkpoint", stage_1, "--llava-onevision", out=tmp_path / "defaults")
    for ours, theirs in zip(expected, exported_losses(defaults, pictures)):
        assert abs(ours - theirs) > 1000 * TOLERANCE


class Say(LogitsProcessor):
    """Makes one token the likeliest once the text has a length."""

    def __init__(self, token: int, length: int):
        self.token, self.length = token, length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.length:
            scores[:, self.token] = scores.max() + 1
        return scores


def test_its_generation_ends_with_the_line(export, stage_1, tmp_path):
    defaults = convert("megatron-to-hf", "--checkpoint", stage_1, "--llava-onevision", out=tmp_path / "defaults")
    for folder, length in ((export, 4), (defaults, NUM_NEW_TOKENS)):
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        processor = tiny_hf.load_processor(folder)
        prompt = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
        inputs = processor(text=prompt, images=forward_comparison.make_picture(60, 80), return_tensors="pt")
        start, newline = inputs["input_ids"].shape[1], processor.tokenizer("\n")["input_ids"][-1]
        output = model.generate(
            **inputs, max_new_tokens=NUM_NEW_TOKENS, do_sample=False, logits_processor=[Say(newline, start + 3)]
        )
        assert output.shape[1] - start == length and output[0, start + 3] == newline


def test_its_export_says_so_and_goes_back_to_what_it_came_from(models, stage_1, export, tmp_path, capsys):
    again = convert("megatron-to-hf", "--checkpoint", stage_1, out=tmp_path / "again")
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trained as ")]
    assert said.startswith("trained as stage 1 (template plain, images square): exported as transformers' Llava")
    assert "## How this model was trained" in (again / "README.md").read_text()
    config = json.loads((export / "config.json").read_text())
    assert config["model_type"] == "llava" and "image_grid_pinpoints" not in config
    # On to the next stage, by conversion: LLaVA-OneVision's files and every tensor are as in the run.
    back = convert("hf-to-megatron", "--hf", export, out=tmp_path / "back")
    assert contents(back / "hf") == contents(stage_1 / "hf")
    found = verify.compare_folder(export, back)
    assert found.num_tensors and not found.differences


def contents(folder) -> dict:
    """Of each file, read where it is JSON: config.json's dtype is written again."""
    texts = {file.name: file.read_text() for file in folder.iterdir()}
    return {name: json.loads(text) if name.endswith(".json") else text for name, text in texts.items()}
