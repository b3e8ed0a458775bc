"""Who takes part in RSA, read off what a training script passes to LLaVAModel.forward; its batches may look as they like.

By default every sample with one image takes part, and its caption are the tokens that the LM loss learns. A script that
knows better says so by RSAPlugin(select=...), whole (RSASamples) or in part (who, or which tokens).

Shapes: B rows, n samples (B of them, or those packed into one row), S text positions.
"""

from dataclasses import dataclass

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from rsa_megatron.batch import RSASamples
from rsa_megatron.hooks import token_positions

# An odd constant near 2^64 / golden ratio: its multiples modulo 2^64 lie far apart, so that sums of them differ.
_SPREAD = -7046029254386353131


@dataclass
class Selection:
    """What a script says of a batch; None is left to the default."""

    #: 1 for a sample that may take part, [n]
    eligible: Tensor | None = None
    #: 1 where the token AT this position is the caption's, [B, S]
    caption_mask: Tensor | None = None


def samples_of(arguments: dict, model: LLaVAModel, selection: Selection = Selection()) -> RSASamples:
    """The RSASamples of a micro-batch, on the device of its input ids.

    Args:
        arguments: of LLaVAModel.forward, by name: input_ids, loss_mask, num_image_tiles, packed_seq_params.
    """
    input_ids, is_image_BS = arguments["input_ids"], images_in(arguments, model)
    tiles = tiles_of_images(arguments, is_image_BS)
    if not is_packed(arguments):
        num_samples = len(input_ids)
        sample_BS = torch.arange(num_samples, device=input_ids.device)[:, None].expand_as(input_ids)
    else:
        position_BS = token_positions.positions(is_image_BS, tiles * model.img_seq_len)
        num_samples, sample_BS = _packed_samples(arguments["packed_seq_params"], position_BS)
    num_images = _per_sample(is_image_BS.long(), sample_BS, num_samples)
    tiles_BS = torch.zeros_like(input_ids)
    tiles_BS[is_image_BS] = tiles.to(tiles_BS)
    eligible = (num_images == 1).long()
    if selection.eligible is not None:
        _check("eligible", selection.eligible, eligible.shape)
        eligible = eligible * (selection.eligible.to(eligible) > 0)
    caption_BS = selection.caption_mask
    if caption_BS is None:
        caption_BS = _learnt_tokens(arguments.get("loss_mask"), sample_BS)
    else:
        if caption_BS.shape[1] == input_ids.shape[1] + 1:  # of texts whose last token is a label alone
            caption_BS = caption_BS[:, :-1]
        _check("caption_mask", caption_BS, input_ids.shape)
        caption_BS = (caption_BS > 0).to(input_ids)
    if is_packed(arguments):
        caption_BS = caption_BS * (sample_BS + 1)
    return RSASamples(eligible, caption_BS, _per_sample(tiles_BS, sample_BS, num_samples), _ids(input_ids, num_samples))


def images_in(arguments: dict, model: LLaVAModel) -> Tensor:
    """Where an image stands in the text, [B, S] bool."""
    image_token = arguments.get("image_token_index")
    return arguments["input_ids"] == (model.image_token_index if image_token is None else image_token)


def is_packed(arguments: dict) -> bool:
    """Whether several samples, or one, share a row as packed sequences."""
    packed = arguments.get("packed_seq_params")
    return packed is not None and packed.qkv_format == "thd"


def tiles_of_images(arguments: dict, is_image_BS: Tensor) -> Tensor:
    """Tiles of each image of the batch, in order; one each where the script does not say (as LLaVAModel has it)."""
    tiles = arguments.get("num_image_tiles")
    if tiles is None:
        return torch.ones(int(is_image_BS.sum()), dtype=torch.int64, device=is_image_BS.device)
    return torch.as_tensor(tiles, device=is_image_BS.device)


def _packed_samples(packed: PackedSeqParams, position_BS: Tensor) -> tuple[int, Tensor]:
    """How many sequences are packed into the row, and which of them each text position belongs to, from 0."""
    bounds = packed.cu_seqlens_q_padded if packed.cu_seqlens_q_padded is not None else packed.cu_seqlens_q
    if len(position_BS) != 1:
        raise ValueError(f"RSA reads packed sequences from one row, not {len(position_BS)}: set --micro-batch-size 1")
    sample_BS = torch.searchsorted(bounds.to(position_BS), position_BS, right=True) - 1
    return len(bounds) - 1, sample_BS.clamp(max=len(bounds) - 2)


def _learnt_tokens(loss_mask_BS: Tensor | None, sample_BS: Tensor) -> Tensor:
    """1 where a token has been predicted: the loss mask at p speaks of the token at p + 1, within one sample."""
    learnt_BS = torch.zeros_like(sample_BS)
    if loss_mask_BS is None:  # on a stage that does not need it
        return learnt_BS
    same_sample = sample_BS[:, 1:] == sample_BS[:, :-1]
    learnt_BS[:, 1:] = ((loss_mask_BS[:, :-1] != 0) & same_sample).long()
    return learnt_BS


def _per_sample(number_BS: Tensor, sample_BS: Tensor, num_samples: int) -> Tensor:
    total = number_BS.new_zeros(num_samples)
    return total.index_add(0, sample_BS.flatten(), number_BS.flatten())


def _ids(input_ids: Tensor, num_samples: int) -> Tensor:
    """A number for each sample that every stage of a pipeline finds alike: a hash of the row's tokens and their places."""
    place_S = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    row_B = ((input_ids + 1) * _SPREAD * (2 * place_S + 1) * place_S).sum(dim=1)
    return (row_B.expand(num_samples) + torch.arange(num_samples, device=row_B.device)) & (2**63 - 1)


def _check(name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"RSAPlugin(select=...) gave {name} of shape {tuple(tensor.shape)}, the model's batch has {tuple(shape)}"
        )
