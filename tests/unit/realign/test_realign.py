"""ReAlign is the paper's operator: its golden values, its identities and bounds, and mistakes that each of them would show.

Tolerances are of float64: 1e-12 where a formula is computed in another order (some hundred roundings of 1e-16), 1e-10 where a
decomposition or a longer chain lies between; others say why.
"""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from rsa_megatron.realign.decomposition import second_order_drift
from rsa_megatron.realign.moments import Moments
from rsa_megatron.realign.operator import project
from rsa_megatron.realign.realign import ReAlign, compute_trace_scale, normalise_rows
from tests.support import embedding_sets
from tests.support.embedding_sets import MISTAKES, images, texts, unit, written_out

GOLDEN_X = torch.tensor([[0, 1, 0], [0, 0.6, 0.8], [0.6, 0.8, 0]], dtype=torch.float64)
GOLDEN_Y = torch.tensor([[1, 0, 0], [0.6, 0.8, 0], [0.8, 0, 0.6], [0, 0.6, 0.8]], dtype=torch.float64)
GOLDEN = dict(
    mean_x=[0.2, 0.8, 0.2666666667],
    mean_y=[0.6, 0.35, 0.35],
    t_x=0.2488888889,
    t_y=0.395,
    s=0.7937874104,
    scaled=[
        [0.5175149642, 0.5221744064, -0.0111589270],
        [0.2, 1.1572043347, -0.0111589270],
        [0.3587574821, 0.5221744064, 0.4651135193],
        [-0.2762724462, 0.9984468526, 0.6238710013],
    ],
    drifted=[0.2755405030, 0.7963897175, 0.2707505194],
    result=[
        [0.6605918238, 0.7504720981, -0.0202502405],
        [0.0953696554, 0.9953480137, -0.0136733505],
        [0.3935812190, 0.6901928110, 0.6072295346],
        [-0.2978051264, 0.8123581464, 0.5013844320],
    ],
)
TEN_DIGITS = 6e-11  # the golden values are rounded to ten digits after the point


def stages(operator: ReAlign, text_ND) -> dict:
    """Ours, under the names of `written_out`; e~ and e'' from the fitted constants."""
    y = normalise_rows(text_ND)
    scaled = operator.image_mean_D + operator.scale * (y - operator.text_mean_D)
    projected = operator.shift_and_project(y.clone())
    return dict(
        mean_x=operator.image_mean_D,
        mean_y=operator.text_mean_D,
        t_x=operator.image_trace,
        t_y=operator.text_trace,
        s=operator.scale,
        scaled=scaled,
        projected=projected,
        drifted=operator.projected_mean_D,
        shifted=projected - operator.projected_mean_D + operator.image_mean_D,
        result=operator.transform(text_ND),
    )


@pytest.fixture(scope="module")
def sets():
    return images(), texts()


@pytest.fixture(scope="module")
def fitted(sets):
    return ReAlign.fit(*sets, epsilon=0.0)


@pytest.fixture(scope="module")
def of_sets(fitted, sets):
    return stages(fitted, sets[1])


def distance(a, b) -> float:
    return (torch.as_tensor(a, dtype=torch.float64) - torch.as_tensor(b, dtype=torch.float64)).abs().max().item()


def test_golden_values():
    found = stages(ReAlign.fit(GOLDEN_X, GOLDEN_Y, epsilon=0.0), GOLDEN_Y)
    for name, value in GOLDEN.items():
        assert distance(found[name], value) < TEN_DIGITS, name
    assert abs((found["drifted"] - found["mean_x"]).norm() - 0.0757369104) < TEN_DIGITS
    assert abs((found["result"].mean(0) - found["mean_x"]).norm() - 0.0178201371) < TEN_DIGITS
    assert abs(found["scaled"].square().sum(1).mean() - 1) < 1e-12


def test_every_stage_is_the_papers(sets, of_sets):
    expected = written_out(*sets)
    for name, value in expected.items():
        assert distance(of_sets[name], value) < 1e-12, name


# Which claims each mistake breaks, of those below.
BROKEN = {
    "variance over N - 1": "T2: T = 1 - |mu|^2",
    "no root": "T4: mean |e~|^2 = 1",
    "no projection before the centroid": "T7: |e'| = 1",
    "mean of each batch": "T17: one mu' for all",
}


