"""Train a small CLIP on image-caption pairs, and save it as a Hugging Face folder: two towers whose gap is a real one.

    python examples/revision/train_dual_encoder.py --data demo/data/captions --tokenizer demo/tokenizer --out demo/dual-encoders/seed-1

Real users take a published CLIP or SigLIP. For a demonstration without any download there must be one that knows the demo's
pictures, and it must have what CLIP has: two towers that begin apart, joined by nothing but InfoNCE on unit vectors, and the gap
that these leave. So the model is transformers' CLIPModel with CLIP's own loss. Its temperature begins at 0.01, where CLIP's ends:
CLIP begins at 0.07 and takes thousands of steps to get there. (A gap closes while the temperature is high: after 240 steps from
0.07 it was 0.11, after 120 from 0.02 it was 0.37, after 120 from 0.01 it was 0.62.) The folder holds model, tokenizer and image
processor: what CLIPModel.from_pretrained and rsa-megatron realign read.

It tells how well held-out pictures find their captions, and how far apart the two modalities are:

    R@1                 share of images whose own caption is the nearest of all held-out ones; chance is 1 in their number
    centroid gap        distance of the mean of unit image embeddings from that of unit text embeddings
    s                   what ReAlign's trace step multiplies text by, sqrt(T_image / T_text) with T = 1 - |mean|^2 of unit rows

Shapes: N pairs, L tokens, S side of an image in pixels, D width of an embedding.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import processors
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from rsa_megatron import atomic
from rsa_megatron.data.sources.open_pairs import Pairs, open_pairs

#: A text begins and ends with these, as CLIP's do; padding is the second, too. The state at the first of them is the text's.
FIRST, LAST = "<|im_start|>", "<|endoftext|>"
SIDE, PATCH = 84, 14
FIGURES = "figures.json"
# InfoNCE saturates at a large temperature: CLIP's own bound, 100.
LARGEST_LOGIT_SCALE = torch.tensor(100.0).log().item()


@dataclass(frozen=True)
class Examples:
    """Pairs as the model takes them, all in memory."""

    images_N3SS: Tensor
    """uint8: 8000 of 84 pixels are 170 MB."""
    tokens_NL: Tensor
    """int64, padded with LAST to the longest."""


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        if is_there(args):
            return print(f"{args.out}: there already")
        tokenizer = tokenizer_of(args.tokenizer, args.max_tokens)
        train_pairs, held_out_pairs = (open_pairs(args.data, split=split) for split in ("train", "val"))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    processor = image_processor()
    train_examples, held_out = (
        read(pairs, count, tokenizer, processor, title)
        for pairs, count, title in (
            (train_pairs, args.num_samples, "training pairs"),
            (held_out_pairs, args.num_held_out, "held-out pairs"),
        )
    )
    torch.manual_seed(args.seed)
    model = CLIPModel(configuration(args, tokenizer))
    train(model, train_examples, processor, args)
    figures = evaluate(model, held_out, processor)
    print(in_words(figures))
    save(args.out, model, tokenizer, processor, figures | {"settings": settings(args)})


def parse(arguments: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="image-caption pairs with a part train and a part val")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of prepare_data.py's tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--num-samples", type=int, help="training pairs; all of them by default")
    parser.add_argument("--num-held-out", type=int, default=1000, help="held-out pairs to measure on; %(default)s")
    parser.add_argument("--steps", type=int, default=200, help="%(default)s")
    parser.add_argument("--batch-size", type=int, default=128, help="pairs per contrastive step; %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate; %(default)s")
    parser.add_argument("--temperature", type=float, default=0.01, help="initial value; it is trained; %(default)s")
    parser.add_argument("--width", type=int, default=128, help="of both towers; %(default)s")
    parser.add_argument("--text-layers", type=int, default=2, help="%(default)s")
    parser.add_argument("--vision-layers", type=int, default=3, help="%(default)s")
    parser.add_argument("--projection-dim", type=int, default=160, help="width of the embeddings; %(default)s")
    parser.add_argument("--max-tokens", type=int, default=128, help="longer captions are cut; %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of weights and order; %(default)s")
    return parser.parse_args(arguments)


def settings(args) -> dict:
    """What makes a model what it is."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name != "out"
    }


def is_there(args) -> bool:
    """Whether the folder holds what these settings give; ValueError if it holds something else."""
    figures = args.out / FIGURES
    if not args.out.exists():
        return False
    if not figures.is_file() or json.loads(figures.read_text()).get("settings") != settings(args):
        raise ValueError(f"{args.out} holds something of other settings: name another --out, or remove it")
    return True


