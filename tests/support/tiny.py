"""A model so small that a training step takes milliseconds, and batches made up for it."""

import torch

from rsa_megatron.anyres import ImageLayout
from rsa_megatron.batch import LlavaBatch, RSASamples
from rsa_megatron.models.architectures import ARCHITECTURES, Architecture, Decoder, VisionTower, square_grids

# Wider tower than decoder, so that v takes several payload rows; 4 layers for 2 stages of 2 chunks.
TINY = Architecture(
    name="tiny",
    vision=VisionTower(
        num_layers=2, hidden_size=48, ffn_hidden_size=64, num_attention_heads=4, image_size=28, patch_size=14
    ),
    decoder=Decoder(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        max_position_embeddings=160,
        tie_word_embeddings=True,
    ),
    vocab_size=1024,
    grid_pinpoints=square_grids(28, 2, 2),
)
VOCAB_SIZE = TINY.vocab_size
IMAGE_TOKEN = 3  # the demo tokenizer's


def settings() -> dict:
    """A recipe: the paper's stage with everything trainable."""
    return dict(
        trainable=["vision", "projector", "embeddings", "language"],
        template="plain",
        image_aspect_ratio="square",
        seq_length=32,
        micro_batch_size=4,
        global_batch_size=4,
        train_iters=10,
        lr=1e-3,
        min_lr=1e-3,
        lr_decay_style="constant",
        clip_grad=0.0,
        # Adam divides by sqrt(v) + eps: with a small eps a gradient that is 0 but for rounding moves its parameter
        # by a whole step in the direction of the rounding, and no two layouts would agree.
        adam_eps=1e-2,
        weight_decay=0.0,
        init_method_std=0.1,
        num_workers=0,
        eval_iters=0,
        eval_interval=1000,
        mutual_knn_samples=0,
    )


def register() -> None:
    """Make --model tiny known in this process."""
    from rsa_megatron import recipes

    ARCHITECTURES["tiny"] = TINY
    recipes.RECIPES["tiny", "1"] = settings
    sizes = {name: settings()[name] for name in ("micro_batch_size", "num_workers", "eval_iters", "mutual_knn_samples")}
    for stage in ("1.5", "2"):
        recipes.RECIPES["tiny", stage] = lambda stage=stage: (
            recipes.unpack(recipes.STAGES[stage]()) | sizes | dict(image_grids=None, lr=1e-3)
        )


def layout(num_tiles: int) -> ImageLayout:
    """An image of so many tiles: one without a newline, or a base tile and a row of others."""
    return ImageLayout(28, 28 * (num_tiles - 1), 1, num_tiles - 1) if num_tiles > 1 else ImageLayout(28, 28, newline=0)


def batch(
    seed: int, eligible=(1, 1, 1, 1), num_tokens: int = 12, num_targets=(9, 9, 9, 9), tiles=(1, 1, 1, 1)
) -> LlavaBatch:
    """Samples of one image, of so many tiles (or none), and a caption; the image token first; num_targets tokens are learnt."""
    generator = torch.Generator().manual_seed(seed)
    num_samples = len(eligible)
    text = torch.randint(10, VOCAB_SIZE, (num_samples, num_tokens + 1), generator=generator)
    has_image = torch.tensor(tiles) > 0
    text[has_image, 0] = IMAGE_TOKEN
    position = torch.arange(num_tokens)
    loss_mask = ((position >= 1) & (position < 1 + torch.tensor(num_targets)[:, None])).float()
    # Captions of different lengths, none to the end of the row.
    caption_end = torch.tensor([9, 7, 10, 8])[torch.arange(num_samples) % 4]
    caption_mask = ((position >= 1) & (position < caption_end[:, None])).long()
    return LlavaBatch(
        tokens=text[:, :-1],
        labels=text[:, 1:],
        loss_mask=loss_mask,
        images=torch.randn(sum(tiles), 3, 28, 28, generator=generator),
        image_layouts=torch.tensor([layout(num_tiles).as_numbers() for num_tiles in tiles if num_tiles]).reshape(-1, 6),
        row_lengths=torch.tensor([num_tokens + (layout(n).num_tokens(2, 9) - 1 if n else 0) for n in tiles]),
        rsa=RSASamples(
            eligible=torch.tensor(eligible),
            caption_mask=caption_mask,
            num_tiles=torch.tensor(tiles),
            sample_id=torch.randint(0, 2**62, (num_samples,), generator=generator),
        ),
        keys=[f"sample-{seed}-{i}" for i in range(num_samples)],
        records=[{} for _ in range(num_samples)],
    )


def text_batch(seed: int) -> LlavaBatch:
    """Samples without an image."""
    return batch(seed, eligible=(0, 0, 0, 0), tiles=(0, 0, 0, 0))


def joined(*parts: LlavaBatch) -> LlavaBatch:
    """The samples of several batches in one."""
    rsa = RSASamples(
        *(torch.cat([getattr(one.rsa, name) for one in parts]) for name in RSASamples.__dataclass_fields__)
    )
    tensors = ("tokens", "labels", "loss_mask", "images", "image_layouts", "row_lengths")
    return LlavaBatch(
        **{name: torch.cat([getattr(one, name) for one in parts]) for name in tensors},
        rsa=rsa,
        keys=sum((one.keys for one in parts), []),
        records=sum((one.records for one in parts), []),
    )


def part(whole: LlavaBatch, index: int, count: int) -> LlavaBatch:
    """Part `index` of `count` equal parts: what one of several data-parallel ranks reads."""
    if count == 1:
        return whole
    size = len(whole.keys) // count
    rows = slice(index * size, (index + 1) * size)
    first_tile, first_image = (
        int(number[: rows.start].sum()) for number in (whole.rsa.num_tiles, whole.rsa.num_tiles > 0)
    )
    num_tiles, num_images = (int(number[rows].sum()) for number in (whole.rsa.num_tiles, whole.rsa.num_tiles > 0))
    return LlavaBatch(
        tokens=whole.tokens[rows],
        labels=whole.labels[rows],
        loss_mask=whole.loss_mask[rows],
        images=whole.images[first_tile : first_tile + num_tiles],
        image_layouts=whole.image_layouts[first_image : first_image + num_images],
        row_lengths=whole.row_lengths[rows],
        rsa=RSASamples(*(getattr(whole.rsa, name)[rows] for name in RSASamples.__dataclass_fields__)),
        keys=whole.keys[rows],
        records=whole.records[rows],
    )
