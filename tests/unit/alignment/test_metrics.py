"""The metrics: against naive float64 versions, platonic-rep's own figures, and what must hold of each."""

import functools
import math

import pytest
import torch

from rsa_megatron.alignment import hsic
from rsa_megatron.alignment.metrics import (
    METRICS,
    cka,
    cknna,
    clip_outliers,
    cycle_knn,
    mutual_knn,
    rsa_discrepancy,
    svcca,
    unbiased_cka,
)
from tests.support import naive_metrics as naive

# Both sides compute in float64; what is left is the order of some thousand additions.
FLOAT64 = 1e-10


def rows(num_samples=200, width=16, seed=0):
    return torch.randn(num_samples, width, generator=torch.Generator().manual_seed(seed))


def related(num_samples=40, d=12, e=9, noise=0.7, seed=0):
    """Two spaces that share something: maps of one latent, with noise."""
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(num_samples, 4, generator=g)
    return [latent @ torch.randn(4, w, generator=g) + noise * torch.randn(num_samples, w, generator=g) for w in (d, e)]


def unit(x):
    return torch.nn.functional.normalize(x.double(), dim=-1)


def rotation(width):
    return torch.linalg.qr(rows(width, width, seed=9).double())[0]


# ---- against the formulas


@pytest.mark.parametrize("samples", (related(), related(25, 30, 40), (rows(30), rows(30, 24, seed=1))))
@pytest.mark.parametrize("k", (2, 5, 20))
def test_neighbour_metrics_equal_the_naive_ones(samples, k):
    a, b = samples
    assert mutual_knn(a, b, k) == pytest.approx(naive.mutual_knn(a, b, k), abs=1e-15)
    assert cycle_knn(a, b, k) == pytest.approx(naive.cycle_knn(a, b, k), abs=1e-15)
    assert cknna(a, b, k) == pytest.approx(naive.cknna(a, b, k), abs=FLOAT64)


# Fewer samples than columns (blocks of the kernel) and more (products of columns).
@pytest.mark.parametrize("samples", (related(), related(25, 30, 40), (rows(60, 3), rows(60, 4, seed=1) + 50)))
@pytest.mark.parametrize("block_rows", (7, 1024))
def test_kernel_metrics_equal_the_naive_ones(samples, block_rows, monkeypatch):
    monkeypatch.setattr(hsic, "_BLOCK_ROWS", block_rows)
    a, b = samples
    k, l = naive.linear_kernel(a), naive.linear_kernel(b)
    assert cka(a, b) == pytest.approx(naive.alignment(k, l, naive.hsic), abs=FLOAT64)
    # The third pair lies 50 away from the origin: the naive version cancels numbers of 1e4 to find some of 1.
    assert unbiased_cka(a, b) == pytest.approx(naive.alignment(k, l, naive.unbiased_hsic), abs=1e-7)
    k, l = naive.rbf_kernel(a, 3.0), naive.rbf_kernel(b, 3.0)
    assert cka(a, b, kernel="rbf", sigma=3.0) == pytest.approx(naive.alignment(k, l, naive.hsic), abs=FLOAT64)
    expected = naive.alignment(k, l, naive.unbiased_hsic)
    assert unbiased_cka(a, b, kernel="rbf", sigma=3.0) == pytest.approx(expected, abs=FLOAT64)


@pytest.mark.parametrize("samples", (related(), related(25, 30, 40), (rows(300, 20), rows(300, 24, seed=1))))
def test_svcca_equals_canonical_correlations_by_their_definition(samples):
    # Through Gram matrices, whose condition is the square of the features': half of float64's 16 digits are left.
    assert svcca(*samples, num_directions=6) == pytest.approx(naive.svcca(*samples, 6), abs=1e-8)
    assert svcca(*samples, num_directions=6) == svcca(*samples, num_directions=6)


