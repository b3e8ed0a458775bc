"""mutual_knn: what must hold of it."""

import pytest
import torch

from rsa_megatron.alignment.metrics import mutual_knn


def rows(num_samples=200, width=16, seed=0):
    return torch.randn(num_samples, width, generator=torch.Generator().manual_seed(seed))


def test_a_space_agrees_with_itself_rotated_and_scaled():
    x_ND = rows()
    rotation, _ = torch.linalg.qr(rows(16, 16, seed=1))
    assert mutual_knn(x_ND, x_ND) == 1.0
    assert mutual_knn(x_ND, 3 * x_ND @ rotation) > 0.999  # rounding may swap neighbours that are equally near


def test_unrelated_spaces_agree_by_chance():
    scores = [mutual_knn(rows(seed=s), rows(width=24, seed=100 + s), k=10) for s in range(20)]
    mean = sum(scores) / len(scores)
    # k / (N - 1) = 0.050; the mean of 20 runs of 2000 neighbours each has a standard error of about 0.001
    assert mean == pytest.approx(10 / 199, abs=0.005)


def test_neighbours_do_not_depend_on_the_precision_that_the_process_allows():
    # Rows so close that bf16 products would put their neighbours in another order.
    a_ND, b_ND = (1 + 0.05 * rows(width=512, seed=s) for s in (0, 1))
    expected = mutual_knn(a_ND, b_ND), mutual_knn(a_ND, a_ND.double())
    torch.set_float32_matmul_precision("medium")
    try:
        assert (mutual_knn(a_ND, b_ND), mutual_knn(a_ND, a_ND.double())) == expected
    finally:
        torch.set_float32_matmul_precision("highest")


def test_permuted_pairs_lose_agreement():
    x_ND = rows()
    noisy = x_ND + 0.3 * rows(seed=2)
    permuted = noisy[torch.randperm(200, generator=torch.Generator().manual_seed(3))]
    assert mutual_knn(x_ND, noisy) > 0.4 > 0.1 > mutual_knn(x_ND, permuted)


def test_by_hand():
    # On a circle: a's nearest is b and so on; in the second space c and d have changed places.
    angles = torch.tensor([0.0, 0.1, 1.0, 1.1])
    a_ND = torch.stack([angles.cos(), angles.sin()], dim=1)
    b_ND = a_ND[[0, 2, 1, 3]]
    assert mutual_knn(a_ND, a_ND, k=1) == 1.0
    assert mutual_knn(a_ND, b_ND, k=1) == 0.0
    assert mutual_knn(a_ND, b_ND, k=3) == 1.0


def test_too_few_samples_are_named():
    with pytest.raises(ValueError, match="k=10 neighbours need at least k \\+ 1 samples; there are 10"):
        mutual_knn(rows(10), rows(10))
    with pytest.raises(ValueError, match="got 10 and 11 rows"):
        mutual_knn(rows(10), rows(11), k=2)
