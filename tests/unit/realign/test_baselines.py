"""The baselines are their formulas, differ from ReAlign where they should, and are fitted, applied and saved as it is."""

import pytest
import torch

from rsa_megatron.realign.baselines import (
    C3,
    METHODS,
    BlockwiseCovariance,
    MeanShift,
    NoAlignment,
    load_operator,
)
from rsa_megatron.realign.frame import Frame
from tests.support.embedding_sets import images, texts, unit


def gap(moved, x) -> float:
    return (moved.mean(0) - unit(x).mean(0)).norm().item()


def covariance(e):
    return e.T.cov(correction=0)


def test_the_methods_have_the_names_of_the_command_line():
    assert list(METHODS) == ["none", "mean-shift", "c3", "blockwise", "realign"]
    assert all(operator.method == name for name, operator in METHODS.items())


@pytest.mark.parametrize("method", METHODS)
def test_all_are_fitted_applied_and_saved_alike(method, tmp_path):
    x, y = images(), texts()
    operator = METHODS[method].fit(x.split(70), y.split(90), about={"encoder": "CLIP"})
    moved = operator.transform(y)
    assert moved.dtype == y.dtype and (moved.norm(dim=1) - 1).abs().max() < 1e-12
    assert operator.transform(y.float(), dtype=torch.float16).dtype == torch.float16
    operator.save(tmp_path / "operator")
    loaded = load_operator(tmp_path / "operator")
    assert type(loaded) is METHODS[method] and loaded.about == {"encoder": "CLIP"}
    assert torch.equal(loaded.transform(y), moved)
    assert (operator.image_mean_D - unit(x).mean(0)).abs().max() < 1e-12 and operator.num_texts == 420
    rows = y[:3].clone()
    rows[1] = torch.nan
    with pytest.raises(ValueError, match=r"1 hold NaN \(row 1\)"):
        METHODS[method].fit(x, rows)
    with pytest.raises(ValueError, match=r"1 hold NaN \(row 1\)"):
        operator.transform(rows)


def test_an_operator_of_an_unknown_method_is_reported(tmp_path):
    MeanShift.fit(images(), texts()).save(tmp_path / "operator")
    manifest = tmp_path / "operator" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("mean-shift", "mean-shaft"))
    with pytest.raises(
        ValueError, match="method 'mean-shaft', which is not one of none, mean-shift, c3, blockwise, realign"
    ):
        load_operator(tmp_path / "operator")


def test_no_alignment_and_mean_shift_are_their_formulas():
    x, y = images(), texts()
    u = unit(y)
    assert (NoAlignment.fit(x, y).transform(y) - u).abs().max() < 1e-12
    shifted = MeanShift.fit(x, y).transform(y)
    assert (shifted - unit(u - u.mean(0) + unit(x).mean(0))).abs().max() < 1e-12
    assert (shifted - METHODS["realign"].fit(x, y, steps=("anchor",)).transform(y)).abs().max() < 1e-12
    assert (shifted - METHODS["realign"].fit(x, y).transform(y)).abs().max() > 0.01


def test_the_order_of_the_gaps():
    """On the sets they were fitted on; of C3's and blockwise's against mean shift's nothing is claimed."""
    x, y = images(2000), texts(2000)
    gaps = {method: gap(operator.fit(x, y).transform(y), x) for method, operator in METHODS.items()}
    assert gaps["realign"] < 0.5 * gaps["mean-shift"] and gaps["mean-shift"] < 0.2 * gaps["none"]


def test_c3_is_mean_shift_with_noise():
    x, y = images(), texts()
    shifted = MeanShift.fit(x, y).transform(y)
    assert torch.equal(C3.fit(x, y, sigma=0.0).transform(y), shifted)
    noisy = C3.fit(x, y).transform(y)  # sigma 0.04
    # Noise of length 0.04 sqrt(24) = 0.2 on rows of length near 1.
    assert 0.1 < (noisy - shifted).norm(dim=1).mean() < 0.3
    with pytest.raises(ValueError, match="must be a standard deviation"):
        C3.fit(x, y, sigma=-1)