def test_rsa_discrepancy_is_equation_5():
    a, b = related()
    assert rsa_discrepancy(a.double(), b.double()) == pytest.approx(naive.rsa_discrepancy(a, b), rel=1e-12)
    assert rsa_discrepancy(a, b) == pytest.approx(naive.rsa_discrepancy(a, b), rel=1e-6)  # float32
    assert rsa_discrepancy(a, b.double()) == pytest.approx(naive.rsa_discrepancy(a, b), rel=1e-12)
    normalised = functools.partial(rsa_discrepancy, normalize="mean-distance")
    assert normalised(a, b) == pytest.approx(normalised(7 * a, 0.1 * b), rel=1e-5)
    assert normalised(a, b, distance="cosine") != normalised(a, b)
    assert rsa_discrepancy(7 * a, b) > 10 * rsa_discrepancy(a, b)


@pytest.mark.parametrize("exact", (True, False))
def test_clipping(exact):
    x = rows(30, 40)
    for quantile in (0.5, 0.95, 0.999):
        limit = naive.clipping_limit(x, quantile, exact)
        clipped = clip_outliers(x, quantile, exact=exact)
        torch.testing.assert_close(clipped, x.clamp(-limit, limit), rtol=1e-6, atol=0)  # a limit of float32
        assert (clipped != x).any()
    assert torch.equal(clip_outliers(x, 1.0, exact=exact), x)
    assert clip_outliers(x.half(), exact=exact).dtype == torch.float32
    # Layers of one tensor share a limit, as platonic-rep's do.
    layers = torch.stack([x, 3 * x], dim=1)
    limit = naive.clipping_limit(layers.flatten(1), 0.95, exact)
    assert clip_outliers(layers, exact=exact).max().item() == pytest.approx(limit, rel=1e-6)
    with pytest.raises(ValueError, match="quantile=1.5 is not above 0 and at most 1"):
        clip_outliers(x, 1.5)


# ---- platonic-rep's figures


def golden_features():
    """Features for which metrics.py of platonic-rep (dcd76ba), run on them as it is, gave the figures below."""
    g = torch.Generator().manual_seed(0)
    latent = torch.randn(64, 6, generator=g)
    a = latent @ torch.randn(6, 24, generator=g) + torch.randn(64, 24, generator=g)
    b = latent @ torch.randn(6, 32, generator=g) + torch.randn(64, 32, generator=g)
    a[::9] *= 4  # for something to clip
    b[::9] *= 4
    return a, b


# clipping (quantile 0.95), then unit rows; float64 but for cknna, whose masks are float32 there.
GOLDEN = {
    None: dict(
        mutual=0.6265624761581421,
        cycle=1.0,
        cka=0.8479835278296911,
        rbf=0.8615088746759753,
        unbiased=0.8319794407457053,
        cknna=0.6808306475157085,
    ),
    "exact": dict(
        mutual=0.6062500476837158,
        cycle=1.0,
        cka=0.8297158862526233,
        rbf=0.8458274028127336,
        unbiased=0.8112231037463264,
        cknna=0.6697380892143427,
    ),
    "mean": dict(
        mutual=0.589062511920929,
        cycle=1.0,
        cka=0.8245999466988866,
        rbf=0.8418833258735584,
        unbiased=0.8052642654068792,
        cknna=0.6597559493253798,
    ),
}


@pytest.mark.parametrize("clipping", GOLDEN)
def test_platonic_reps_figures(clipping):
    a, b = golden_features()
    if clipping is not None:
        a, b = (clip_outliers(x, exact=clipping == "exact") for x in (a, b))
    expected = GOLDEN[clipping]
    assert mutual_knn(a, b, 10) == pytest.approx(expected["mutual"], abs=1e-7)  # a float32 mean of tenths
    assert cycle_knn(a, b, 10) == expected["cycle"]
    assert METRICS["cka"](a, b, 10) == pytest.approx(expected["cka"], abs=1e-6)  # + 1e-6 in their denominator
    assert METRICS["cka-rbf"](a, b, 10) == pytest.approx(expected["rbf"], abs=1e-6)
    # Their denominators are 0.03 and 0.003 on these features, and 1e-6 of it more.
    assert METRICS["unbiased-cka"](a, b, 10) == pytest.approx(expected["unbiased"], rel=5e-5)
    assert cknna(a, b, 10) == pytest.approx(expected["cknna"], rel=5e-4)
    others = [figures for name, figures in GOLDEN.items() if name != clipping]
    assert all(abs(mutual_knn(a, b, 10) - figures["mutual"]) > 0.01 for figures in others)


