"""Brings v, and sums of inner text layers, from the stages that have them to the last one, as payload rows (pipeline_payload.py).

Text layers of earlier stages are pooled where they are: the first stage works out where the captions lie (token_positions.py), and
the payload takes mask and sums along.

Shapes: B rows, n samples (B of them, or those packed into one row), L positions of the decoder's row, K payload rows a sample, F width of
the payload's vector, H, D and E widths of the hidden state, v and t.
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
        #: whether stages on the way must know where the captions lie; the first says how long the row is (`keep_length`)
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
        batch.num_packed = pipeline_payload.num_packed_samples(received)
        shards = self._shards if self.carries_mask else 0
        num_rows = pipeline_payload.num_rows_received(received, self._vector_width, shards, batch.num_packed)
        # Slices along dim 0 of what was received: no copy, and both parts' gradients return through it.
        batch.payload_KBH = received[-num_rows:]
        self._host.set_received(received[:-num_rows])

    def keep_length(self, batch: MicroBatch, hidden_LBH: Tensor) -> None:
        """On the first stage, as the hidden state goes into the decoder: how many positions this context-parallel rank has."""
        batch.own_length = len(hidden_LBH) * self._shards

    def start_of_copies(self, batch: MicroBatch) -> Tensor:
        """Where in its row the copy of each caption begins, [B]."""
        return self._unpack(batch, mask_length=0).start_B

    def payload_to_send(self, batch: MicroBatch, output_LBH: Tensor) -> Tensor:
        """Rows for the next stage, [K, B, H] or, behind packed samples, [n * K, 1, H]: what has come, with the means of this stage's
        layers in their places."""
        own_layers = [layer for layer in self._inner_layers if layer in batch.hidden]
        if not self._host.is_first and not own_layers:
            return batch.payload_KBH
        # (Of all that is sent, what a model itself has added to its rows too: stages after this one know no other length.)
        length = output_LBH.shape[0] * self._shards * self.carries_mask
        payload = self._first(batch, output_LBH, length) if self._host.is_first else self._unpack(batch, length)
        vector_nF, hidden_width = payload.vector_BF, output_LBH.shape[2]
        first_sum = vector_nF.shape[1] - hidden_width * len(self._inner_layers)
        parts = list(vector_nF.split([first_sum] + [hidden_width] * len(self._inner_layers), dim=1))
        for place, layer in enumerate(self._inner_layers, start=1):
            if layer in own_layers:
                parts[place] = self._means(batch.hidden[layer], payload.mask_BL, batch.num_packed > 0)
        payload = payload._replace(vector_BF=torch.cat(parts, dim=1))
        return pipeline_payload.pack(payload, hidden_width, output_LBH.dtype, in_one_row=batch.num_packed > 0)

    def deliver(self, batch: MicroBatch) -> None:
        """On the last stage: v, and the sums of the layers that stages before it have, into the micro-batch."""
        payload = self._unpack(batch, mask_length=0)
        checks.check_same_samples(payload.sample_id_B, batch.samples.sample_id)
        hidden_width, num_v, num_sums = self._host.config.hidden_size, len(self._vision_layers), len(self._inner_layers)
        image_width = (self._vector_width - hidden_width * num_sums) // num_v
        parts = payload.vector_BF.split([image_width] * num_v + [hidden_width] * num_sums, dim=1)
        batch.v = dict(zip(self._vision_layers, parts))
        count_n = caption_counts(batch.caption_mask_BL, len(batch.samples.eligible)).clamp(min=1)
        means = zip(self._inner_layers, parts[num_v:])
        batch.sums = {layer: mean_nE * count_n[:, None] for layer, mean_nE in means if layer not in batch.hidden}

    def _unpack(self, batch: MicroBatch, mask_length: int) -> PipelinePayload:
        return pipeline_payload.unpack(batch.payload_KBH, self._vector_width, mask_length, batch.num_packed)

    def _means(self, hidden_LBE: Tensor, mask_nL: Tensor, is_packed: bool) -> Tensor:
        """Of this context-parallel rank's caption rows, [n, E]: a sum over a long caption could leave fp16's range."""
        num_samples, mask_BL = len(mask_nL), mask_nL
        if is_packed:  # one row, in which each sample has its number
            mask_BL = (mask_nL * torch.arange(1, num_samples + 1, device=mask_nL.device)[:, None]).sum(dim=0)[None]
        sum_nE = caption_sums(hidden_LBE, mask_BL, num_samples, self._host.config, self._host.pg_collection.tp)
        return sum_nE / mask_nL.sum(dim=1, dtype=torch.float32).clamp(min=1)[:, None]

    def _first(self, batch: MicroBatch, output_LBH: Tensor, length: int) -> PipelinePayload:
        """What the first stage has to send; places of inner layers are zeros."""
        num_samples, hidden_width = batch.num_packed or output_LBH.shape[1], output_LBH.shape[2]
        no_image = output_LBH.new_zeros(num_samples, self._host.image_width, dtype=torch.float32)
        v = [batch.v.get(layer, no_image) for layer in self._vision_layers]  # a batch of text has none
        empty = output_LBH.new_zeros(num_samples, hidden_width * len(self._inner_layers), dtype=torch.float32)
        no_id_n = torch.zeros(num_samples, dtype=torch.int64, device=output_LBH.device)
        sample_id_n, mask_nL = no_id_n, no_id_n[:, None].expand(num_samples, length)
        if batch.samples is not None:
            sample_id_n = batch.samples.sample_id
            if length:
                mask_nL = torch.nn.functional.pad(self._own_mask(batch), (0, length - batch.own_length))
        start_n = no_id_n if batch.start_B is None else batch.start_B
        return PipelinePayload(torch.cat([*v, empty], dim=1), sample_id_n, start_n, mask_nL)

    def _own_mask(self, batch: MicroBatch) -> Tensor:
        """Where the captions lie in this context-parallel rank's part of the decoder's row, 1 or 0, [n, L]."""
        cp = self._host.pg_collection.cp
        whole_BL = token_positions.spliced(batch.samples.caption_mask, batch.positions_BS, batch.own_length * cp.size())
        mask_BL = token_positions.context_parallel_part(whole_BL, cp.size(), cp.rank(), batch.bounds)
        if not batch.num_packed:
            return mask_BL
        return (mask_BL == torch.arange(1, batch.num_packed + 1, device=mask_BL.device)[:, None]).long()
