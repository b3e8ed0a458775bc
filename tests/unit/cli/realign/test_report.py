"""The page of two encoders, end to end: planted figures come out, the page shows what the line says, faults by name.

planted_gap.py's rows have known means, variances and a known frame. Each row of signs comes twice, so that the part to fit on
and the part held out, every other row, are the same set: every figure is the planted one, and not an estimate of it.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from rsa_megatron.cli import plot, realign
from rsa_megatron.cli.gap_splits import mark_fit_rows, split_sources
from rsa_megatron.evaluation.embedding_files import open_embeddings
from rsa_megatron.evaluation.feature_store import FeatureStore
from rsa_megatron.plots.gap import draw_gap
from rsa_megatron.plots.gap_records import METHODS, STEPS, read_gap
from rsa_megatron.realign import baselines
from rsa_megatron.realign.mixing import cosine_histogram, fidelity, js_divergence, mixing_rate
from rsa_megatron.realign.realign import ReAlign
from tests.support import planted_gap as planted

IMAGE_TRACE, TEXT_TRACE = sum(planted.IMAGE_VARIANCE.values()), sum(planted.TEXT_VARIANCE.values())
# The sums of some hundred float64 numbers, which a line holds with all their digits.
ROUNDING = 1e-12


def saved(folder: Path, **sets) -> list[str]:
    for name, x_ND in sets.items():
        np.save(folder / f"{name}.npy", x_ND.numpy())
    return [text for name in sets for text in (f"--{name}", str(folder / f"{name}.npy"))]


def report(folder: Path, *flags) -> dict:
    realign.main(["report", *map(str, flags), "--out", str(folder / "page")])
    return json.loads((folder / "page.jsonl").read_text())


@pytest.fixture(scope="module")
def pairs():
    return planted.planted_pairs(planted.balanced_signs().repeat_interleave(2, dim=0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pairs):
    """With the line and the page of the planted pairs."""
    folder = tmp_path_factory.mktemp("planted")
    flags = saved(folder, images=pairs[0], texts=pairs[1])
    report(folder, *flags, "--energy", planted.ENERGY, "--label", "planted")
    return folder


@pytest.fixture
def line(folder):
    return json.loads((folder / "page.jsonl").read_text())


def by_name(line: dict, key: str, name: str) -> dict:
    return {one[name]: one for one in line[key]}


# The figures


def test_the_figures_of_both_clouds_are_the_planted_ones(line):
    assert (line["num_images"], line["num_texts"], line["fit_images"], line["fit_texts"]) == (128, 128, 64, 64)
    assert line["width"] == planted.WIDTH and line["num_sampled"] == 64
    assert line["image_trace"] == pytest.approx(IMAGE_TRACE, abs=ROUNDING)
    assert line["text_trace"] == pytest.approx(TEXT_TRACE, abs=ROUNDING)
    # 1e-10 is ReAlign's epsilon, beside T_y.
    assert line["scale"] == pytest.approx(math.sqrt(IMAGE_TRACE / TEXT_TRACE), rel=1e-9)
    spectrum = line["image"]["spectrum"]
    assert spectrum["trace"] == pytest.approx(IMAGE_TRACE, abs=ROUNDING)
    assert spectrum["values"][:4] == pytest.approx(sorted(planted.IMAGE_VARIANCE.values(), reverse=True), abs=ROUNDING)
    texts = by_name(line, "methods", "method")["none"]["spectrum"]
    assert texts["values"][:4] == pytest.approx(sorted(planted.TEXT_VARIANCE.values(), reverse=True), abs=ROUNDING)
    squares = sum(value**2 for value in planted.TEXT_VARIANCE.values())
    assert texts["effective_dimension"] == pytest.approx(TEXT_TRACE**2 / squares, rel=1e-9)


def test_the_gap_after_each_step_is_in_sample_what_it_is_held_out_and_falls(line):
    steps = by_name(line, "steps", "step")
    mean = planted.planted_mean().norm().item()
    assert steps["none"]["in_sample"] == pytest.approx(mean, abs=ROUNDING)
    for figures in line["steps"] + line["methods"]:
        if figures.get("method") != "c3":  # noise is drawn by the row's bits, and those of equal rows may be other ones
            assert figures["held_out"] == pytest.approx(figures["in_sample"], abs=ROUNDING)
    assert steps["none"]["floor"] == pytest.approx(math.sqrt((IMAGE_TRACE + TEXT_TRACE) / 64), abs=ROUNDING)
    gaps = [steps[step]["held_out"] for step in STEPS]
    assert gaps[0] > 5 * gaps[1] and gaps[3] < gaps[1] and gaps[3] < gaps[2]
    methods = by_name(line, "methods", "method")
    assert methods["mean-shift"]["held_out"] == pytest.approx(gaps[1], abs=ROUNDING)  # the first step alone
    assert methods["realign"]["held_out"] == gaps[3]


def test_the_fixed_frame_is_the_planted_one(line):
    frame, mean_D = line["frame"], planted.planted_mean()
    beta, gamma = mean_D[: planted.RANK].norm().item(), mean_D[planted.RANK :].norm().item()
    assert (frame["rank"], frame["num_pairs"]) == (planted.RANK, 64)
    assert frame["energy"] == pytest.approx(planted.ENERGY, abs=ROUNDING)
    assert [frame["beta_norm"], frame["gamma_norm"]] == pytest.approx([beta, gamma], abs=ROUNDING)
    # Signs of images and texts are along different directions: residuals are independent, and their variances add up.
    expected = {
        "beta": beta**2,
        "gamma": gamma**2,
        "delta": 0.5,
        "zeta": 0.03,
        "total": mean_D.square().sum().item() + 0.53,
    }
    assert frame["budget"] == pytest.approx(expected, abs=ROUNDING)


def test_after_realign_what_is_left_of_the_energy_is_the_residual(line, pairs):
    before, after = line["frame"]["budget"], line["budget_after"]
    gap = by_name(line, "methods", "method")["realign"]["held_out"]
    assert after["beta"] + after["gamma"] == pytest.approx(gap**2, abs=ROUNDING)
    assert after["beta"] + after["gamma"] < 1e-3 * (before["beta"] + before["gamma"])
    images, texts = (x_ND[0::2] for x_ND in pairs)
    moved = ReAlign.fit(images, texts).transform(texts)
    total = (torch.nn.functional.normalize(images) - moved).square().sum(1).mean().item()
    assert after["total"] == pytest.approx(total, abs=ROUNDING)


def test_figures_of_pairs_of_rows_are_those_of_the_held_out_rows(line, pairs):
    images, texts = (x_ND[0::2] for x_ND in pairs)  # of every two rows the second is fitted on
    moved = ReAlign.fit(pairs[0][1::2], pairs[1][1::2]).transform(texts)
    found, kept = by_name(line, "methods", "method"), fidelity(texts, moved, 10)
    assert found["realign"]["mixing"] == mixing_rate(images, moved, 20)
    assert found["realign"]["js"] == js_divergence(cosine_histogram(images), cosine_histogram(moved))
    assert [found["realign"][key] for key in ("phi", "psi", "overlap")] == pytest.approx(
        [kept.mean_cosine, kept.cosine_correlation, kept.neighbour_overlap], abs=ROUNDING
    )
    assert found["none"]["phi"] == pytest.approx(1, abs=ROUNDING) and found["none"]["overlap"] == 1
    assert found["none"]["mixing"] < line["chance_of_mixing"] / 10
    assert (
        line["image"]["cosines"] == cosine_histogram(images).tolist() and sum(line["image"]["cosines"]) == 64 * 63 / 2
    )


def normal_sets(num_images=900, num_texts=700) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws that do not pair up, of other means, spreads and lengths."""
    generator = torch.Generator().manual_seed(5)
    spread_D = torch.arange(1, 25) ** -0.6
    sets = []
    for count, shift, factor in ((num_images, 0.8, 1.0), (num_texts, -0.5, 0.7)):
        mean_D = torch.zeros(24).index_fill_(0, torch.tensor([20, 21]), 1.0) * shift
        sets.append(3 * (mean_D + factor * spread_D * torch.randn(count, 24, generator=generator)))
    return sets[0], sets[1]


