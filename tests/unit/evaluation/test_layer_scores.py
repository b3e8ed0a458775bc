"""Every pair of layers gets what the metric gives for it alone, read a layer at a time."""

from dataclasses import replace

import pytest
import torch

from rsa_megatron.alignment.metrics import METRICS
from rsa_megatron.alignment.modality_gap import modality_gap
from rsa_megatron.alignment.shuffled_pairs import draw_orders
from rsa_megatron.evaluation import layer_scores
from rsa_megatron.evaluation.feature_store import FeatureStore
from rsa_megatron.evaluation.layer_scores import compute_cone_figures, find_common_samples, score_layers

NUM_KEYS, NUM_SAMPLES = 60, 40
SAMPLES = [list(range(40)), list(range(20, 60)), list(range(0, 60, 3)) + list(range(1, 60, 3))]
WIDTHS = {"vision": {"0": 11, "1": 11, "2": 14}, "text": {"0": 14, "1": 14}}


def features(side: str) -> dict[str, torch.Tensor]:
    """Layers that share more and more with each other."""
    generator = torch.Generator().manual_seed(len(side))
    shared = torch.randn(NUM_KEYS, 6, generator=torch.Generator().manual_seed(0))
    return {
        name: torch.randn(NUM_KEYS, width, generator=generator)
        + int(name) * shared @ torch.randn(6, width, generator=generator)
        for name, width in WIDTHS[side].items()
    }


def make_store(folder, side: str, left_out: tuple = (), **changes) -> FeatureStore:
    keys = [f"{number}" for number in range(NUM_KEYS)]
    manifest = {
        "model": side,
        "side": side,
        "layers": [*WIDTHS[side]],
        "store_dtype": "float32",
        "keys": keys,
        "data": "d",
        "seeds": [0, 1, 2],
        "num_samples": NUM_SAMPLES,
        "samples": SAMPLES,
    } | changes
    store = FeatureStore.create(folder, manifest)
    kept = [number for number in range(NUM_KEYS) if number not in left_out]
    rows = {name: x[kept] for name, x in features(side).items()}
    store.append([keys[number] for number in kept], rows, {keys[number]: "broken" for number in left_out})
    store.finish()
    return store


