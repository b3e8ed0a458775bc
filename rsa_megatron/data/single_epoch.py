"""Shuffled samples of one pass over a data set, whose end can be saved like any other position."""

from collections.abc import Iterator

from megatron.energon import WorkerConfig
from megatron.energon.flavors.base_dataset import SavableDataset
from megatron.energon.wrappers import ShuffleBufferDataset
from megatron.energon.wrappers.base import BaseWrapperDataset


def shuffle_once(dataset: SavableDataset, shuffle_buffer_size: int, worker_config: WorkerConfig) -> SavableDataset:
    """Yield each sample of a data set that ends, once, in the order of Energon's shuffle buffer."""
    dataset = _OnePass(dataset, worker_config=worker_config)
    if shuffle_buffer_size <= 1:
        return dataset
    return ShuffleBufferDataset(dataset, size=shuffle_buffer_size, worker_config=worker_config)


class _OnePass(BaseWrapperDataset):
    """A data set that has ended stays so.

    Energon's start again when they are read again. A position that is resumed while the shuffle buffer is being emptied
    reads on in them: the whole data set would come a second time.
    """

    _ended: bool
    _savable_fields = ("_ended",)

    def __init__(self, dataset: SavableDataset, *, worker_config: WorkerConfig):
        super().__init__(dataset, worker_config=worker_config)
        self.reset_state_own()

    def reset_state_own(self) -> None:
        self._ended = False

    def len_worker(self, worker_idx: int | None = None) -> int:
        return self.dataset.len_worker(worker_idx)

    def __iter__(self) -> Iterator:
        if not self._ended:
            yield from self.dataset
        self._ended = True

    def config(self) -> dict:
        return {
            "type": type(self).__qualname__,
            "dataset": self.dataset.config(),
            "worker_config": self.worker_config.config(),
        }
