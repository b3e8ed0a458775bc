"""Every layer of one backbone against every layer of another, from features on disk (figures 3 and C.1 of the paper).

Layers are read one at a time. For mutual-kNN each layer's neighbours are found once, and only those of the columns are
stored: C lists of N * k indices for each seed, 29 * 100,000 * 10 * 8 bytes = 232 MB for N = 100,000. Other metrics read
each column's layer once for each row's; two layers are in memory. Beside each score stands that of shuffled pairs, in the
same orders for all pairs of layers, so that the best of many has its chance too.

Shapes: S seeds, P orders of shuffled pairs, R layers of the rows, C of the columns; N samples of a seed, D and E widths.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from rsa_megatron.alignment import metrics
from rsa_megatron.alignment.modality_gap import modality_gap
from rsa_megatron.alignment.nearest_neighbours import nearest_neighbours, shared_neighbours
from rsa_megatron.alignment.shuffled_pairs import draw_orders, score_with_shuffled, shuffle_neighbours
from rsa_megatron.evaluation.feature_store import FeatureStore

# What two stores must agree on to be compared.
_SAME = ("data", "fingerprint", "num_samples", "seeds", "samples", "keys")

#: Of each seed: rows of the one store and of the other, [N] each, that are of the same samples.
Samples = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LayerScores:
    """One metric over all pairs of layers."""

    metric: str
    row_layers: list[str]
    column_layers: list[str]
    scores_SRC: Tensor
    #: of shuffled pairs, means over the seeds
    shuffled_PRC: Tensor
    #: what spaces that have nothing to do with each other are expected to get, if that is known without them
    chance: float | None

    @property
    def mean_RC(self) -> Tensor:
        return self.scores_SRC.mean(0)

    @property
    def std_RC(self) -> Tensor | None:
        """Over the seeds, with S - 1; None for one seed."""
        return self.scores_SRC.std(0) if len(self.scores_SRC) > 1 else None

    @property
    def best(self) -> tuple[int, int]:
        """The pair of layers of the best mean, as indices of row and column."""
        index = self.mean_RC.argmin() if self._lower_is_better else self.mean_RC.argmax()
        row, column = divmod(index.item(), len(self.column_layers))
        return row, column

    @property
    def best_shuffled(self) -> float:
        """The best of all pairs of layers in each order, mean over the orders: what `best` is of unrelated samples."""
        of_orders_PF = self.shuffled_PRC.flatten(1)
        return (of_orders_PF.amin(1) if self._lower_is_better else of_orders_PF.amax(1)).mean().item()

    @property
    def last(self) -> tuple[int, int]:
        """The pair of the last layers."""
        return len(self.row_layers) - 1, len(self.column_layers) - 1

    @property
    def _lower_is_better(self) -> bool:
        return self.metric in metrics.DISCREPANCIES


def find_common_samples(rows: FeatureStore, columns: FeatureStore) -> Samples:
    """Find for each seed the rows of the samples that have features in both stores.

    Raises:
        ValueError: the stores are of other data or samples.
    """
    for name in _SAME:
        if rows.manifest.get(name) != columns.manifest.get(name):
            raise ValueError(f"{rows.folder} and {columns.folder} are not of the same samples: their {name} differs")
    place_rows, place_columns = ({key: row for row, key in enumerate(store.keys)} for store in (rows, columns))
    keys, samples = rows.manifest["keys"], []
    for chosen in rows.manifest["samples"]:
        found = [keys[i] for i in chosen if keys[i] in place_rows and keys[i] in place_columns]
        samples.append(tuple(torch.tensor([place[key] for key in found]) for place in (place_rows, place_columns)))
    return samples


def score_layers(
    rows: FeatureStore,
    columns: FeatureStore,
    metric: str,
    *,
    k: int,
    samples: Samples,
    device: torch.device | str = "cpu",
    each: Callable[[Sequence[str]], Sequence[str]] = list,
) -> LayerScores:
    """Score all pairs of layers of two stores.

    Args:
        metric: one of alignment.metrics.METRICS.
        k: neighbours, for the metrics that have some.
        samples: of `find_common_samples`.
        device: where it is computed.
        each: wraps the rows' layers, to show how far it is.

    Raises:
        ValueError: a layer's features do not allow the metric, and which layer; or a seed has too few samples for it
            (`metrics.describe_too_few`).
    """
    counts = [len(of_rows) for of_rows, _ in samples]
    if few := metrics.describe_too_few(metric, k, min(counts)):
        raise ValueError(f"{metric}: {few}")
    compute = _score_mutual_knn if metric == metrics.MUTUAL_KNN else _score_any_metric
    num_orders = len(draw_orders(metric, max(counts)))
    orders = [draw_orders(metric, count, seed)[:num_orders] for seed, count in enumerate(counts)]
    # The first is that of the pairs themselves, then the shuffled ones.
    found_SORC = torch.zeros(len(samples), 1 + num_orders, len(rows.layers), len(columns.layers), dtype=torch.float64)
    compute(found_SORC, rows, columns, metric, k, samples, orders, device, each)
    chances = [metrics.find_chance(metric, k, count) for count in counts]
    chance = None if None in chances else sum(chances) / len(chances)
    scores_SRC, shuffled_PRC = found_SORC[:, 0], found_SORC[:, 1:].mean(0)
    return LayerScores(metric, rows.layers, columns.layers, scores_SRC, shuffled_PRC, chance)


def compute_cone_figures(
    rows: FeatureStore,
    columns: FeatureStore,
    scores: LayerScores,
    *,
    samples: Samples,
    device: torch.device | str = "cpu",
) -> dict[str, dict]:
    """Compute alignment.modality_gap for the "best" and the "last" pair of layers, means over the seeds."""
    found = {}
    for name, (row, column) in {"best": scores.best, "last": scores.last}.items():
        a_ND, b_NE = (
            rows.read_layer(scores.row_layers[row]).to(device),
            columns.read_layer(scores.column_layers[column]).to(device),
        )
        found[name] = _average(
            [asdict(modality_gap(a_ND[of_rows], b_NE[of_columns])) for of_rows, of_columns in samples]
        )
    return found


def _average(figures: list) -> dict | float | None:
    """Average each number in dictionaries of the same keys; None stays None."""
    if isinstance(figures[0], dict):
        return {name: _average([one[name] for one in figures]) for name in figures[0]}
    return None if figures[0] is None else sum(figures) / len(figures)


def _score_mutual_knn(found_SORC, rows, columns, metric, k, samples, orders, device, each) -> None:
    of_rows, of_columns = zip(*samples)
    in_columns = [_find_neighbours(columns, name, of_columns, k, device) for name in columns.layers]
    for row, name in enumerate(each(rows.layers)):
        for seed, a_Nk in enumerate(_find_neighbours(rows, name, of_rows, k, device)):
            # Of the row's lists, once for all columns: which side is shuffled makes no difference.
            lists = [a_Nk, *(shuffle_neighbours(a_Nk, order_N) for order_N in orders[seed])]
            for column, in_column in enumerate(in_columns):
                shares = [shared_neighbours(one_Nk, in_column[seed]) for one_Nk in lists]
                found_SORC[seed, :, row, column] = torch.tensor(shares, dtype=torch.float64)


def _find_neighbours(store: FeatureStore, name: str, chosen: Sequence[Tensor], k: int, device) -> list[Tensor]:
    x_ND = store.read_layer(name).to(device)
    try:
        return [nearest_neighbours(x_ND[rows], k).cpu() for rows in chosen]
    except ValueError as error:
        raise ValueError(f"{store.folder}, layer {name}: {error}") from error


def _score_any_metric(found_SORC, rows, columns, metric, k, samples, orders, device, each) -> None:
    for row, row_name in enumerate(each(rows.layers)):
        a_ND = rows.read_layer(row_name).to(device)
        in_row = [a_ND[of_rows] for of_rows, _ in samples]
        for column, column_name in enumerate(columns.layers):
            b_NE = columns.read_layer(column_name).to(device)
            try:
                for seed, (_, of_columns) in enumerate(samples):
                    own, shuffled = score_with_shuffled(metric, in_row[seed], b_NE[of_columns], k, orders[seed])
                    found_SORC[seed, :, row, column] = torch.tensor([own, *shuffled], dtype=torch.float64)
            except ValueError as error:
                raise ValueError(f"--metrics {metric}, layers {row_name} and {column_name}: {error}") from error
            if not found_SORC[:, :, row, column].isfinite().all():
                raise ValueError(f"--metrics {metric}, layers {row_name} and {column_name}: it has no finite value")
