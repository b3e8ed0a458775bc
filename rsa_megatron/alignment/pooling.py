"""From tokens to one vector a sample: masked means (paper, eq. 1 and 2), in parts that add up over ranks.

Sums are taken in float32 of unrounded products (a 0/1 mask multiplies exactly), so that bf16 activations
are read once and no float32 copy of them is made (but of packed rows, while they are summed).

Shapes: T tiles of P patch tokens, width D, for B samples; S sequence positions, width E.
"""

import torch
from torch import Tensor


def image_vectors(tokens_TPD: Tensor, count_B: Tensor, *, pooling: str = "base", base_tile: str = "first") -> Tensor:
    """v_i of every sample, [B, D] in float32; 0 for a sample without an image (paper, eq. 1 and table 2).

    Args:
        tokens_TPD, count_B, pooling, base_tile: as `pool_tiles` and `tile_weights` take them.
    """
    num_tiles = tokens_TPD.shape[0]
    weight_BT = tile_weights(count_B, num_tiles, pooling, base_tile)
    if pooling == "full" or num_tiles <= len(count_B):
        return pool_tiles(tokens_TPD, weight_BT)
    # Of images cut into several tiles one each counts: the others are not read, and the backward pass, which makes a float32
    # gradient of what has been averaged, makes it of that one.
    has_image_B, base_B = weight_BT.max(dim=1)
    return pool_tiles(tokens_TPD.index_select(0, base_B), torch.diag(has_image_B))


def pool_tiles(tokens_TPD: Tensor, tile_weight_BT: Tensor) -> Tensor:
    """v_i: mean over the tokens of the tiles that a sample counts, [B, D] in float32 (paper, eq. 1).

    Args:
        tokens_TPD: last-layer tokens of the vision encoder, before the projector.
        tile_weight_BT: what part each tile has in each sample's mean; rows sum to 1, or to 0 where a sample
            has no image (its row of v is then 0). One 1 a row selects the base image.
    """
    tile_mean_TD = tokens_TPD.mean(dim=1, dtype=torch.float32)
    # Not a matrix product: under TF32 or bf16 products a selected tile would come out rounded.
    return (tile_weight_BT.to(tile_mean_TD)[..., None] * tile_mean_TD).sum(dim=1)


def tile_weights(count_B: Tensor, num_tiles: int, pooling: str, base_tile: str) -> Tensor:
    """What part each of T tiles has in each sample's mean, [B, T], for `pool_tiles` (paper, table 2).

    Args:
        count_B: tiles of each sample, int64; those of the first come first.
        pooling: "base", the base image alone, or "full", all tiles of the sample alike.
        base_tile: "first" or "last" of a sample's tiles is its base image.
    """
    end_B = count_B.cumsum(0)
    start_B = end_B - count_B
    tile_T = torch.arange(num_tiles, device=count_B.device)
    if pooling == "full":
        inside_BT = (tile_T >= start_B[:, None]) & (tile_T < end_B[:, None])
        return inside_BT / count_B.clamp(min=1)[:, None]
    base_B = start_B if base_tile == "first" else end_B - 1
    return ((tile_T == base_B[:, None]) & (count_B > 0)[:, None]).float()


def pool_text(hidden_SBE: Tensor, mask_BS: Tensor) -> Tensor:
    """Sum over the masked positions, [B, E] in float32; divided by the count it is t_i (paper, eq. 2).

    A sum and not the mean, because the rows of one sample may lie on several ranks.

    Args:
        hidden_SBE: last-layer hidden states after the final norm; a row is the state OF its token.
        mask_BS: 1 where the row's own token belongs to the caption.
    """
    masked_SBE = hidden_SBE * mask_BS.T[..., None].to(hidden_SBE.dtype)
    return masked_SBE.sum(dim=0, dtype=torch.float32)


def pool_packed_text(hidden_SE: Tensor, sample_S: Tensor, num_samples: int) -> Tensor:
    """The same sums for n samples that share one row, [n, E] in float32.

    Args:
        hidden_SE: the row's states.
        sample_S: s where a row is a caption token's of sample s = 1 .. n, else 0; int64.
    """
    # Slot 0 takes the rows of no caption. (The rows as float32 live until their sum is taken; nothing keeps them.)
    sums = hidden_SE.new_zeros(num_samples + 1, hidden_SE.shape[1], dtype=torch.float32)
    return sums.index_add(0, sample_S, hidden_SE.float())[1:]
