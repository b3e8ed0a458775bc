"""Markdown tables of figures over seeds."""

import statistics


def format_cell(of_seed: dict[int, float]) -> str:
    """Format "0.1234 ± 0.0012 (0.1230, ...)", the seeds in order."""
    values = [of_seed[seed] for seed in sorted(of_seed)]
    return format_spread(values) + (f" ({', '.join(f'{value:.3f}' for value in values)})" if len(values) > 1 else "")


def format_spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def format_table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