def test_c3s_noise_is_normal_and_belongs_to_the_row():
    rows = torch.cat([texts(4000), texts(4000) * 3])
    operator = C3.fit(images(), texts())
    noise = operator._draw_noise(unit(rows))
    assert torch.equal(noise[:4000], noise[4000:])  # the same row, of another length
    sample = (
        noise[:4000].flatten().double()
    )  # 96,000 numbers: five standard errors are 5 / sqrt(96000) = 0.016, and 0.023 for squares
    assert abs(sample.mean()) < 0.016 and abs(sample.square().mean() - 1) < 0.023
    assert abs(sample.pow(4).mean() - 3) < 5 * (96 / 96_000) ** 0.5  # the variance of n^4 is 96
    correlations = torch.corrcoef(noise[:4000].T) - torch.eye(24)
    assert correlations.abs().max() < 5 / 4000**0.5
    assert (noise[1:4000] * noise[:3999]).mean().abs() < 0.016  # from row to row, too


def test_c3_gives_a_row_the_same_noise_in_any_batch_order_and_process():
    x, y = images(), texts()
    operator = C3.fit(x, y)
    whole = operator.transform(y)
    assert torch.equal(C3.fit(x, y).transform(y), whole)
    # A last bit of a row's length may depend on the batch; the noise does not.
    assert (torch.cat([operator.transform(part) for part in y.split(17)]) - whole).abs().max() < 1e-12
    assert (operator.transform(y.flip(0)).flip(0) - whole).abs().max() < 1e-12
    assert (C3.fit(x, y, seed=1).transform(y) - whole).norm(dim=1).min() > 0.01
    drawn = [operator.transform(y, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_c3s_gap_before_the_projection_is_that_of_finite_samples():
    """sigma sqrt(D / N): the mean of N rows of noise. What is reported as a bottleneck of 0.0023 may be this, and no gap."""
    operator = C3.fit(images(), texts(4000))
    mean_of_noise = 0.04 * operator._draw_noise(unit(texts(4000))).double().mean(0).norm()
    # D squares of standard normal numbers have a standard deviation of sqrt(2 D): 14 % of the root, three times that.
    assert abs(mean_of_noise / (0.04 * (24 / 4000) ** 0.5) - 1) < 0.45


def test_blockwise_matches_the_covariance_in_each_block():
    """Without shrinkage P_W M Cov(e_y) M^T P_W = P_W Cov(e_x) P_W, in U and in V."""
    x, y = images(2000), texts(2000)
    operator = BlockwiseCovariance.fit(x, y, shrinkage=0.0, energy=0.8)
    image_DD, text_DD = covariance(unit(x)), covariance(unit(y))
    frame = Frame.of_covariance(image_DD + text_DD, energy=0.8)
    assert operator.rank == frame.rank and 1 < frame.rank < 24
    mapped_DD = operator.map_DD @ text_DD @ operator.map_DD.T
    for rows in (slice(None, frame.rank), slice(frame.rank, None)):
        basis = frame.axes_DD[:, rows]
        # Roots and inverses of matrices with condition 1e3: 1e-16 times that, some times over.
        assert (basis.T @ (mapped_DD - image_DD) @ basis).abs().max() < 1e-11
        assert (basis.T @ (text_DD - image_DD) @ basis).abs().max() > 1e-4  # which was not so before


def test_blockwise_is_its_formula_and_takes_whole_frames_and_flat_texts():
    x, y = images(), texts()
    operator = BlockwiseCovariance.fit(x, y)
    u = unit(y)
    mapped = unit(unit(u - u.mean(0) + unit(x).mean(0)) @ operator.map_DD.T)
    assert (operator.transform(y) - unit(mapped - mapped.mean(0) + unit(x).mean(0))).abs().max() < 1e-12
    assert BlockwiseCovariance.fit(x, y, energy=1.0).rank == 24
    flat = texts() * (torch.arange(24) < 20)  # four directions without any variance: the inverse leaves them out
    assert BlockwiseCovariance.fit(x, flat, shrinkage=0.0).transform(flat).isfinite().all()
    with pytest.raises(ValueError, match="must be a share"):
        BlockwiseCovariance.fit(x, y, shrinkage=2)