def claims(found: dict) -> dict[str, float]:
    """How far each claim is from true."""
    t_x, t_y = (1 - found[name].square().sum().item() for name in ("mean_x", "mean_y"))
    return {
        "T2: T = 1 - |mu|^2": max(abs(found["t_x"] - t_x), abs(found["t_y"] - t_y)),
        "T4: mean |e~|^2 = 1": abs(found["scaled"].square().sum(1).mean().item() - 1),
        "T7: |e'| = 1": distance(found["projected"].norm(dim=1), 1.0),
        "T8: mean e'' = mu_x": distance(found["shifted"].mean(0), found["mean_x"]),
        "T9: |e^| = 1": distance(found["result"].norm(dim=1), 1.0),
        "T17: one mu' for all": distance(
            found["shifted"] - found["projected"], found["mean_x"] - found["projected"].mean(0)
        ),
    }


def test_the_claims_hold_and_each_mistake_breaks_one(sets, of_sets):
    assert max(claims(of_sets).values()) < 1e-12
    assert set(BROKEN) == set(MISTAKES)
    for mistake, claim in BROKEN.items():
        found = written_out(*sets, mistake=mistake, batch=100)
        # Each mistake is seen by its claim at a million times the tolerance, and as another result.
        assert claims(found)[claim] > 1e-6, mistake
        assert distance(found["result"], of_sets["result"]) > 1e-6, mistake
        golden = written_out(GOLDEN_X, GOLDEN_Y, mistake=mistake, batch=2)
        assert distance(golden["result"], GOLDEN["result"]) > 1000 * TEN_DIGITS, mistake


def test_rows_have_length_one_and_their_own_length_counts_for_nothing(sets, fitted):
    """T1."""
    x, y = sets
    assert distance(normalise_rows(y).norm(dim=1), 1.0) < 1e-15
    factors = torch.logspace(-100, 100, len(y), dtype=torch.float64)[:, None]
    rescaled = ReAlign.fit(x * factors[: len(x)], y * factors, epsilon=0.0)
    assert distance(rescaled.transform(y), fitted.transform(y)) < 1e-12
    assert distance(fitted.transform(y * factors), fitted.transform(y)) < 1e-12


@pytest.mark.parametrize("row", [[3e200, -4e200], [3e-200, -4e-200], [0.9e308, -1.2e308], [5e-324, 0.0]])
def test_lengths_neither_overflow_nor_underflow(row):
    """Up to float64's largest number, down to its smallest."""
    expected = [1.0, 0.0] if row[0] == 5e-324 else [0.6, -0.8]
    x_ND = torch.tensor([[1.0, 0.0], row, [0.0, 2.0]], dtype=torch.float64)
    assert distance(normalise_rows(x_ND), [[1.0, 0.0], expected, [0.0, 1.0]]) < 1e-15


def test_a_zeroed_row_in_the_sums_is_seen():
    """T2 as the check that it is: what zeroing bad rows would do to the sums."""
    rows = unit(images(1000))
    good = Moments.of_block(rows)
    assert abs(good.trace() - (1 - good.mean_D.square().sum().item())) < 1e-12
    rows[3] = 0
    with pytest.raises(RuntimeError, match=r"variance .* of unit rows is not 1 - \|mean\|\^2"):
        Moments.of_block(rows).trace()


def test_anchor_moves_the_mean_and_nothing_else(sets):
    """T3."""
    x, y = (unit(e) for e in sets)
    operator = ReAlign.fit(*sets, steps=("anchor",))
    anchored = y - operator.text_mean_D + operator.image_mean_D
    assert operator.scale == 1.0
    assert distance(anchored.mean(0), x.mean(0)) < 1e-12
    assert distance(anchored.T.cov(correction=0), y.T.cov(correction=0)) < 1e-12
    assert distance(torch.pdist(anchored), torch.pdist(y)) < 1e-12
    assert distance(operator.transform(sets[1]), unit(anchored)) < 1e-12


def test_trace_scales_about_the_mean(sets):
    """T4 and T5."""
    epsilon = 1e-3  # large enough to be seen
    found = stages(ReAlign.fit(*sets, epsilon=epsilon), sets[1])
    scaled, y, s = found["scaled"], unit(sets[1]), found["s"]
    covariance_DD, before_DD = (e.T.cov(correction=0) for e in (scaled, y))
    assert distance(scaled.mean(0), found["mean_x"]) < 1e-12
    assert_close(
        covariance_DD.trace().item(), found["t_x"] * found["t_y"] / (found["t_y"] + epsilon), rtol=1e-9, atol=0
    )
    assert_close(torch.pdist(scaled), s * torch.pdist(y), rtol=1e-10, atol=1e-12)
    values, before = torch.linalg.eigvalsh(covariance_DD), torch.linalg.eigvalsh(before_DD)
    assert distance(values / values.sum(), before / before.sum()) < 1e-10
    _, vectors_DD = torch.linalg.eigh(before_DD)
    in_old_axes_DD = vectors_DD.T @ covariance_DD @ vectors_DD
    assert distance(in_old_axes_DD, in_old_axes_DD.diagonal().diag()) < 1e-10


