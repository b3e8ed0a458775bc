"""Made-up samples, each in a row of its own and all in packed rows: what the packing task encoder makes of them, as batch.py states it."""

from dataclasses import replace

import torch

from rsa_megatron.batch import LlavaBatch, RSASamples
from tests.support import tiny

PAD = 0


def sample(seed: int, num_tokens: int, images=(), text_first: int = 0, eligible: bool = False) -> LlavaBatch:
    """A row of one sample: text_first tokens, then images of so many tiles, then text; of num_tokens tokens the last is a label alone.

    The tokens behind the images but for the first, to the last, are learnt and are the caption.
    """
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(10, tiny.VOCAB_SIZE, (num_tokens,), generator=generator)
    text[text_first : text_first + len(images)] = tiny.IMAGE_TOKEN
    position = torch.arange(num_tokens)
    is_answer = position > text_first + len(images)
    layouts = [tiny.layout(num_tiles) for num_tiles in images]
    return LlavaBatch(
        tokens=text[None, :-1],
        labels=text[None, 1:],
        loss_mask=is_answer[None, 1:].float(),
        images=torch.randn(sum(images), 3, 28, 28, generator=generator),
        image_layouts=torch.tensor([layout.as_numbers() for layout in layouts], dtype=torch.int64).reshape(-1, 6),
        row_lengths=torch.tensor([num_tokens - 1 + sum(layout.num_tokens(2, 9) - 1 for layout in layouts)]),
        rsa=RSASamples(
            eligible=torch.tensor([int(eligible)]),
            caption_mask=is_answer[None, :-1].long(),
            num_tiles=torch.tensor([sum(images)]),
            sample_id=torch.randint(0, 2**62, (1,), generator=generator),
        ),
        keys=[f"sample-{seed}"],
        records=[{}],
    )


def empty_sample() -> LlavaBatch:
    """What fills up the last batches of an epoch: nothing of it is learnt, and it has no key."""
    one = sample(0, num_tokens=2)
    one.rsa.caption_mask.zero_()
    return replace(one, loss_mask=torch.zeros_like(one.loss_mask), keys=[""])


def as_rows(samples: list[LlavaBatch]) -> LlavaBatch:
    """A row a sample, filled up to the longest text."""
    length = max(one.tokens.shape[1] for one in samples)

    def padded(rows):
        return torch.cat([torch.nn.functional.pad(row, (0, length - row.shape[1]), value=PAD) for row in rows])

    rsa = RSASamples(
        caption_mask=padded([one.rsa.caption_mask for one in samples]),
        **{name: _all(name, [one.rsa for one in samples]) for name in ("eligible", "num_tiles", "sample_id")},
    )
    rows = {name: padded([getattr(one, name) for one in samples]) for name in ("tokens", "labels", "loss_mask")}
    return LlavaBatch(**rows, **_parts(samples), row_lengths=_all("row_lengths", samples), rsa=rsa)


def as_packed_row(
    samples: list[LlavaBatch], *, with_copies: bool = False, last_tokens: int = 1, multiple: int = 1
) -> LlavaBatch:
    """One row: each sample with its last token, whose label is masked. Of no samples it is one empty sample, as the end of an epoch has it.

    Args:
        with_copies: behind each eligible sample its caption once more, and one token of padding (--rsa-text-source caption).
        last_tokens: 0 leaves them out, a mistake to be seen: LLaVAModel drops the label of a token before an image.
        multiple: each sequence is filled up to such a multiple of positions, as context parallelism asks for.
    """
    samples = samples or [empty_sample()]
    rows, lengths = {name: [] for name in ("tokens", "labels", "loss_mask", "caption_mask")}, []

    def append(length: int, **sequence):
        filler = -length % multiple
        for name, row in sequence.items():
            rows[name].append(torch.nn.functional.pad(row, (0, filler), value=0 if "mask" in name else PAD))
        lengths.append(length + filler)

    def longer(row, value=0, by=last_tokens):
        return torch.nn.functional.pad(row, (0, by), value=value)

    for number, one in enumerate(samples, start=1):
        append(
            int(one.row_lengths) + last_tokens,
            tokens=torch.cat([one.tokens, one.labels[:, -1:]][: 1 + last_tokens], dim=1),
            labels=longer(one.labels, PAD),
            loss_mask=longer(one.loss_mask),
            caption_mask=longer((0 if with_copies else number) * one.rsa.caption_mask),
        )
        if with_copies and one.rsa.eligible:
            copied = one.tokens[one.rsa.caption_mask > 0][None]
            marks, copied = longer(torch.full_like(copied, number), by=1), longer(copied, PAD, by=1)
            nothing = torch.zeros_like(copied)
            append(copied.shape[1], tokens=copied, labels=nothing, loss_mask=nothing.float(), caption_mask=marks)
    joined = {name: torch.cat(parts, dim=1) for name, parts in rows.items()}
    rsa = RSASamples(
        caption_mask=joined.pop("caption_mask"),
        captions_are_copies=with_copies,
        **{name: _all(name, [one.rsa for one in samples]) for name in ("eligible", "num_tiles", "sample_id")},
    )
    return LlavaBatch(
        **joined,
        **_parts(samples),
        row_lengths=torch.tensor([sum(lengths)]),
        rsa=rsa,
        sequence_lengths=torch.tensor(lengths),
    )


def _all(name: str, parts: list) -> torch.Tensor:
    return torch.cat([getattr(part, name) for part in parts])


def _parts(samples: list[LlavaBatch]) -> dict:
    return dict(
        images=_all("images", samples),
        image_layouts=_all("image_layouts", samples),
        keys=[key for one in samples for key in one.keys],
        records=[record for one in samples for record in one.records],
    )


def use_packed_rows() -> None:
    """In this process, the model is one whose rows may be packed."""
    from rsa_megatron.training import providers

    right = providers.LlavaOneVision
    providers.LlavaOneVision = lambda *args, **options: right(*args, **options | {"packs_rows": True})
