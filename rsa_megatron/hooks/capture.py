"""Reads the two representations as they come by: v from the tower's tiles, the states that t is the mean of from the decoder.

Shapes: n samples, T tiles of P tokens, L positions of the decoder's row, B rows, D and E widths of v and t.
"""

from collections.abc import Callable

from torch import Tensor

from rsa_megatron.alignment.pooling import image_vectors
from rsa_megatron.config import RSAConfig
from rsa_megatron.hooks import checks
from rsa_megatron.hooks.host import Host
from rsa_megatron.hooks.micro_batch import MicroBatch


class Capture:
    """Hooks on a host's tower and decoder that write into the micro-batch that is going forward.

    Args:
        vision_layers: as --rsa-layers names them.
        text_layers: the same, each with its number from 0.
        micro_batch: gives the micro-batch.
    """

    def __init__(
        self,
        host: Host,
        config: RSAConfig,
        vision_layers: list[int],
        text_layers: dict[int, int],
        micro_batch: Callable[[], MicroBatch],
    ):
        self._config, self._text_layers, self._micro_batch = config, text_layers, micro_batch
        self._tiles_are_checked = False
        host.on_text(set(text_layers.values()), self._keep_states)
        if host.is_first:
            host.on_vision(vision_layers, self._keep_tiles)

    def _keep_tiles(self, layer: int, tokens_TPD: Tensor) -> None:
        batch = self._micro_batch()
        if not batch.is_followed or batch.samples is None:
            return
        count_n, num_tiles = batch.samples.num_tiles, tokens_TPD.shape[0]
        if not self._tiles_are_checked:  # once: it waits for the device
            self._tiles_are_checked = checks.check_tiles(count_n, num_tiles)
        pooling, base_tile = self._config.image_pooling, self._config.base_tile
        batch.v[layer] = image_vectors(tokens_TPD, count_n, pooling=pooling, base_tile=base_tile)

    def _keep_states(self, number: int, hidden_LBE: Tensor) -> None:
        batch = self._micro_batch()
        if batch.is_followed:
            batch.hidden |= {layer: hidden_LBE for layer, n in self._text_layers.items() if n == number}