def test_of_fresh_rows_the_gap_is_that_of_sampling_and_in_sample_far_below(tmp_path):
    images, texts = normal_sets()
    line = report(tmp_path, *saved(tmp_path, images=images, texts=texts))
    last = by_name(line, "steps", "step")["centroid"]
    # Statistics of as many rows as are held out add as much noise again: sqrt(2) floors; its own spread is far below the
    # factor 2, as it comes from 24 directions.
    assert last["floor"] / 4 < last["held_out"] < 2 * math.sqrt(2) * last["floor"]
    assert last["in_sample"] < last["held_out"] / 4
    before = by_name(line, "steps", "step")["none"]
    assert before["held_out"] > 10 * before["floor"]


def test_sets_that_do_not_pair_up_get_all_other_figures_and_are_reported(tmp_path, capsys):
    images, texts = normal_sets()
    line = report(tmp_path, *saved(tmp_path, images=images, texts=texts), "--methods", "c3", "blockwise")
    printed = capsys.readouterr().out
    assert line["frame"] is None and line["budget_after"] is None
    assert "need pairs: without keys 900 images and 700 texts do not pair up" in line["left_out"]
    assert f"left out: {line['left_out']}" in printed
    assert list(by_name(line, "methods", "method")) == ["none", "c3", "blockwise", "realign"]
    assert (line["fit_images"], line["fit_texts"], line["num_sampled"]) == (450, 350, 350)
    assert line["left_out"] in texts_of(draw_gap(read_gap([tmp_path / "page.jsonl"]))).replace("\n", " ")


