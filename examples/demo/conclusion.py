"""What `make demo` says at its end: what it showed, where the results are, what to type next."""

from pathlib import Path

from rsa_megatron.plots.training_figures import read_figures


def format_conclusion(out: Path, data: Path) -> str:
    """Format the scores before and after both runs, and the next commands."""
    with_rsa, without = (read_figures(out / run / "metrics.jsonl") for run in ("stage1", "without-rsa"))
    names = {
        "mutual-knn": f"mutual-kNN (chance {_get_last(with_rsa['chance']):.3f})",
        "validation lm loss": "LM loss, nats per token",
    }
    rows = [
        f"    {name:<34}{with_rsa[figure][0]:>8.3f}{_get_last(with_rsa[figure]):>10.3f}{_get_last(without[figure]):>9.3f}"
        for figure, name in names.items()
    ]
    model = out / "stage1" / "exported"
    return "\n".join(
        [
            "",
            f"What it showed, on held-out scenes{'before':>10}{'with RSA':>10}{'without':>9}",
            *rows,
            "One seed of a tiny model: how RSA acts, and no result about large ones (docs/results.md has all seeds).",
            f"Curves: {out / 'curves.png'}. TensorBoard: tensorboard --logdir {out}",
            "Next:",
            f"    rsa-megatron measure --model {model} --data {data / 'data' / 'captions'} --out {out / 'layers.jsonl'}",
            f"    rsa-megatron plot heatmap {out / 'layers.jsonl'} --out {out / 'layers'}     # every layer with every layer",
            "    docs/quickstart.md: your own captions;  make demo-stages: all three stages",
        ]
    )


def _get_last(values: dict[int, float]) -> float:
    return values[max(values)]
