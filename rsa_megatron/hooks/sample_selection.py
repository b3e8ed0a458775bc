"""Which samples take part in RSA, from what a training script passes to the model's forward; its batches may look as they like.

By default every sample with one image takes part, and its caption are the tokens that the LM loss trains on. A script can specify
both by RSAPlugin(select=...), whole (RSASamples) or in part (which samples, or which tokens).

Shapes: B rows, n samples (B of them, or those packed into one row), S text positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rsa_megatron.batch import RSASamples
from rsa_megatron.hooks.broadcast import broadcast_tensors
from rsa_megatron.hooks.host import Host
from rsa_megatron.hooks.packed_row import check_bounds, is_packed, packed_row

_FIELDS, _COPIES = ("eligible", "caption_mask", "num_tiles", "sample_id"), "captions_are_copies"

# An odd constant near 2^64 / golden ratio: its multiples modulo 2^64 lie far apart, so that sums of them differ.
_SPREAD = -7046029254386353131


@dataclass
class Selection:
    """What a script specifies of a batch; None is left to the default."""

    #: 1 for a sample that may take part, [n]
    eligible: Tensor | None = None
    #: 1 where the token AT this position is the caption's, [B, S]
    caption_mask: Tensor | None = None


def select_samples(
    arguments: dict, host: Host, read_selection: Callable[[], RSASamples | Selection | None], *, at_end: bool
) -> RSASamples:
    """The micro-batch's RSASamples on every tensor-parallel rank, their captions without positions that the decoder does not get.

    Args:
        arguments: of the model's forward, by name.
        read_selection: gives the batch's selection on the ranks that have read it, else None.
        at_end: captions are to be copied to the end of their rows, where no image follows them, unless they are copies already.
    """
    selection = read_selection() or Selection()
    missing, present = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    data = {name: getattr(selection, name, None) for name in _FIELDS}
    data = {name: missing if tensor is None else tensor for name, tensor in data.items()}
    # By its shape, which is known without waiting for the device.
    data[_COPIES] = present if getattr(selection, _COPIES, False) else missing
    data = broadcast_tensors((*_FIELDS, _COPIES), data, torch.int64, host.pg_collection.tp)
    are_copies = data.pop(_COPIES).numel() > 0
    if data["sample_id"].numel():
        samples = RSASamples(**data, captions_are_copies=are_copies)
    else:
        eligible, caption_mask = (data[name] if data[name].numel() else None for name in ("eligible", "caption_mask"))
        samples = samples_of(arguments, host, Selection(eligible, caption_mask))
    kept_BS = host.keeps_caption(samples.caption_mask, host.images_in(arguments), at_end=at_end and not are_copies)
    return replace(samples, caption_mask=kept_BS)


def samples_of(arguments: dict, host: Host, selection: Selection = Selection()) -> RSASamples:
    """The RSASamples of a micro-batch, on the device of its input ids.

    Args:
        arguments: of the model's forward, by name: input_ids, loss_mask, packed_seq_params, and what the host reads.
    """
    input_ids, is_image_BS = arguments["input_ids"], host.images_in(arguments)
    tiles = host.tiles_of_images(arguments, is_image_BS)
    if not is_packed(arguments):
        num_samples, row = len(input_ids), None
        sample_BS = torch.arange(num_samples, device=input_ids.device)[:, None].expand_as(input_ids)
        tiles_BS = torch.zeros_like(input_ids)
        tiles_BS[is_image_BS] = tiles.to(tiles_BS)
    else:
        position_BS = host.positions(arguments, is_image_BS, tiles)
        # (Unlike an index, this does not wait for a GPU; that images and tiles are as many `positions` has seen.)
        tiles_BS = torch.zeros_like(input_ids).masked_scatter(is_image_BS, tiles.to(input_ids))
        row = packed_row(arguments["packed_seq_params"], position_BS)
        num_samples, sample_BS = row.num_samples, row.sample_BS
    num_images = _per_sample(is_image_BS.long(), sample_BS, num_samples)
    eligible = (num_images == 1).long()
    if (chosen := selection.eligible) is not None:
        if row is not None and len(chosen) == num_samples - 1:
            # A row's padding may be one more sequence, which is no sample to who has packed it.
            chosen, row = torch.nn.functional.pad(chosen, (0, 1)), row._replace(last_is_padding=True)
        _check("eligible", chosen, eligible.shape)
        eligible = eligible * (chosen.to(eligible) > 0)
    caption_BS = selection.caption_mask
    if caption_BS is None:
        caption_BS = _trained_tokens(arguments.get("loss_mask"), sample_BS)
        if row is not None:  # the last token of a sequence predicts none of it, nor of its padding
            caption_BS = caption_BS * ~row.in_padding_BS
    else:
        if caption_BS.shape[1] == input_ids.shape[1] + 1:  # of texts whose last token is a label alone
            caption_BS = caption_BS[:, :-1]
        _check("caption_mask", caption_BS, input_ids.shape)
        caption_BS = (caption_BS > 0).to(input_ids)
    if row is not None:
        is_read_BS = is_image_BS | (caption_BS > 0)
        if arguments.get("loss_mask") is not None:
            is_read_BS = is_read_BS | (arguments["loss_mask"] != 0)
        check_bounds(row, arguments["packed_seq_params"], position_BS, is_read_BS, host)
        caption_BS = caption_BS * (sample_BS + 1)
    return RSASamples(eligible, caption_BS, _per_sample(tiles_BS, sample_BS, num_samples), _ids(input_ids, num_samples))


def _trained_tokens(loss_mask_BS: Tensor | None, sample_BS: Tensor) -> Tensor:
    """1 where a token has been predicted: the loss mask at p speaks of the token at p + 1, within one sample."""
    trained_BS = torch.zeros_like(sample_BS)
    if loss_mask_BS is None:  # on a stage that does not need it
        return trained_BS
    same_sample = sample_BS[:, 1:] == sample_BS[:, :-1]
    trained_BS[:, 1:] = ((loss_mask_BS[:, :-1] != 0) & same_sample).long()
    return trained_BS


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