# Pairs and parts


def stored(folder: Path, name: str, keys: list[str], x_ND: torch.Tensor):
    manifest = {"keys": keys, "layers": ["embedding"], "store_dtype": "float32", "side": name}
    store = FeatureStore.create(folder / name, manifest)
    half = len(keys) // 2
    for rows in (slice(0, half), slice(half, None)):
        store.append(keys[rows], {"embedding": x_ND[rows].float()})
    store.finish()
    return open_embeddings(folder / name)


def test_pairs_are_found_by_their_keys_and_never_torn_apart(tmp_path):
    row_ND = torch.arange(1.0, 41)[:, None] * torch.ones(1, 4)  # each row says its number
    image_keys = [f"k{i}" for i in range(1, 41) if i % 5]
    text_keys = [f"k{i}" for i in range(1, 41) if i % 3]
    images = stored(tmp_path, "image", image_keys, row_ND[[int(key[1:]) - 1 for key in image_keys]])
    texts = stored(tmp_path, "text", text_keys, row_ND[[int(key[1:]) - 1 for key in text_keys]])
    splits = split_sources(images, texts, 0.4)
    assert splits.unpaired is None
    both = [i for i in range(1, 41) if i % 5 and i % 3]

    def numbers(rows):
        return torch.cat(list(rows))[:, 0].int().tolist()

    paired = numbers(splits.paired_images)
    assert paired == numbers(splits.paired_texts) and set(paired) < set(both)
    assert (
        set(numbers(splits.fit_images)) & set(both)
        == set(numbers(splits.fit_texts)) & set(both)
        == set(both) - set(paired)
    )
    assert sorted(numbers(splits.fit_images) + numbers(splits.held_images)) == [i for i in range(1, 41) if i % 5]
    assert split_sources(images, texts, 0.4, unpaired=True).paired_images is None


@pytest.mark.parametrize(
    "keys, reason",
    [
        (
            ["k3", "k2", "k1", "k0", "k4", "k5", "k6", "k7"],
            "the 8 common keys of images and texts are in a different order",
        ),
        (["k0", "k1", "a", "b", "c", "d", "e", "f"], "1 of 2 pairs are held out"),
        (["a", "b", "c", "d", "e", "f", "g", "h"], "images and texts have no key in common"),
        (["k0", "k1", "k2", "k3", "k4", "k5", "k1", "k0"], "2 keys of the texts are duplicates"),
    ],
)
def test_why_keys_do_not_pair_up_is_reported(tmp_path, keys, reason):
    images = stored(tmp_path, "image", [f"k{i}" for i in range(8)], torch.eye(8))
    texts = stored(tmp_path, "text", keys, torch.eye(8))
    assert split_sources(images, texts, 0.5).unpaired == reason


def test_a_part_is_spread_evenly_over_its_source():
    assert mark_fit_rows(8, 0.5).tolist() == [False, True] * 4
    for fraction in (0.1, 0.3, 0.8):
        counts = mark_fit_rows(1000, fraction).view(10, 100).sum(1)
        assert (counts - 100 * fraction).abs().max() <= 1


