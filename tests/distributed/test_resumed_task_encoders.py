"""RSATaskEncoder in the task encoders of others: a restored loader goes on exactly, with data workers and without."""

import pytest

from tests.support import processes
from tests.support.energon_jobs import JOBS, WITH_RSA, assert_same, flags_of, keys_of, take, train_loader


def interrupted(path, job, settings, num_workers):
    """[what comes, what comes after a restore, what comes from the beginning]"""

    def loader():
        return train_loader(path, WITH_RSA[job](), num_workers=num_workers, **settings)

    first = loader()
    batches = processes.kept(iter(first))
    for _ in range(5):
        next(batches)
    state = first.save_state_rank()
    expected = [next(batches) for _ in range(15)]  # past the end of the 12 batches of an epoch
    restored = loader()
    restored.restore_state_rank(state)
    return expected, take(restored, 15), take(loader(), 15)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_restored_loader_goes_on_exactly(job_data, num_workers):
    if num_workers:  # data workers are forked from a process without threads
        (runs,) = processes.run(interrupted_jobs, 1, job_data / "mixture.yaml", num_workers)
    else:
        runs = interrupted_jobs(job_data / "mixture.yaml", num_workers)
    for expected, restored, from_the_beginning in runs:
        assert_same(dict(enumerate(restored)), dict(enumerate(expected)))
        for batch in restored:
            assert batch["rsa_eligible"].tolist() == flags_of(batch)
        assert list(map(keys_of, from_the_beginning)) != list(map(keys_of, expected))


def interrupted_jobs(path, num_workers):
    return [interrupted(path, job, settings, num_workers) for job, settings in JOBS.values()]