def tokenizer_of(folder: Path, max_tokens: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, with both ends put around each text."""
    rust = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    ends = [(token, rust.token_to_id(token)) for token in (FIRST, LAST)]
    if None in dict(ends).values():
        raise ValueError(
            f"{folder}: its tokenizer lacks {FIRST} or {LAST}; name a tokenizer that prepare_data.py has written"
        )
    rust.post_processor = processors.TemplateProcessing(single=f"{FIRST} $A {LAST}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=rust, bos_token=FIRST, eos_token=LAST, pad_token=LAST, model_max_length=max_tokens
    )


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def configuration(args, tokenizer: PreTrainedTokenizerFast) -> CLIPConfig:
    sizes = dict(hidden_size=args.width, intermediate_size=4 * args.width, num_attention_heads=4)
    text = dict(
        num_hidden_layers=args.text_layers,
        vocab_size=len(tokenizer),
        max_position_embeddings=args.max_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(num_hidden_layers=args.vision_layers, image_size=SIDE, patch_size=PATCH)
    return CLIPConfig(
        text_config=sizes | text,
        vision_config=sizes | vision,
        projection_dim=args.projection_dim,
        logit_scale_init_value=-math.log(args.temperature),
    )


def read(pairs: Pairs, count: int | None, tokenizer, processor, title: str) -> Examples:
    """The first `count` pairs, decoded and tokenized."""
    images, captions = [], []
    for index in tqdm(range(min(count or len(pairs), len(pairs))), desc=title, unit="pair", mininterval=1):
        pixels = processor(
            pairs[index].image(), do_rescale=False, do_normalize=False, return_tensors="pt"
        ).pixel_values[0]
        images.append(pixels.round().clamp(0, 255).to(torch.uint8))
        captions.append(pairs[index].caption)
    tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt").input_ids
    return Examples(torch.stack(images), tokens)


def batch(examples: Examples, rows: Tensor, processor) -> dict[str, Tensor]:
    """What CLIPModel takes: pixels as the image processor gives them, tokens up to the longest text of the batch."""
    mean_311, deviation_311 = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
    pixels_n3SS = (examples.images_N3SS[rows] / 255 - mean_311) / deviation_311
    tokens_nL = examples.tokens_NL[rows]
    # The column in which each text has ended; what comes after its end is seen by nothing.
    longest = int((tokens_nL != tokens_nL[:, -1:]).sum(1).max()) + 1
    return {"pixel_values": pixels_n3SS, "input_ids": tokens_nL[:, :longest]}


def train(model: CLIPModel, examples: Examples, processor, args) -> list[float]:
    """InfoNCE over batches of pairs; the loss of each step."""
    order = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.1)
    losses, progress = [], tqdm(total=args.steps, desc="dual encoder", unit="step", mininterval=1)
    while len(losses) < args.steps:
        for rows in torch.randperm(len(examples.images_N3SS), generator=order).split(args.batch_size)[
            : args.steps - len(losses)
        ]:
            loss = model(**batch(examples, rows, processor), return_loss=True).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            model.logit_scale.data.clamp_(max=LARGEST_LOGIT_SCALE)
            losses.append(loss.item())
            progress.update()
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    progress.close()
    return losses


@torch.inference_mode()
def evaluate(model: CLIPModel, examples: Examples, processor) -> dict[str, float]:
    """Retrieval among these pairs and the gap between their two clouds."""
    pieces = [model(**batch(examples, rows, processor)) for rows in torch.arange(len(examples.images_N3SS)).split(128)]
    image_ND, text_ND = (
        torch.cat([getattr(piece, name) for piece in pieces]).double() for name in ("image_embeds", "text_embeds")
    )
    nearest_N = (image_ND @ text_ND.T).argmax(1)
    image_mean_D, text_mean_D = image_ND.mean(0), text_ND.mean(0)
    return {
        "pairs": len(image_ND),
        "R@1": (nearest_N == torch.arange(len(image_ND))).double().mean().item(),
        "centroid gap": (image_mean_D - text_mean_D).norm().item(),
        "s": ((1 - image_mean_D.square().sum()) / (1 - text_mean_D.square().sum())).sqrt().item(),
        "logit scale": model.logit_scale.exp().item(),
    }


def in_words(figures: dict[str, float]) -> str:
    return (
        f"of {figures['pairs']} held-out images {figures['R@1']:.3f} find their caption first (chance {1 / figures['pairs']:.4f}); "
        f"centroid gap {figures['centroid gap']:.4f}, s {figures['s']:.4f}, logit scale {figures['logit scale']:.1f}"
    )


def save(folder: Path, model: CLIPModel, tokenizer, processor, figures: dict) -> None:
    """A folder that is there as a whole or not at all."""
    with atomic.new_folder(folder) as unfinished:
        for part in (model, tokenizer, processor):
            part.save_pretrained(unfinished)
        (unfinished / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
    print(f"dual encoder: {folder}")


if __name__ == "__main__":
    main()
