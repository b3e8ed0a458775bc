"""Brings v, and sums of inner text layers, from the stages that have them to the last one, as payload rows (pipeline_payload.py).

Text layers of earlier stages are pooled where they are: the first stage works out where the captions lie (token_positions.py), and
the payload takes mask and sums along.

Shapes: B rows, L positions of the decoder's row, K payload rows, F width of the payload's vector, H, D and E widths of the hidden state,
v and t.
"""

import torch
from torch import Tensor

from rsa_megatron.hooks import checks, pipeline_payload, token_positions
from rsa_megatron.hooks.caption_pooling import caption_counts, caption_sums, sequence_shards
from rsa_megatron.hooks.host import Host
from rsa_megatron.hooks.micro_batch import MicroBatch
from rsa_megatron.hooks.pipeline_payload import PipelinePayload


class Transport:
    """Of one chunk of a pipeline.

    Args:
        vision_layers: each has its place in the payload's vector.
        inner_layers: text layers before the last; so has each of these.
    """

    def __init__(self, host: Host, vision_layers: list[int], inner_layers: list[int]):
        self._host, self._vision_layers, self._inner_layers = host, vision_layers, inner_layers
        self._shards = sequence_shards(host.config, host.pg_collection.tp)
        #: whether stages on the way must know where the captions lie
        self.carries_mask = bool(inner_layers) and not (host.is_first and host.is_last)
        #: F, a constant of the run; stages without a tower learn it from the first payload
        self._vector_width: int | None = None

    def take_off(self, batch: MicroBatch) -> None:
        """Take the payload off what has come from the stage before, where something has.

        Before the forward pass, and not when it is received: text generation, which has no payload, passes there too.
        """
        received = self._host.received()
        if received is None:
            return
        self._vector_width = self._vector_width or pipeline_payload.vector_width(received)
        k = pipeline_payload.num_rows_received(received, self._vector_width, self._shards if self.carries_mask else 0)
        # Slices along dim 0 of what was received: no copy, and both parts' gradients return through it.
        batch.payload_KBH = received[-k:]
        self._host.set_received(received[:-k])

    def start_of_copies(self, batch: MicroBatch) -> Tensor:
        """Where in its row the copy of each caption begins, [B]."""
        return self._unpack(batch, mask_length=0).start_B

    def payload_to_send(self, batch: MicroBatch, output_LBH: Tensor) -> Tensor:
        """Rows for the next stage, [K, B, H]: what has come, with the means of this stage's layers in their places."""
        own_layers = [layer for layer in self._inner_layers if layer in batch.hidden]
        if not self._host.is_first and not own_layers:
            return batch.payload_KBH
        length = output_LBH.shape[0] * self._shards * self.carries_mask
        payload = self._first(batch, output_LBH, length) if self._host.is_first else self._unpack(batch, length)
        vector_BF, hidden_width = payload.vector_BF, output_LBH.shape[2]
        first_sum = vector_BF.shape[1] - hidden_width * len(self._inner_layers)
        parts = list(vector_BF.split([first_sum] + [hidden_width] * len(self._inner_layers), dim=1))
        for place, layer in enumerate(self._inner_layers, start=1):
            if layer in own_layers:
                # As a mean: a sum over a long caption could leave fp16's range.
                hidden_LBE, mask_BL, tp = batch.hidden[layer], payload.mask_BL, self._host.pg_collection.tp
                sum_BE = caption_sums(hidden_LBE, mask_BL, len(mask_BL), self._host.config, tp)
                parts[place] = sum_BE / caption_counts(mask_BL, len(mask_BL)).clamp(min=1)[:, None]
        payload = payload._replace(vector_BF=torch.cat(parts, dim=1))
        return pipeline_payload.pack(payload, hidden_width, output_LBH.dtype)

    def deliver(self, batch: MicroBatch) -> None:
        """On the last stage: v, and the sums of the layers that stages before it have, into the micro-batch."""
        payload = self._unpack(batch, mask_length=0)
        checks.check_same_samples(payload.sample_id_B, batch.samples.sample_id)
        hidden_width, num_v, num_sums = self._host.config.hidden_size, len(self._vision_layers), len(self._inner_layers)
        image_width = (self._vector_width - hidden_width * num_sums) // num_v
        parts = payload.vector_BF.split([image_width] * num_v + [hidden_width] * num_sums, dim=1)
        batch.v = dict(zip(self._vision_layers, parts))
        count_B = caption_counts(batch.caption_mask_BL, len(batch.caption_mask_BL)).clamp(min=1)
        means = zip(self._inner_layers, parts[num_v:])
        batch.sums = {layer: mean_BE * count_B[:, None] for layer, mean_BE in means if layer not in batch.hidden}

    def _unpack(self, batch: MicroBatch, mask_length: int) -> PipelinePayload:
        return pipeline_payload.unpack(batch.payload_KBH, self._vector_width, mask_length)

    def _first(self, batch: MicroBatch, output_LBH: Tensor, length: int) -> PipelinePayload:
        """What the first stage has to send; places of inner layers are zeros."""
        batch_size, hidden_width = output_LBH.shape[1:]
        no_image = output_LBH.new_zeros(batch_size, self._host.image_width, dtype=torch.float32)
        v = [batch.v.get(layer, no_image) for layer in self._vision_layers]  # a batch of text has none
        empty = output_LBH.new_zeros(batch_size, hidden_width * len(self._inner_layers), dtype=torch.float32)
        no_id_B = torch.zeros(batch_size, dtype=torch.int64, device=output_LBH.device)
        sample_id_B, mask_BL = no_id_B, no_id_B[:, None].expand(batch_size, length)
        if batch.samples is not None:
            sample_id_B = batch.samples.sample_id
            if length:
                cp = self._host.pg_collection.cp
                whole_BL = token_positions.spliced(batch.samples.caption_mask, batch.positions_BS, length * cp.size())
                mask_BL = token_positions.context_parallel_part(whole_BL, cp.size(), cp.rank())
        start_B = no_id_B if batch.start_B is None else batch.start_B
        return PipelinePayload(torch.cat([*v, empty], dim=1), sample_id_B, start_B, mask_BL)
