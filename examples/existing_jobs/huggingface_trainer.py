"""A training script on transformers' Trainer, and the lines that add RSA to it: those that end in "# RSA", and no others.

    python examples/existing_jobs/huggingface_trainer.py --steps 20
    torchrun --nproc-per-node 2 examples/existing_jobs/huggingface_trainer.py --steps 20

The rest is a job as people have it, scaled down to a CPU: Qwen2.5-VL, tiny, of random weights, learns to say what colour a square has
and where it lies. Each line of the log has the LM loss (lm_loss) and the RSA loss (rsa_loss) beside their weighted sum (loss). For a real
model, take from_pretrained and its processor's chat template; Qwen3-VL, LLaVA-OneVision, InternVL and others work alike.
"""

import argparse

import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Trainer,
    TrainingArguments,
)

from rsa_megatron import RSAConfig  # RSA
from rsa_megatron.huggingface import RSATrainerMixin  # RSA

WORDS = "<pad> <image> <video> <start> <end> <eos> what ? a square at the".split()
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220), "yellow": (230, 210, 40)}
PLACES = {"top": (21, 0), "bottom": (21, 42), "left": (0, 21), "right": (42, 21), "middle": (21, 21)}
TOKENS = {word: number for number, word in enumerate([*WORDS, *COLOURS, *PLACES])}


class MyTrainer(
    RSATrainerMixin,  # RSA
    Trainer,
):
    pass


def tokenize(text: str) -> list[int]:
    return [TOKENS[word] for word in text.split()]


def draw(number: int) -> dict:
    """A picture of a square on noise, and what it shows."""
    generator = torch.Generator().manual_seed(number)
    colour, place = ([*names][int(torch.randint(len(names), (), generator=generator))] for names in (COLOURS, PLACES))
    noise = torch.randint(0, 60, (84, 84, 3), generator=generator, dtype=torch.uint8)
    picture = Image.fromarray(noise.numpy())
    picture.paste(COLOURS[colour], (*PLACES[place], PLACES[place][0] + 42, PLACES[place][1] + 42))
    return {"picture": picture, "caption": f"a {colour} square at the {place} <eos>"}


def collate(samples: list[dict], processor: Qwen2VLImageProcessor) -> dict[str, torch.Tensor]:
    """What a processor and a collator make of samples: image tokens, padded rows, labels on the captions alone."""
    batch = dict(processor([sample["picture"] for sample in samples], return_tensors="pt"))
    rows, labels = [], []
    for sample, grid in zip(samples, batch["image_grid_thw"]):
        num_tokens = int(grid.prod()) // processor.merge_size**2
        prompt = tokenize("<start>" + " <image>" * num_tokens + " <end> what ?")
        caption = tokenize(sample["caption"])
        rows.append(torch.tensor(prompt + caption))
        labels.append(torch.tensor([-100] * len(prompt) + caption))
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad(rows, batch_first=True, padding_value=TOKENS["<pad>"])
    return batch | {
        "input_ids": input_ids,
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "attention_mask": (input_ids != TOKENS["<pad>"]).long(),
        "mm_token_type_ids": (input_ids == TOKENS["<image>"]).long(),
    }


def build_model() -> Qwen2_5_VLForConditionalGeneration:
    text = dict(vocab_size=len(TOKENS), hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])
    heads = dict(num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope, pad_token_id=TOKENS["<pad>"])
    vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, window_size=56)
    config = Qwen2_5_VLConfig(
        text_config=text | heads,
        vision_config=vision | dict(fullatt_block_indexes=[1]),
        image_token_id=TOKENS["<image>"],
        video_token_id=TOKENS["<video>"],
        vision_start_token_id=TOKENS["<start>"],
        vision_end_token_id=TOKENS["<end>"],
    )
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="samples of a micro-batch and rank")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--out", default="runs/huggingface_trainer")
    parser.add_argument("--rsa-weight", type=float, default=0.01)  # RSA
    flags = parser.parse_args()
    processor = Qwen2VLImageProcessor(min_pixels=84 * 84, max_pixels=84 * 84)
    trainer = MyTrainer(
        rsa=RSAConfig(weight=flags.rsa_weight),  # RSA
        model=build_model(),
        args=TrainingArguments(
            output_dir=flags.out,
            max_steps=flags.steps,
            per_device_train_batch_size=flags.batch,
            gradient_accumulation_steps=flags.accumulate,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,  # the collator needs the pictures
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=[draw(number) for number in range(1024)],
        data_collator=lambda samples: collate(samples, processor),
    )
    trainer.train()


if __name__ == "__main__":
    main()
