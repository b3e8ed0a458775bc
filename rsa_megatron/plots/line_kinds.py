"""The lines that figures are drawn from, by their `kind`: selected from files, and what other files hold and what draws that.

alignment   rsa-megatron measure           run    make reproduce, make demo-stages
gap         rsa-megatron realign report
"""

from collections import Counter
from pathlib import Path

from rsa_megatron.json_lines import Line, json_lines

#: what writes lines of a kind, and the commands that draw them
_ORIGINS = {
    "alignment": ("`rsa-megatron measure`", "`rsa-megatron plot heatmap` and `bars`"),
    "run": ("`make reproduce`", "`rsa-megatron plot stages`, `steps` and `ablation`"),
    "gap": ("`rsa-megatron realign report`", "`rsa-megatron plot gap`"),
}


def read_kind(paths: list[Path], kind: str) -> list[Line]:
    """Read the lines of a kind, and print how many others there are.

    Raises:
        ValueError: there is none; names what the files hold instead, and what draws it.
    """
    lines, others = [], Counter()
    first_other = None
    for path in paths:
        for line in json_lines(path):
            if line.values.get("kind") == kind:
                lines.append(line)
            else:
                others[str(path)] += 1
                first_other = first_other or (path, line)
    if not lines:
        raise ValueError(f"{first_other[0]} {_describe(*first_other)}; this figure is of lines of {_ORIGINS[kind][0]}")
    for path, count in others.items():
        print(f"skipped: {count} lines of {path} that are not of {_ORIGINS[kind][0]}")
    return lines


def _describe(path: Path, line: Line) -> str:
    found = line.values.get("kind")
    if isinstance(found, str) and found in _ORIGINS:
        origin, commands = _ORIGINS[found]
        return f"holds lines of {origin}, which {commands} draw"
    if "iteration" in line.values:
        draws = f"python examples/demo/plot_runs.py --group NAME {path} --out curves.png"
        return f"holds the figures of a training run by iteration, which `{draws}` draws"
    return "holds lines that no figure is of"