def test_the_scale_is_a_ratio_of_lengths():
    """T6."""
    assert compute_trace_scale(0.2, 0.8, 0.0) == 0.5
    assert compute_trace_scale(0.7, 0.7, 0.0) == 1.0
    x, y = images(50), texts(70)
    once, thrice = ReAlign.fit(x, y), ReAlign.fit(torch.cat([x] * 3), torch.cat([y] * 3))
    assert abs(once.scale - thrice.scale) < 1e-12  # with 1 / (N - 1) it differs:
    wrong = [written_out(torch.cat([x] * n), torch.cat([y] * n), mistake="variance over N - 1")["s"] for n in (1, 3)]
    assert abs(wrong[0] - wrong[1]) > 1e-4
    assert 0 < once.scale < math.inf


def test_projection_moves_the_mean(of_sets):
    """T7: by an amount that is known exactly in a small case, and to second order in general (Thm B.14)."""
    assert (of_sets["drifted"] - of_sets["mean_x"]).norm() > 1e-3
    a = 0.37
    two = project(torch.tensor([[1.0, a], [1.0, -a]], dtype=torch.float64)).mean(0)
    assert distance(two, [1 / math.sqrt(1 + a * a), 0.0]) < 1e-15

    generator = torch.Generator().manual_seed(0)
    width, num_rows = 8, 400_000
    mean_D = torch.randn(width, generator=generator, dtype=torch.float64)
    factor_DD = torch.randn(width, width, generator=generator, dtype=torch.float64)
    factor_DD *= 0.1 * mean_D.norm() / factor_DD.norm()  # the root of E|epsilon|^2 is a tenth of |mu|
    noise_ND = torch.randn(num_rows // 2, width, generator=generator, dtype=torch.float64) @ factor_DD.T
    # In pairs of opposite signs: the first order, which has mean zero but most of the noise, cancels.
    drift_D = project(torch.cat([mean_D + noise_ND, mean_D - noise_ND])).mean(0) - mean_D / mean_D.norm()
    expected_D = second_order_drift(mean_D, factor_DD @ factor_DD.T)
    # What is left is of fourth order: 0.1^2 of the drift, with a factor of a few; and sampling noise of 1/sqrt(2e5).
    assert (drift_D - expected_D).norm() < 0.05 * expected_D.norm()
    radial_D = mean_D * (mean_D @ expected_D) / mean_D.square().sum()
    assert (drift_D - radial_D).norm() > 0.1 * expected_D.norm()  # without the other part it is seen


def test_the_result_is_near_the_images_mean(sets, of_sets):
    """T9: Prop. B.19's bound, what is left of it, and that both other roads end further away."""
    mean_x, h = of_sets["mean_x"], of_sets["mean_x"] - of_sets["drifted"]
    gap = (of_sets["result"].mean(0) - mean_x).norm()
    assert h.norm() < 1 and gap <= h.norm()
    second_moment_DD = of_sets["projected"].T @ of_sets["projected"] / len(of_sets["projected"])
    # To first order in |h|; |h| is 0.03 here, and the second order a few times |h| of the first.
    assert h.norm() < 0.05
    assert_close(gap, (second_moment_DD @ h).norm(), rtol=0.1, atol=0)
    anchored = unit(unit(sets[1]) - of_sets["mean_y"] + mean_x)
    assert gap < 0.8 * (of_sets["projected"].mean(0) - mean_x).norm()
    assert gap < 0.8 * (anchored.mean(0) - mean_x).norm()


def test_the_result_has_the_trace_of_its_mean(of_sets):
    """T10."""
    result, mean_D = of_sets["result"], of_sets["result"].mean(0)
    trace = result.T.cov(correction=0).trace()
    assert abs(trace - (1 - mean_D.square().sum())) < 1e-12
    assert (
        abs((trace - of_sets["t_x"]).abs() - (of_sets["mean_x"].square().sum() - mean_D.square().sum()).abs()) < 1e-12
    )


def test_the_sum_that_writes_no_row_down_is_the_sum(sets, fitted):
    """With rows near zero, too, of which its formula would keep few digits."""
    unit_ND = unit(sets[1])
    assert (
        distance(fitted.sum_projected(unit_ND), fitted.shift_and_project(unit_ND.clone()).sum(0)) < 1e-11
    )  # of 420 rows
    # e~ = c + s e with |c| = (1 + 1e-6) s, and a row e = -c / |c|: |e~| = 1e-6 s, |e~|^2 below the rounding errors of its terms.
    direction_D = torch.nn.functional.normalize(fitted._shift_D, dim=0)
    mean_D = (1 + 1e-6) * fitted.scale * direction_D + fitted.scale * fitted.text_mean_D
    near = dataclasses.replace(fitted, image_mean_D=mean_D)
    row_1D = -direction_D[None]
    assert (near.shift_and_project(row_1D.clone()) - direction_D).abs().max() < 1e-9
    rows = torch.cat([unit_ND, row_1D])
    assert distance(near.sum_projected(rows), near.shift_and_project(rows.clone()).sum(0)) < 1e-11
    square = near._shift_D @ near._shift_D + 2 * near.scale * (row_1D @ near._shift_D) + near.scale**2
    by_formula_1D = (near._shift_D + near.scale * row_1D) * square.rsqrt()
    assert (by_formula_1D - direction_D).abs().max() > 1e-6


def test_texts_that_are_the_images_stay():
    """T11."""
    x = images()
    operator = ReAlign.fit(x, x, epsilon=0.0)
    assert abs(operator.scale - 1) < 1e-12
    assert distance(operator.projected_mean_D, operator.image_mean_D) < 1e-12
    assert distance(operator.transform(x), unit(x)) < 1e-12


def test_nothing_depends_on_pairs_or_order(sets, fitted):
    """T12."""
    x, y = sets
    generator = torch.Generator().manual_seed(3)
    permuted = ReAlign.fit(
        x[torch.randperm(len(x), generator=generator)], y[torch.randperm(len(y), generator=generator)], epsilon=0.0
    )
    assert distance(permuted.transform(y), fitted.transform(y)) < 1e-12


def test_rotated_sets_give_rotated_results(sets, fitted):
    """T13."""
    x, y = sets
    rotation_DD = torch.linalg.qr(
        torch.randn(24, 24, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ).Q
    rotated = ReAlign.fit(x @ rotation_DD, y @ rotation_DD, epsilon=0.0)
    assert distance(rotated.transform(y @ rotation_DD), fitted.transform(y) @ rotation_DD) < 1e-12


def gap_after(steps, x, y) -> float:
    return (ReAlign.fit(x, y, steps=steps).transform(y).mean(0) - unit(x).mean(0)).norm().item()


def test_every_step_counts_where_spreads_differ():
    """T14; of a gain from the trace step alone nothing is claimed."""
    x = embedding_sets.cone(3000, 64, seed=1, exponent=1.8, spread=0.8)
    y = embedding_sets.cone(3000, 64, seed=2, exponent=1.3, spread=1.4)
    full = gap_after(("anchor", "trace", "centroid"), x, y)
    for fewer in (("anchor", "trace"), ("anchor", "centroid"), ("trace", "centroid"), ("anchor",), ()):
        assert full < 0.8 * gap_after(fewer, x, y), fewer


def test_a_second_fit_finds_little_to_do(sets, fitted, of_sets):
    """T15."""
    x, _ = sets
    again = ReAlign.fit(x, of_sets["result"], epsilon=0.0)
    gap = (of_sets["result"].mean(0) - of_sets["mean_x"]).norm().item()
    # T of the result is 1 - |mean|^2: off by 2 |mean| gap at most, s by that over 2 T.
    norm = of_sets["mean_x"].norm().item() + gap
    assert abs(again.scale - 1) < norm * gap / of_sets["t_x"]
    change = (again.transform(of_sets["result"]) - of_sets["result"]).norm(dim=1).mean().item()
    assert change < 5 * gap
    # The first fit changes far more.
    assert (of_sets["result"] - unit(sets[1])).norm(dim=1).mean().item() > 50 * gap


def test_a_row_is_moved_the_same_in_any_batch(sets, fitted):
    """T17."""
    _, y = sets
    whole = fitted.transform(y)
    for size in (1, 7, 100):
        assert distance(torch.cat([fitted.transform(part) for part in y.split(size)]), whole) < 1e-15
    per_batch = written_out(*sets, mistake="mean of each batch", batch=100)["result"]
    assert distance(per_batch, whole) > 1e-3  # as it would be with a mean of each batch


def test_what_is_given_stays_as_it_is():
    """T18."""
    x, y = images(), texts()
    before = x.clone(), y.clone()
    ReAlign.fit(x, y).transform(y)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


@pytest.mark.parametrize("num_held_out", [200, 2000])
def test_on_texts_it_was_not_fitted_on_the_gap_is_sampling_noise(num_held_out):
    """T19: of two means of n rows, and two of N; 1e-4 is for the rows that were fitted on."""
    num_rows = 2000
    x, y = images(num_rows + num_held_out), texts(num_rows + num_held_out)
    operator = ReAlign.fit(x[:num_rows], y[:num_rows])
    moved = operator.transform(y[num_rows:])
    gap = (moved.mean(0) - unit(x[num_rows:]).mean(0)).norm().item()
    moved_trace = moved.T.cov(correction=0).trace().item()
    noise = math.sqrt((operator.image_trace + moved_trace) * (1 / num_held_out + 1 / num_rows))
    in_sample = (operator.transform(y[:num_rows]).mean(0) - operator.image_mean_D).norm().item()
    assert gap <= 2 * noise
    assert gap > 0.2 * noise and in_sample < noise  # it is that noise, and not less
    raw = (unit(y[num_rows:]).mean(0) - unit(x[num_rows:]).mean(0)).norm().item()
    assert raw > 4 * gap


def test_sums_in_float64_keep_the_digits_of_half_a_million_rows():
    """T20."""
    y = embedding_sets.cone(500_000, 4, seed=5, exponent=1.0, spread=1.0)
    u = unit(y)
    exact = torch.tensor([math.fsum(column) for column in u.T.tolist()], dtype=torch.float64) / len(u)
    operator = ReAlign.fit(images(50, 4), y)
    assert distance(operator.text_mean_D, exact) <= 1e-13
    single = torch.zeros(4)
    for part in u.float().split(1000):
        single += part.sum(0)
    assert distance(single / len(u), exact) >= 1e-8


def test_equal_texts_and_texts_that_land_on_zero_stay_finite():
    """T21."""
    x = images(30, 3)
    equal = ReAlign.fit(x, torch.tensor([[2.0, 1.0, 0.5]], dtype=torch.float64).expand(5, 3))
    assert math.isfinite(equal.scale) and equal.transform(x).isfinite().all()
    with pytest.raises(ValueError, match="all text embeddings are equal, and epsilon is 0"):
        compute_trace_scale(0.5, 0.0, 0.0)
    with pytest.raises(ValueError, match="all image embeddings are equal"):
        ReAlign.fit(torch.ones(5, 3), texts(30, 3))

    x, y = torch.tensor([[-1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    operator = ReAlign.fit(x, y)
    root = math.sqrt(0.5)
    assert torch.equal(operator.shift_and_project(normalise_rows(y))[0], torch.zeros(2, dtype=torch.float64))
    assert distance(operator.projected_mean_D, [-root / 2, root / 2]) < 1e-9  # epsilon is 1e-10
    assert distance(operator.transform(y, dtype=torch.float64), [[-root, root], [-root, root]]) < 1e-9
    without = ReAlign.fit(x, y, steps=("anchor", "trace"))
    with pytest.raises(ValueError, match=r"text embeddings: of 2 rows 1 land on zero \(row 0\)"):
        without.transform(y)


def test_the_centroid_is_corrected_once(sets, fitted, of_sets):
    """T22: a second correction would bring the mean nearer, and is not the paper's operator."""
    mean_x = of_sets["mean_x"]
    twice = unit(of_sets["result"] - of_sets["result"].mean(0) + mean_x)
    gap, gap_of_two = ((e.mean(0) - mean_x).norm() for e in (of_sets["result"], twice))
    assert gap_of_two < 0.8 * gap
    assert distance(fitted.transform(sets[1]), unit(of_sets["shifted"])) < 1e-12


@pytest.mark.parametrize("steps", [("trace", "anchor"), ("anchor", "anchor"), ("centre",)])
def test_steps_are_the_papers_and_in_its_order(steps):
    with pytest.raises(ValueError, match="steps must be some of anchor, trace, centroid, in this order"):
        ReAlign.fit(images(10), texts(10), steps=steps)
