"""What `make demo` says at its end: what it showed, where the results are, what to type next."""

import json
from pathlib import Path

SCORES = ("mutual-knn validation", "lm loss validation")


def format_conclusion(out: Path, data: Path) -> str:
    """Format the scores before and after both runs, and the next commands."""
    (with_rsa, without), before = (
        (read_scores(out / run)[-1] for run in ("stage1", "without-rsa")),
        read_scores(out / "stage1")[0],
    )
    chance = before["mutual-knn chance validation"]
    rows = [
        f"    {name:<34}{before[key]:>8.3f}{with_rsa[key]:>10.3f}{without[key]:>9.3f}"
        for name, key in zip((f"mutual-kNN (chance {chance:.3f})", "LM loss, nats per token"), SCORES)
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


def read_scores(run: Path) -> list[dict]:
    """Return the evaluations of a run, each of whose scores stands in one line, the one before training first."""
    found: dict[int, dict] = {}
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if any(name in line for name in SCORES):
            found.setdefault(line["iteration"], {}).update(line)
    return [found[iteration] for iteration in sorted(found)]