def test_platonic_reps_figures_of_features_as_they_are():
    a, b = golden_features()
    assert cka(a, b) == pytest.approx(0.8802924980810336, abs=1e-7)
    assert unbiased_cka(a, b) == pytest.approx(0.8637048353337237, abs=1e-7)


def test_svcca_is_near_what_platonic_rep_approximates():
    # Three of their calls in a row gave 0.679, 0.681 and 0.698 on unit rows, by random and iterative approximations
    # of the singular vectors. Exact ones span the same directions or better ones.
    a, b = map(unit, golden_features())
    assert svcca(a, b) == pytest.approx(0.69, abs=0.03)


# ---- what must hold of each

RELATIVE = dict(abs=1e-6, rel=1e-6)  # float32 features turned and scaled are rounded, 6e-8 each
SIMILARITIES = [name for name in METRICS if name != "rsa"]


@pytest.mark.parametrize("name", METRICS)
def test_a_space_against_itself(name):
    x = rows(80, 16)
    assert METRICS[name](x, x, 10) == pytest.approx(0.0 if name == "rsa" else 1.0, abs=1e-9)


@pytest.mark.parametrize("name", METRICS)
def test_rotations_change_nothing_and_scale_nothing_but_the_discrepancy(name):
    a, b = (x.double() for x in related(80, 16, 14))
    if name != "svcca":  # its columns are standardised one by one
        assert METRICS[name](a @ rotation(16), b @ rotation(14), 10) == pytest.approx(
            METRICS[name](a, b, 10), **RELATIVE
        )
    if name != "rsa":
        assert METRICS[name](0.01 * a, 30 * b, 10) == pytest.approx(METRICS[name](a, b, 10), **RELATIVE)


@pytest.mark.parametrize("name", METRICS)
def test_the_order_of_samples_does_not_matter_and_their_pairing_does(name):
    a, b = related(120, 16, 14)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(3))
    score = METRICS[name](a, b, 10)
    assert METRICS[name](a[order], b[order], 10) == pytest.approx(score, **RELATIVE)
    shuffled = METRICS[name](a, b[order], 10)
    assert shuffled > 1.2 * score if name == "rsa" else shuffled < 0.8 * score


def test_neither_rotation_nor_shift_nor_other_maps_go_unnoticed_where_they_matter():
    a, b = (x.double() for x in related(80, 16, 14))
    stretched = a * torch.linspace(0.1, 3, 16) ** 3
    for name in SIMILARITIES:
        if name != "svcca":
            assert METRICS[name](stretched, b, 10) != pytest.approx(METRICS[name](a, b, 10), abs=1e-4), name
    assert cka(a + 5, b) == pytest.approx(cka(a, b), abs=1e-9) and mutual_knn(a + 5, b) != mutual_knn(a, b)


def test_unrelated_spaces_agree_by_chance():
    pairs = [(rows(seed=s), rows(width=24, seed=100 + s)) for s in range(20)]
    means = {name: sum(METRICS[name](a, b, 10) for a, b in pairs) / len(pairs) for name in SIMILARITIES}
    # k / (N - 1) = 0.050; the mean of 20 runs of 2000 neighbours each has a standard error of about 0.001
    assert means["mutual-knn"] == pytest.approx(10 / 199, abs=0.005)
    # A standard deviation of 0.01 each, and a fifth of that for the mean of 20. CKA's own chance is not 0: with
    # N = 200, D = 16 and E = 24 it is sqrt(DE / ((N + D) (N + E))) = 0.089.
    assert means["unbiased-cka"] == pytest.approx(0, abs=0.01)
    assert means["cka"] == pytest.approx(math.sqrt(16 * 24 / (216 * 224)), abs=0.01)
    # i is in each of the k lists of its neighbours with a chance of k / (N - 1): 1 - (1 - 0.05)^10 = 0.40. Rows that are
    # among everyone's neighbours make it a little less or more.
    assert means["cycle-knn"] == pytest.approx(0.40, abs=0.04)
    assert means["cknna"] < 0.1 and means["svcca"] == pytest.approx(8 / (3 * math.pi) * math.sqrt(10 / 200), abs=0.03)


