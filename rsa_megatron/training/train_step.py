"""One training step of LLaVA, as Megatron's schedules call it. It knows nothing of RSA: that is the plugin's.

Only the first pipeline stage needs images, only the last labels; the stages between read no data. Within a stage
one tensor-parallel rank reads and the others receive.

Shapes: B samples, S text positions, L positions of the spliced row, T tiles.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args
from torch import Tensor

from rsa_megatron.batch import LlavaBatch
from rsa_megatron.hooks.broadcast import broadcast_tensors


@dataclass
class StepBatch:
    """What one rank's forward pass is given."""

    #: [T, 3, height, width] or, of embeddings, [T, D], float32; None on stages without a tower
    images: Tensor | None
    #: [B, S] int64
    tokens: Tensor
    #: [B, S] int64
    labels: Tensor
    #: [B, S] float32
    loss_mask: Tensor
    #: [number of images, 6] int64
    image_layouts: Tensor
    #: [B] int64: positions of each row once its images are spliced in; the rest of it is padding
    row_lengths: Tensor
    #: their sum, a scalar; of context-parallel ranks each has its share
    num_positions: Tensor
    #: where the samples come from: known where the data is read, empty elsewhere
    keys: list[str]
    #: how many were skipped before them, and how many of them were cut, scalars, int64
    num_skipped: Tensor
    num_truncated: Tensor
    #: how many samples the rows hold, a scalar, int64
    num_samples: Tensor
    #: positions of each sequence of a packed row, [m] int64; None where each row is one sample
    sequence_lengths: Tensor | None


def get_batch(data_iterator: Iterator[LlavaBatch] | None, model: LLaVAModel) -> StepBatch:
    """The next micro-batch, on every tensor-parallel rank of a stage that needs one."""
    tp_group = model.pg_collection.tp
    batch = next(data_iterator) if tp_group.rank() == 0 else None

    def broadcast(dtype, *names):
        values = batch and {name: getattr(batch, name) for name in names}
        tensors = values and {name: torch.as_tensor([] if value is None else value) for name, value in values.items()}
        return broadcast_tensors(names, tensors, dtype, tp_group)

    counts = ("num_skipped", "num_truncated", "num_samples")
    integers = broadcast(torch.int64, "tokens", "labels", "image_layouts", "row_lengths", "sequence_lengths", *counts)
    sequence_lengths = integers["sequence_lengths"]
    return StepBatch(
        images=broadcast(torch.float32, "images")["images"] if model.pre_process else None,
        tokens=integers["tokens"],
        labels=integers["labels"],
        loss_mask=broadcast(torch.float32, "loss_mask")["loss_mask"],
        image_layouts=integers["image_layouts"],
        row_lengths=integers["row_lengths"],
        num_positions=integers["row_lengths"].sum() / model.pg_collection.cp.size(),
        keys=batch.keys if batch else [],
        **{name: integers[name] for name in counts},
        sequence_lengths=sequence_lengths if len(sequence_lengths) else None,
    )


def forward_step(
    data_iterator: Iterator[LlavaBatch] | None,
    model: torch.nn.Module,
    *,
    seen: Callable[[StepBatch], object] | None = None,
):
    """Megatron's forward step: the chunk's output, and the function from it to the loss.

    Args:
        seen: is given the micro-batch on stages that read one.
    """
    llava = get_attr_wrapped_model(model, "image_token_index", return_model_obj=True)
    if not (llava.pre_process or llava.post_process):
        output, _ = model(None, None, None, None)
        return output, None
    batch = get_batch(data_iterator, llava)
    if seen:
        seen(batch)
    output, loss_mask = model(
        batch.images,
        batch.tokens,
        torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens),
        None,  # causal by the layers' own mask type; padding stands at the end
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        image_layouts=batch.image_layouts,
        sound_clips=_no_sound(batch),
    )
    return output, partial(loss_func, loss_mask, batch, training=llava.training)


def loss_func(
    loss_mask_BL: Tensor, batch: StepBatch, output_BL: Tensor, *, training: bool
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's triple: the sum of the tokens' losses, how many tokens, and (sum, count) pairs to report."""
    loss_sum = (output_BL.float() * loss_mask_BL).sum()
    num_tokens = loss_mask_BL.sum().int()
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            result=loss_sum,
            rejection_func=lambda loss: not bool(torch.isfinite(loss)),
            message=f"lm loss is not finite; samples of the batch: {', '.join(batch.keys) or 'read by tensor rank 0'}",
            fatal=True,
        )
    report = {"lm loss": torch.stack([loss_sum.detach(), num_tokens.float()])}
    if training:
        # A count for the step: the denominators of all its micro-batches on all ranks add up to 1.
        part = len(batch.tokens) / get_current_running_global_batch_size()
        counts = {"samples": batch.num_samples, "skipped samples": batch.num_skipped}
        for name, count in (counts | {"truncated samples": batch.num_truncated}).items():
            report[name] = torch.stack([count.float(), loss_sum.new_tensor(part, dtype=torch.float32)])
        num_positions = loss_sum.new_tensor(loss_mask_BL.numel(), dtype=torch.float32)
        report["padding"] = torch.stack([num_positions - batch.num_positions, num_positions])
    return loss_sum, num_tokens, report


def _no_sound(batch: StepBatch) -> Tensor:
    # None would make LLaVAModel ask for the CUDA device.
    return torch.zeros(0, device=batch.tokens.device)
