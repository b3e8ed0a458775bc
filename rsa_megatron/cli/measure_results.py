"""Writes what rsa-megatron measure has found: a JSON object a line, which alignment_records.py reads, and a table.

Shapes: S seeds, R layers of the rows, C of the columns.
"""

import datetime
import json
from pathlib import Path

from rsa_megatron import atomic
from rsa_megatron.evaluation.layer_scores import LayerScores
from rsa_megatron.json_lines import json_object

# What identifies a measurement. A line replaces one that agrees in all of these.
_IDENTITY = (
    "kind",
    "label",
    "data",
    "rows",
    "columns",
    "row_model",
    "column_model",
    "metric",
    "k",
    "num_samples",
    "seeds",
    "text_reading",
)


def make_line(rows, columns, scores: LayerScores, gap: dict, *, k: int, label: str | None, data: str | None) -> dict:
    """Make the line of one metric.

    Args:
        rows, columns: the stores of features.
        gap: of layer_scores.compute_cone_figures.
        label: None for the models' names; data: None for the data's own.
    """
    manifests = [store.manifest for store in (rows, columns)]
    models = [manifest["model"] for manifest in manifests]
    revisions = dict.fromkeys(manifest["revision"] for manifest in manifests)
    readings = [manifest["text_reading"] for manifest in manifests if "text_reading" in manifest]
    return {
        "kind": "alignment",
        "label": label or " and ".join(dict.fromkeys(models)),
        "data": data or manifests[0]["data"],
        "rows": manifests[0]["side"],
        "columns": manifests[1]["side"],
        "row_model": models[0],
        "column_model": models[1],
        "metric": scores.metric,
        "k": k,
        "num_samples": manifests[0]["num_samples"],
        "seeds": manifests[0]["seeds"],
        "left_out": len({key for store in (rows, columns) for key in store.left_out}),
        "pooling": ", ".join(dict.fromkeys(manifest["pooling"] for manifest in manifests)),
        "text_reading": "multimodal" if "multimodal" in readings else readings[0] if readings else None,
        "row_layers": scores.row_layers,
        "column_layers": scores.column_layers,
        "scores": scores.scores_SRC.tolist(),
        "mean": scores.mean_RC.tolist(),
        "std": None if scores.std_RC is None else scores.std_RC.tolist(),
        "best": _describe_pair(scores, *scores.best),
        "last": _describe_pair(scores, *scores.last),
        "chance": scores.chance,
        "shuffled": {
            "orders": len(scores.shuffled_PRC),
            "mean": scores.shuffled_PRC.mean(0).tolist(),
            "best": scores.best_shuffled,
            "last": scores.shuffled_PRC[:, *scores.last].mean().item(),
        },
        "gap": gap,
        "revision": None if None in revisions else ", ".join(revisions),
        "date": datetime.date.today().isoformat(),
    }


def _describe_pair(scores: LayerScores, row: int, column: int) -> dict:
    std = None if scores.std_RC is None else scores.std_RC[row, column].item()
    return {
        "row": scores.row_layers[row],
        "column": scores.column_layers[column],
        "mean": scores.mean_RC[row, column].item(),
        "std": std,
    }


def read_lines(path: Path) -> list[dict]:
    """Read the lines of a file, of whatever kind; none if it does not exist.

    Raises:
        ValueError: a line is not a JSON object.
    """
    try:
        texts = path.read_text().split("\n") if path.exists() else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}; name another --out") from error
    return [json_object(text, f"{path}, line {number}") for number, text in enumerate(texts, 1) if text.strip()]


def write_lines(path: Path, lines: list[dict]) -> None:
    """Add lines to a file atomically, each replacing an earlier one of the same measurement."""
    others = [line for line in read_lines(path) if not any(_get_identity(line) == _get_identity(one) for one in lines)]
    atomic.write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in [*others, *lines]))


def _get_identity(line: dict) -> list:
    return [line.get(name) for name in _IDENTITY]


def format_table(lines: list[dict]) -> str:
    """Format best and last pair of each metric, all of one measurement."""
    first = lines[0]
    seeds = ", ".join(map(str, first["seeds"]))
    what = f"{first['label']}, {first['rows']} x {first['columns']} layers, on {first['data']}: {first['num_samples']} pairs"
    what += f", seeds {seeds}, k = {first['k']}" + (f", {first['left_out']} pairs skipped" if first["left_out"] else "")
    what += ", each caption read AFTER ITS IMAGE" if first["text_reading"] == "multimodal" else ""
    header = ["metric", "best pair", "score", "shuffled", "last pair", "score", "shuffled", "chance"]
    body = [
        [
            line["metric"],
            *_format_cells(line, "best"),
            *_format_cells(line, "last"),
            "" if line["chance"] is None else f"{line['chance']:.4f}",
        ]
        for line in lines
    ]
    widths = [max(map(len, column)) for column in zip(header, *body)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [header, *body]]
    orders = ", ".join(dict.fromkeys(str(line["shuffled"]["orders"]) for line in lines))
    pairs = len(first["row_layers"]) * len(first["column_layers"])
    best = f"; of the best pair: the best of all {pairs} pairs of layers" if pairs > 1 else ""
    return "\n".join([what, *rows, f"shuffled: the mean over {orders} random orders of the samples of one side{best}"])


def _format_cells(line: dict, name: str) -> list[str]:
    pair = line[name]
    spread = "" if pair["std"] is None else f" ± {pair['std']:.4f}"
    return [f"{pair['row']} x {pair['column']}", f"{pair['mean']:.4f}{spread}", f"{line['shuffled'][name]:.4f}"]