def test_permuted_pairs_lose_agreement():
    x_ND = rows()
    noisy = x_ND + 0.3 * rows(seed=2)
    permuted = noisy[torch.randperm(200, generator=torch.Generator().manual_seed(3))]
    assert mutual_knn(x_ND, noisy) > 0.4 > 0.1 > mutual_knn(x_ND, permuted)


def test_a_space_agrees_with_itself_rotated_and_scaled():
    x_ND = rows()
    assert mutual_knn(x_ND, (3 * x_ND.double() @ rotation(16)).float()) > 0.999  # rounding may swap near equals


def test_neighbours_do_not_depend_on_the_precision_that_the_process_allows():
    # Rows so close that bf16 products would put their neighbours in another order.
    a_ND, b_ND = (1 + 0.05 * rows(width=512, seed=s) for s in (0, 1))
    expected = mutual_knn(a_ND, b_ND), mutual_knn(a_ND, a_ND.double())
    torch.set_float32_matmul_precision("medium")
    try:
        assert (mutual_knn(a_ND, b_ND), mutual_knn(a_ND, a_ND.double())) == expected
    finally:
        torch.set_float32_matmul_precision("highest")


def test_by_hand():
    # On a circle: a's nearest is b and so on; in the second space c and d have changed places.
    angles = torch.tensor([0.0, 0.1, 1.0, 1.1])
    a_ND = torch.stack([angles.cos(), angles.sin()], dim=1)
    b_ND = a_ND[[0, 2, 1, 3]]
    assert mutual_knn(a_ND, a_ND, k=1) == 1.0
    assert mutual_knn(a_ND, b_ND, k=1) == 0.0
    assert mutual_knn(a_ND, b_ND, k=3) == 1.0
    assert cycle_knn(a_ND, a_ND, k=1) == 1.0 and cycle_knn(a_ND, b_ND, k=1) == 0.0


# ---- errors


@pytest.mark.parametrize("name", METRICS)
def test_what_cannot_be_compared_is_named(name):
    metric = METRICS[name]
    a, b = rows(50), rows(50, 24, seed=1)
    with pytest.raises(ValueError, match="compares the same samples: got 50 and 49 rows"):
        metric(a, b[:49], 10)
    bad = b.clone()
    bad[7, 2] = float("nan")
    with pytest.raises(
        ValueError, match=r"the second features: 1 of 50 rows hold NaN or infinity \(7\); leave them out"
    ):
        metric(a, bad, 10)
    if name != "rsa":  # of which one sample, or equal rows, are no error
        for equal in (torch.ones(50, 24), torch.zeros(50, 24), torch.full((50, 24), 0.1), rows(1, 24).expand(50, 24)):
            with pytest.raises(ValueError, match="equal|vary in"):
                metric(a, equal, 10)
        for few in (0, 1):
            with pytest.raises(ValueError, match=f"there are {few}|{few} samples"):
                metric(a[:few], b[:few], 10)


def test_too_few_samples_are_named():
    with pytest.raises(ValueError, match="k=10 neighbours need at least k \\+ 1 samples; there are 10"):
        mutual_knn(rows(10), rows(10))
    with pytest.raises(ValueError, match="got 10 and 11 rows"):
        mutual_knn(rows(10), rows(11), k=2)
    with pytest.raises(ValueError, match="unbiased_cka needs at least 4 samples; there are 3"):
        unbiased_cka(rows(3), rows(3))
    with pytest.raises(ValueError, match="cknna needs k of at least 2"):
        cknna(rows(), rows(), k=1)
    with pytest.raises(ValueError, match="svcca of 10 directions: the second features vary in 4 only; ask for fewer"):
        svcca(rows(), rows(200, 4))
    with pytest.raises(ValueError, match="unknown kernel 'poly'; choose one of linear, rbf"):
        cka(rows(), rows(), kernel="poly")
    with pytest.raises(ValueError, match="sigma=0.0 of the rbf kernel must be above 0"):
        cka(rows(), rows(), kernel="rbf", sigma=0.0)
