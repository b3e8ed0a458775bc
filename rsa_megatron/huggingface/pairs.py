"""The pairs of a batch: v and t of each sample that takes part, read while the batch goes forward, and those of all ranks.

Shapes: B samples of a rank, n of them its pairs, N those of all ranks; I images; S positions; D and E widths of v and t.
"""

import contextlib
from operator import attrgetter

import torch
import torch.distributed
from torch import Tensor, nn

from rsa_megatron.alignment.gather import gather_rows
from rsa_megatron.alignment.pooling import pool_text
from rsa_megatron.config import RSAConfig
from rsa_megatron.huggingface.families import Family, count_images, find_images, find_videos

#: why a sample is no pair; the first that holds is counted
CAUSES = ("not_eligible", "video", "no_image", "several_images", "no_caption")


@contextlib.contextmanager
def read_states(model: nn.Module, family: Family):
    """While a batch goes forward: "vision", what the tower gives for images, and "text", the decoder's last states.

    Each is what comes first, with its gradient: the tower reads images before videos, and layers that are computed again in the backward
    pass come after.
    """
    states: dict[str, Tensor] = {}

    def keep_vision(module, args, kwargs, output):
        read = output if family.reads_output else (*args, *kwargs.values())[0]
        states.setdefault("vision", read)

    def keep_text(module, args, output):
        states.setdefault("text", output[0])

    hooks = [
        attrgetter(family.connector)(model).register_forward_hook(keep_vision, with_kwargs=True),
        model.language_model.register_forward_hook(keep_text),
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


class Pairs:
    """This rank's pairs of a micro-batch."""

    def __init__(self, v_nD: Tensor | None, t_nE: Tensor, left_out: list[Tensor]):
        #: None without an image in the batch, whose width then is not known
        self.v_nD, self.t_nE = v_nD, t_nE
        #: samples that are no pair, by cause
        self.left_out = left_out


def read_pairs(model: nn.Module, family: Family, states: dict, batch: dict, config: RSAConfig) -> Pairs:
    has_images = batch.get("pixel_values") is not None
    for name, is_needed, module in (
        ("text", True, "language_model"),
        ("vision", has_images, family.connector),
    ):
        if is_needed and name not in states:
            raise ValueError(
                f"RSA: the model's {module} has not been called, or not so that hooks see it (torch.compile): leave it uncompiled"
            )
    images, hidden_BSE = find_images(batch, model.config), states["text"]
    caption_BS = _caption_mask(batch, images.is_image_BS, hidden_BSE)
    count_B = torch.zeros_like(images.count_B)
    if has_images:
        v_ID = family.mean(states["vision"], model, batch, images, config.image_pooling)
        count_B = count_images(images, len(v_ID), batch)
    valid_B, left_out = torch.ones_like(count_B, dtype=torch.bool), []
    eligible_B = torch.as_tensor(batch.get("rsa_eligible", torch.ones_like(count_B)), device=count_B.device)
    if eligible_B.numel() != len(count_B):
        raise ValueError(f"RSA: rsa_eligible of shape {tuple(eligible_B.shape)} for {len(count_B)} samples")
    for holds_B in (  # in the order of CAUSES
        eligible_B.view(-1) <= 0,
        find_videos(batch, model.config),
        (count_B == 0) | ~images.is_image_BS.any(dim=1),
        count_B > 1,
        ~caption_BS.any(dim=1),
    ):
        left_out.append((valid_B & holds_B).sum())
        valid_B = valid_B & ~holds_B
    mask_nS = caption_BS[valid_B].to(hidden_BSE.device)
    hidden_nSE = hidden_BSE[valid_B.to(hidden_BSE.device)]
    t_nE = pool_text(hidden_nSE.transpose(0, 1), mask_nS) / mask_nS.sum(dim=1, keepdim=True)
    v_nD = v_ID[(count_B.cumsum(0) - count_B)[valid_B].to(v_ID.device)] if has_images else None
    v_nD = v_nD.detach() if has_images and config.stop_gradient == "vision" else v_nD
    return Pairs(v_nD, t_nE.detach() if config.stop_gradient == "text" else t_nE, left_out)


def _caption_mask(batch: dict, is_image_BS: Tensor, hidden_BSE: Tensor) -> Tensor:
    """Where the token AT a position is the caption's, [B, S]."""
    caption_BS, labels_BS = batch.get("rsa_caption_mask"), batch.get("labels")
    name = "labels" if caption_BS is None else "rsa_caption_mask"
    if caption_BS is None:
        if labels_BS is None:
            raise ValueError("RSA: the batch has neither labels nor rsa_caption_mask: which tokens are the caption?")
        caption_BS = labels_BS != -100
    if caption_BS.shape != hidden_BSE.shape[:2] or caption_BS.shape != is_image_BS.shape:
        raise ValueError(
            f"RSA: {name} of shape {tuple(caption_BS.shape)} for a decoder that has read {tuple(hidden_BSE.shape[:2])}: image tokens must be expanded "
            "in input_ids, and one sample a row"
        )
    return (caption_BS > 0) & ~is_image_BS


def count_ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def gather_pairs(v_nD: Tensor | None, t_nE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Own v and t, those of all ranks without gradient, and where the own begin among them. Ranks may have more or fewer, or none."""
    width = v_nD.shape[1] if v_nD is not None else 0
    if count_ranks() == 1:
        v_nD = t_nE.new_zeros(0, width) if v_nD is None else v_nD
        return v_nD, t_nE, v_nD.detach(), t_nE.detach(), 0
    most = torch.tensor([len(t_nE), width], device=t_nE.device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    num_rows, width = most.tolist()
    v_nD = t_nE.new_zeros(0, width) if v_nD is None else v_nD
    rows_BW = nn.functional.pad(torch.cat([v_nD, t_nE], dim=1).detach(), (0, 0, 0, num_rows - len(t_nE)))
    valid_B = torch.arange(num_rows, device=t_nE.device) < len(t_nE)
    rows_NW, first_row = gather_rows(rows_BW, valid_B, torch.distributed.group.WORLD)
    return v_nD, t_nE, rows_NW[:, :width], rows_NW[:, width:], first_row
