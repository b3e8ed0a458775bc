"""The tiles of a batch are those of its samples, copied no more often than they must be."""

import torch
from torch.utils.data import DataLoader

from rsa_megatron.data.sample_encoder import join_tiles

TILES = [torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(count)) for count in (2, 0, 3)]


def test_the_tiles_of_all_samples_lie_in_order():
    assert torch.equal(join_tiles(TILES), torch.cat(TILES))
    assert join_tiles([TILES[1], TILES[1]]).shape == (0, 3, 4, 4)


def test_those_of_one_sample_are_not_copied():
    assert join_tiles([TILES[1], TILES[2]]).data_ptr() == TILES[2].data_ptr()
    assert join_tiles(TILES).data_ptr() not in {tiles.data_ptr() for tiles in TILES}


def test_a_data_worker_copies_them_into_shared_memory_at_once():
    class InWorker(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield join_tiles(TILES), join_tiles(TILES).is_shared(), torch.cat(TILES).is_shared()

    ((tiles, is_shared, cat_is_shared),) = DataLoader(
        InWorker(), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    assert torch.equal(tiles, torch.cat(TILES))
    assert is_shared and not cat_is_shared
