"""With data workers: the position of the training data is restored exactly; a validation part that is too small is named."""

import pytest
from megatron.energon import WorkerConfig

from rsa_megatron.data.dataset_checks import check_data
from rsa_megatron.data.loaders import ValidationLoader
from tests.support import processes
from tests.support.train_loaders import generator_states, keys, make_encoder, save, train_loader


def interrupted_and_restored(demo, num_workers, path):
    encoder, states = make_encoder(demo), generator_states()
    loader = train_loader(demo, encoder, num_workers=num_workers)
    keys(loader, 5)
    save(loader, path)
    expected = keys(loader, 70)  # past the end of the 60 batches of an epoch
    restored = train_loader(demo, encoder, num_workers=num_workers)
    restored.restore_state(path)
    from_the_beginning = keys(train_loader(demo, encoder, num_workers=num_workers), 70)
    return expected, keys(restored, 70), from_the_beginning, generator_states() == states


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.check), 2])
def test_a_restored_loader_goes_on_exactly(demo, tmp_path, num_workers):
    (runs,) = processes.run(interrupted_and_restored, 1, demo, num_workers, tmp_path / "state.pt")
    expected, restored, from_the_beginning, generators_are_as_they_were = runs
    assert restored == expected and generators_are_as_they_were
    assert from_the_beginning != expected


def test_a_validation_part_too_small_for_the_run_is_named_before_training(demo):
    data = str(demo / "data" / "captions")
    check_data(data, ["val"], num_readers=8, micro_batch_size=8)
    with pytest.raises(
        ValueError, match="the 64 samples of its validation split, divided between 9 data workers .* of 8 each"
    ):
        check_data(data, ["train", "val"], num_readers=9, micro_batch_size=8)
    # What the check foresees: two workers, neither of which fills a micro-batch.
    with pytest.raises(processes.Failed, match="does not fill one micro-batch in each data worker"):
        processes.run(read_validation, 1, demo, 2, 33)


def read_validation(demo, num_workers, micro_batch_size):
    config = WorkerConfig(rank=0, world_size=1, num_workers=num_workers)
    next(ValidationLoader(str(demo / "data" / "captions"), make_encoder(demo), config, micro_batch_size))
