"""Where LLaVAModel's splice puts things: an image token of the text becomes the tokens of its tiles.

Shapes: B samples, S text positions, L positions of the spliced row, of which a context-parallel rank has L / C.
"""

import torch
from torch import Tensor


def positions(is_image_BS: Tensor, tokens_of_images: Tensor) -> Tensor:
    """Where each text position lies in its spliced row, [B, S]; for an image its last token.

    Args:
        is_image_BS: where the text has an image.
        tokens_of_images: positions that each image of the batch takes, in order.
    """
    lengths_BS = torch.ones_like(is_image_BS, dtype=torch.int64)
    lengths_BS[is_image_BS] = tokens_of_images.to(lengths_BS)
    return lengths_BS.cumsum(dim=1) - 1


def readable(mask_BS: Tensor, is_image_BS: Tensor) -> Tensor:
    """The mask without images, and without the token just before one: LLaVAModel takes its number out of the loss mask."""
    before_BS = torch.nn.functional.pad(is_image_BS[:, 1:], (0, 1))
    return mask_BS * ~(is_image_BS | before_BS)


def spliced(mask_BS: Tensor, position_BS: Tensor, length: int) -> Tensor:
    """What stands at the text positions, where they have come to lie: [B, L]; 0 elsewhere, cut at L."""
    longest = max(length, int(position_BS.max()) + 1)
    return mask_BS.new_zeros(len(mask_BS), longest).scatter_(1, position_BS, mask_BS)[:, :length]


def context_parallel_part(mask_BL: Tensor, size: int, rank: int, bounds: Tensor | None = None) -> Tensor:
    """A rank's part of each row under Megatron's zigzag order: of 2 C equal pieces the rank-th and the rank-th from the end.

    Args:
        bounds: of a packed row, where its sequences begin and end: each is split by itself, as Transformer Engine does it.
    """
    if size == 1:
        return mask_BL
    lengths = [mask_BL.shape[1]] if bounds is None else bounds.diff().tolist()
    parts = []
    for sequence_BL in mask_BL.split(lengths, dim=1):
        pieces = sequence_BL.chunk(2 * size, dim=1)
        if sequence_BL.shape[1]:
            parts += [pieces[rank], pieces[2 * size - 1 - rank]]
    return torch.cat(parts, dim=1)