def test_a_sample_is_of_the_part_and_the_same_each_time(folder):
    splits = split_sources(*(open_embeddings(folder / f"{name}.npy") for name in ("images", "texts")), 0.5)
    sample = splits.held_images.sample(10)
    assert torch.equal(sample, splits.held_images.sample(10)) and len(sample) == 10
    assert torch.equal(splits.held_images.sample(1000), torch.cat(list(splits.held_images)))


# The page


def texts_of(figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_the_page_shows_the_numbers_of_the_line(folder, line):
    figure = draw_gap(read_gap([folder / "page.jsonl"]))
    before, after, _, _, steps, budget, spectra, cosines, _ = figure.axes
    for axis, cloud in ((before, "text"), (after, "realigned")):
        for drawn, name in zip(axis.get_lines(), ("image", cloud)):
            np.testing.assert_array_equal(np.stack(drawn.get_data(), axis=1), np.array(line["clouds"][name])[:, :2])
    assert before.get_xlim() == after.get_xlim()
    for drawn, key in zip(steps.get_lines(), ("in_sample", "held_out", "floor")):
        assert list(drawn.get_ydata()) == [step[key] for step in line["steps"]]
    assert steps.get_yscale() == "log"
    widths = [[bar.get_width() for bar in term] for term in budget.containers]
    expected = [
        [line["frame"]["budget"][term], line["budget_after"][term]] for term in ("beta", "gamma", "delta", "zeta")
    ]
    np.testing.assert_allclose(widths, expected, atol=ROUNDING)  # a bar has a left and a right end
    image = line["image"]["spectrum"]
    shares = [value / image["trace"] for value in image["values"] if value > 0]
    np.testing.assert_allclose(spectra.get_lines()[0].get_ydata(), shares)
    areas = [(patch.get_data().values * np.diff(patch.get_data().edges)).sum() for patch in cosines.patches]
    assert len(areas) == 4 and areas == pytest.approx([1] * 4)  # images, texts, C3, ReAlign
    printed = texts_of(figure)
    assert "planted: images and texts in one space (128 images, 128 texts, D = 16)" in printed.replace("\n", " ")
    assert f"r = {planted.RANK} directions hold {planted.ENERGY:.2%}" in printed


def test_clouds_lie_apart_along_the_mean_difference_and_together_afterwards(line):
    clouds = {name: np.array(points) for name, points in line["clouds"].items()}
    distance = by_name(line, "steps", "step")["none"]["held_out"]
    # Points are rounded to four digits.
    assert clouds["image"].mean(0) == pytest.approx([0, 0, 0], abs=1e-4)
    assert clouds["text"].mean(0) == pytest.approx([-distance, 0, 0], abs=1e-4)
    assert np.abs(clouds["realigned"].mean(0)).max() < 0.05 * distance


def test_the_same_bytes_twice_and_from_the_file_alone(folder, pairs, tmp_path, capsys):
    flags = saved(tmp_path, images=pairs[0], texts=pairs[1])
    report(tmp_path, *flags, "--energy", planted.ENERGY, "--label", "planted")
    lines = [(place / "page.jsonl").read_text().replace(str(place), "") for place in (folder, tmp_path)]
    assert lines[0] == lines[1]
    plot.main(["gap", str(folder / "page.jsonl"), "--out", str(tmp_path / "again")])
    for kind in ("png", "svg"):
        paths = (folder / f"page.{kind}", tmp_path / f"page.{kind}", tmp_path / f"again.{kind}")
        assert len({path.read_bytes() for path in paths}) == 1
    written = ["images.npy", "page.jsonl", "page.png", "page.svg", "texts.npy"]
    assert sorted(path.name for path in folder.iterdir()) == written
    grey = np.asarray(Image.open(folder / "page.png").convert("L"))
    assert grey.shape[1] > 1000 and len(np.unique(grey)) > 20
    assert "page: " in capsys.readouterr().out


def test_equal_sets_have_no_gap_and_a_page_all_the_same(pairs, tmp_path):
    line = report(tmp_path, *saved(tmp_path, images=pairs[0], texts=pairs[0]), "--methods", "none")
    assert all(step["held_out"] < 1e-9 for step in line["steps"])  # epsilon, 1e-10, scales texts by 1 - 2e-10
    realigned = by_name(line, "methods", "method")["realign"]
    assert realigned["js"] == 0 and realigned["phi"] == pytest.approx(1, abs=ROUNDING)
    assert line["frame"]["gamma_angle"] is None and line["frame"]["budget"]["total"] < ROUNDING


def test_methods_are_those_that_operators_have():
    assert set(METHODS) == set(baselines.METHODS)


# Faults


def spoilt(x_ND: torch.Tensor, row: int, value: float) -> torch.Tensor:
    return x_ND.index_fill(0, torch.tensor([row]), value)


@pytest.mark.parametrize(
    "change, flags, message",
    [
        (lambda x, y: (x, y[:, :8]), [], "16 numbers a row"),
        (lambda x, y: (x[:, :2], y[:, :2]), [], "rows of 2 numbers: the page needs at least three directions"),
        (lambda x, y: (spoilt(x, 7, math.nan), y), [], "1 of 128 embeddings have no direction"),
        (lambda x, y: (x, spoilt(y, 9, 0.0)), [], "row 9"),
        (lambda x, y: (x[:20], y[:20]), [], "10 neighbours need 11 held-out rows per side, and there are 10"),
        (lambda x, y: (x[:3], y[:3]), [], "--fit-fraction 0.5 leaves 1 images to be fitted on"),
        (lambda x, y: (x, y), ["--fit-fraction", "1"], "--fit-fraction 1 must lie between 0 and 1"),
        (lambda x, y: (x, y), ["--num-pairs", "10"], "--num-pairs 10 must be above 10"),
        (lambda x, y: (x, y), ["--rank", "17"], "rank=17"),
        (lambda x, y: (x, y), ["--methods", "cca"], "'cca'"),
        (lambda x, y: (x, y), ["--encoder", "clip"], "name two sets of embeddings"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(pairs, tmp_path, capsys, change, flags, message):
    images, texts = change(*pairs)
    sets = saved(tmp_path, images=images, texts=texts)
    with pytest.raises(SystemExit) as stopped:
        report(tmp_path, *sets, *flags)
    errors = [text for text in capsys.readouterr().err.splitlines() if "error: " in text]
    assert stopped.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npy", "texts.npy"]


def changed(line: dict, path: str, value) -> dict:
    *places, last = path.split(".")
    at = line
    for place in places:
        at = at[int(place) if isinstance(at, list) else place]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return line


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("scale", None, "line 1: 'scale' is missing; it must be a number"),
        ("num_images", 1.5, "line 1: 'num_images' is a whole number above 0, not '1.5'"),
        ("steps.1.held_out", -1, "line 1, 'steps' 1: 'held_out' is a number of at least 0, not '-1'"),
        (
            "steps.1.step",
            "trace",
            "line 1: 'steps' are none, anchor, trace, centroid in this order, not none, trace, centroid",
        ),
        (
            "methods.0.method",
            "cca",
            "line 1, 'methods' 0: 'method' is one of none, mean-shift, c3, blockwise, realign, not 'cca'",
        ),
        ("methods.0.mixing", "high", "line 1, 'methods' 0: 'mixing' is a number, not 'high'"),
        ("methods.0.cosines", [1, 2], "line 1: 'methods' has 2 bins of cosines for 'none', images have 200"),
        ("image.spectrum.values", [float("nan")], "line 1, 'image', 'spectrum': 'values' is a list of numbers"),
        ("frame.budget.total", 5, "line 1, 'frame', 'budget': 'total' is 5, but its terms add up to "),
        ("frame", False, "line 1: 'frame' is an object or null"),
        ("clouds.text", [[1, 2]], "line 1, 'clouds': 'text' is a list of points of three numbers"),
    ],
)
def test_a_broken_line_is_one_message_with_file_line_and_key(line, tmp_path, capsys, path, value, message):
    file = tmp_path / "broken.jsonl"
    file.write_text(json.dumps(changed(line, path, value)) + "\n")
    with pytest.raises(SystemExit):
        plot.main(["gap", str(file), "--out", str(tmp_path / "page")])
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {file}, {message}") and printed.count("\n") == 1
    assert not (tmp_path / "page.png").exists()


def test_two_lines_are_two_pages(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        plot.main(["gap", *[str(folder / "page.jsonl")] * 2, "--out", str(tmp_path / "page")])
    assert "a page shows one pair of encoders; draw them apart" in capsys.readouterr().err
