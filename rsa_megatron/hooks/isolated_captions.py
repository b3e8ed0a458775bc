"""--rsa-text-source caption: t_i = G(T_i), the caption read alone (paper, eq. 2), without a second pass through the model.

The caption's tokens stand once more at the end of their row. There they attend to one another and to nothing before them,
and the LM loss does not train on them; t is pooled over these copies. Rotary positions count differences alone, so the
copy is what the caption by itself would be; a learned position embedding gets positions 0, 1, ...

    row b       image tokens and text, as ever | padding | copy of the caption | padding
    segment     [0, start_b)                             | [start_b, L)

Position i attends to j where j <= i and both lie in the same segment. A segment's padding stands at its end, so that being
causal keeps it out. start_b = 0 is a row without a copy: one causal segment.

The layers learn of it as they understand it: local attention takes a mask, Transformer Engine's takes each row as two
packed sequences. Every stage of a pipeline needs start_b: the payload brings it (pipeline_payload.py).

That is for rows of one sample. In a row of packed samples each copy is a sequence of its own from the start, which the row's bounds
keep apart like any other (RSASamples.captions_are_copies): nothing here has to be done.

Shapes: B samples, S text positions, C of the longest caption, L positions of the spliced row, H width.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from rsa_megatron.batch import RSASamples
from rsa_megatron.hooks.caption_pooling import sequence_shards
from rsa_megatron.hooks.host import Host


def check_settings(settings, *, packed: bool) -> None:
    """Raise ValueError, naming the remedy, where attention would not see the segments.

    Args:
        settings: the decoder's config, or Megatron's arguments, which call these by the same names.
        packed: the layers take packed sequences (Transformer Engine's), not a mask.
    """
    refused = {
        "--context-parallel-size above 1": settings.context_parallel_size > 1,
        "--tp-comm-overlap": settings.tp_comm_overlap,
        "a window_size": getattr(settings, "window_size", None) is not None,  # no flag of Megatron's
        "--sequence-parallel with Transformer Engine unless --micro-batch-size and --eval-micro-batch-size are 1": packed
        and settings.sequence_parallel
        # (A config does not know them. Packed rows need none of this, and the rows of evaluation are not packed.)
        and max(getattr(settings, name, 1) for name in ("micro_batch_size", "eval_micro_batch_size")) > 1,
        "the fused softmax of local layers: pass --no-masked-softmax-fusion": not packed
        and settings.masked_softmax_fusion,
    }
    for setting, is_on in refused.items():
        if is_on:
            raise ValueError(f"--rsa-text-source caption does not go with {setting}")


def append(arguments: dict, samples: RSASamples) -> tuple[RSASamples, int]:
    """Put the captions of the eligible samples at the end of the model's arguments, in place.

    Args:
        arguments: of LLaVAModel.forward, by name.

    Returns:
        The samples, their caption mask that of the copies alone; and C, 0 where there is no caption.
    """
    mask_BS = samples.caption_mask * samples.eligible[:, None]
    num_copied = int(mask_BS.sum(dim=1).max())
    # Stable: the caption's tokens first, in their order.
    order_BC = mask_BS.argsort(dim=1, descending=True, stable=True)[:, :num_copied]
    copied_BC = mask_BS.gather(1, order_BC)
    input_ids = arguments["input_ids"]
    pad = torch.zeros_like(input_ids[:, :num_copied])
    additions = {
        "input_ids": torch.where(copied_BC > 0, input_ids.gather(1, order_BC), pad),
        "position_ids": torch.arange(num_copied, device=pad.device).expand_as(pad),
        "labels": pad,
        "loss_mask": pad,
    }
    for name, addition_BC in additions.items():
        whole_BS = arguments.get(name)
        if whole_BS is not None:
            arguments[name] = torch.cat([whole_BS, addition_BC.to(whole_BS.dtype)], dim=1)
    caption_mask = torch.cat([torch.zeros_like(mask_BS), copied_BC], dim=1)
    return replace(samples, caption_mask=caption_mask), num_copied


def segment_mask(start_B: Tensor, length: int) -> Tensor:
    """Megatron's attention mask, True where a position may not look, [B, 1, L, L]."""
    position_L = torch.arange(length, device=start_B.device)
    is_later_LL = position_L[None, :] > position_L[:, None]
    in_copy_BL = position_L >= start_B[:, None]
    # Of two positions of which the later is the one that looks: from a copy to what is before it.
    crosses_BLL = in_copy_BL[:, :, None] & ~in_copy_BL[:, None, :]
    return (is_later_LL | crosses_BLL)[:, None]


class SegmentedAttention:
    """Hooks on a chunk's decoder that keep its attention within the segments of each row.

    Args:
        start_B: gives where the copies begin in the forward pass that is under way; None leaves it as it is.
        reads_inner_layers: whether RSA reads text layers before the last.
    """

    def __init__(self, host: Host, start_B: Callable[[], Tensor | None], *, reads_inner_layers: bool):
        self._start_B, decoder = start_B, host.decoder
        self._takes_a_mask = all(
            isinstance(layer.self_attention.core_attention, DotProductAttention) for layer in decoder.layers
        )
        check_settings(host.config, packed=not self._takes_a_mask)
        if reads_inner_layers and not self._takes_a_mask:
            raise ValueError(
                "--rsa-text-source caption with text layers before the last (--rsa-layers) needs local attention, as "
                "Transformer Engine's layers take the rows one after another: leave one out"
            )
        self._shards = sequence_shards(host.config, host.pg_collection.tp)
        decoder.register_forward_pre_hook(self._before, with_kwargs=True)
        if not self._takes_a_mask:
            decoder.register_forward_hook(self._after)

    def _before(self, decoder, args, kwargs):
        start_B = self._start_B()
        if start_B is None:
            return None
        hidden_LBH = kwargs["hidden_states"] if decoder.pre_process else decoder.input_tensor
        length, batch_size = hidden_LBH.shape[0] * self._shards, hidden_LBH.shape[1]
        if self._takes_a_mask:
            return args, kwargs | {"attention_mask": segment_mask(start_B, length)}
        if self._shards > 1 and batch_size > 1:
            raise ValueError(
                "--rsa-text-source caption with Transformer Engine and --sequence-parallel: each rank has a part of "
                "every row, which do not follow one another; set --micro-batch-size 1 and --eval-micro-batch-size 1"
            )
        packed = _one_after_another(hidden_LBH)
        if decoder.pre_process:
            kwargs = kwargs | {"hidden_states": packed}
        else:
            decoder.set_input_tensor(packed)
        return args, kwargs | {"packed_seq_params": packed_segments(start_B, length)}

    def _after(self, decoder, args, output):
        start_B = self._start_B()
        if start_B is None:
            return None
        hidden_L1H, *others = output if isinstance(output, tuple) else (output,)
        hidden_LBH = hidden_L1H.unflatten(0, (len(start_B), -1)).squeeze(2).transpose(0, 1).contiguous()
        return (hidden_LBH, *others) if others else hidden_LBH


def packed_segments(start_B: Tensor, length: int) -> PackedSeqParams:
    """The rows one after another, each of two sequences: [0, start_b) and [start_b, L)."""
    row_B = torch.arange(len(start_B), device=start_B.device) * length
    end_1 = torch.tensor([len(start_B) * length], device=start_B.device)
    bounds = torch.cat([torch.stack([row_B, row_B + start_B], dim=1).flatten(), end_1]).int()
    # Not just a bound: Megatron's unfused RoPE takes as many frequencies as all positions together for one a position, and
    # lets none of the sequences begin anew. It waits for the device, just after the splice, which has done so itself.
    longest = int(torch.maximum(start_B, length - start_B).max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def _one_after_another(hidden_LBH: Tensor) -> Tensor:
    return hidden_LBH.transpose(0, 1).flatten(0, 1)[:, None]