def by_hand(metric: str, k: int, samples=SAMPLES) -> torch.Tensor:
    vision, text = features("vision"), features("text")
    return torch.tensor(
        [
            [[METRICS[metric](a[chosen], b[chosen], k) for b in text.values()] for a in vision.values()]
            for chosen in samples
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("metric", METRICS)
def test_each_pair_of_layers_has_the_metrics_value(metric, tmp_path):
    vision, text = make_store(tmp_path / "v", "vision"), make_store(tmp_path / "t", "text")
    samples = find_common_samples(vision, text)
    found = score_layers(vision, text, metric, k=5, samples=samples)
    expected = by_hand(metric, 5)
    # The same function of the same rows; for mutual-kNN the same count of neighbours.
    assert torch.equal(found.scores_SRC, expected)
    torch.testing.assert_close(found.mean_RC, expected.mean(0))
    torch.testing.assert_close(found.std_RC, expected.std(0, correction=1))
    order = expected.mean(0) if metric != "rsa" else -expected.mean(0)
    assert order[found.best] == order.max() and found.last == (2, 1)
    assert not torch.equal(expected, by_hand(metric, 5, [SAMPLES[1], SAMPLES[0], SAMPLES[2]]))
    if metric == "mutual-knn":
        assert found.best == (2, 1) and found.chance == pytest.approx(5 / 39)
        assert found.mean_RC[2, 1] > 2 * found.mean_RC[0, 0]
    else:
        assert found.chance is None
    assert_shuffled_pairs(found, metric)


def assert_shuffled_pairs(found, metric):
    """Each order's score is that of its pairs, and the best pair is compared with the best of the same pairs of layers."""
    assert found.shuffled_PRC.shape == (10, 3, 2)
    vision, text = features("vision"), features("text")
    for p in (0, 9):
        by_seed = []
        for seed, chosen in enumerate(SAMPLES):
            of_text = torch.tensor(chosen)[draw_orders(metric, NUM_SAMPLES, seed)[p]]
            if metric == "mutual-knn":  # whose orders are of the rows
                of_text = torch.tensor(chosen)[draw_orders(metric, NUM_SAMPLES, seed)[p].argsort()]
            by_seed.append(
                [[METRICS[metric](a[chosen], b[of_text], 5) for b in text.values()] for a in vision.values()]
            )
        expected_RC = torch.tensor(by_seed, dtype=torch.float64).mean(0)
        torch.testing.assert_close(found.shuffled_PRC[p], expected_RC, rtol=1e-5, atol=1e-9)  # rsa's are float32
    bests = [order_RC.min() if metric == "rsa" else order_RC.max() for order_RC in found.shuffled_PRC]
    assert found.best_shuffled == pytest.approx(sum(bests).item() / 10)
    best_shuffled_of_pair = found.shuffled_PRC[:, *found.best].mean().item()
    if metric == "rsa":
        assert found.mean_RC.min() < found.best_shuffled <= best_shuffled_of_pair
    else:
        assert found.mean_RC.max() > found.best_shuffled >= best_shuffled_of_pair


def test_a_pair_that_one_store_lacks_counts_in_neither(tmp_path):
    vision, text = (
        make_store(tmp_path / "v", "vision", left_out=(3, 25)),
        make_store(tmp_path / "t", "text", left_out=(59,)),
    )
    samples = find_common_samples(vision, text)
    kept = [[number for number in chosen if number not in (3, 25, 59)] for chosen in SAMPLES]
    found = score_layers(vision, text, "mutual-knn", k=5, samples=samples)
    assert torch.equal(found.scores_SRC, by_hand("mutual-knn", 5, kept))
    assert found.chance == pytest.approx(sum(5 / (len(chosen) - 1) for chosen in kept) / 3)


def test_a_store_against_itself_scores_one_on_the_diagonal(tmp_path):
    vision = make_store(tmp_path / "v", "vision")
    found = score_layers(vision, vision, "mutual-knn", k=5, samples=find_common_samples(vision, vision))
    assert torch.equal(found.mean_RC.diagonal(), torch.ones(3, dtype=torch.float64))


def test_neighbours_are_found_once_a_layer_and_layers_read_once(tmp_path, monkeypatch):
    vision, text = make_store(tmp_path / "v", "vision"), make_store(tmp_path / "t", "text")
    calls, read, layer = [], [], FeatureStore.read_layer
    find = layer_scores.nearest_neighbours
    monkeypatch.setattr(layer_scores, "nearest_neighbours", lambda *arguments: calls.append(1) or find(*arguments))
    monkeypatch.setattr(
        FeatureStore,
        "read_layer",
        lambda store, name: read.append((store.manifest["side"], name)) or layer(store, name),
    )
    score_layers(vision, text, "mutual-knn", k=5, samples=find_common_samples(vision, text))
    assert len(calls) == 3 * (3 + 2)  # seeds, layers
    assert sorted(read) == [("text", "0"), ("text", "1"), ("vision", "0"), ("vision", "1"), ("vision", "2")]


def test_the_gap_is_the_mean_over_the_seeds(tmp_path):
    vision, text = make_store(tmp_path / "v", "vision"), make_store(tmp_path / "t", "text")
    samples = find_common_samples(vision, text)
    scores = score_layers(vision, text, "mutual-knn", k=5, samples=samples)
    gap = compute_cone_figures(vision, text, scores, samples=samples)
    expected = [modality_gap(features("vision")["2"][chosen], features("text")["1"][chosen]) for chosen in SAMPLES]
    assert scores.best == scores.last == (2, 1) and gap.keys() == {"best", "last"}
    for pair in gap.values():
        assert pair["distance"] == pytest.approx(sum(one.distance for one in expected) / 3)
        assert pair["second"]["mean_angle"] == pytest.approx(sum(one.second.mean_angle for one in expected) / 3)
    scores = score_layers(text, vision, "mutual-knn", k=5, samples=samples)
    scores = replace(scores, column_layers=["0", "1", "0"])  # a narrower layer in the place of the last
    narrow = compute_cone_figures(text, vision, scores, samples=samples)
    assert narrow["last"]["distance"] is None and narrow["last"]["first"]["mean_angle"] > 0


def test_stores_of_other_samples_are_rejected(tmp_path):
    vision = make_store(tmp_path / "v", "vision")
    for name, value in (("data", "e"), ("seeds", [0, 1, 3]), ("samples", SAMPLES[::-1])):
        other = make_store(tmp_path / name, "text", **{name: value})
        with pytest.raises(ValueError, match=f"are not of the same samples: their {name} differs"):
            find_common_samples(vision, other)
    few = make_store(tmp_path / "few", "text", left_out=(50,))
    samples = find_common_samples(vision, few)  # of seed 1, 39 are left of 40
    with pytest.raises(ValueError, match=r"mutual-knn: too few pairs \(39; need at least 40\)"):
        score_layers(vision, few, "mutual-knn", k=39, samples=samples)


def test_a_layer_without_neighbours_is_named(tmp_path):
    vision = make_store(tmp_path / "v", "vision")
    keys = vision.keys
    constant = FeatureStore.create(tmp_path / "c", vision.manifest | {"layers": ["0"]})
    constant.append(keys, {"0": torch.ones(NUM_KEYS, 4)})
    constant.finish()
    with pytest.raises(ValueError, match="c, layer 0: "):
        score_layers(constant, vision, "mutual-knn", k=5, samples=find_common_samples(constant, vision))
