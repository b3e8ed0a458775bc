"""Which rows of a table are read, where a column says of which split or language each is; the others are counted."""

from collections import Counter
from collections.abc import Collection, Mapping


class RowChoice:
    """Rows of one value in each of some columns.

    Args:
        wanted: by column the value that counts, where a table has the column.
    """

    def __init__(self, **wanted: str):
        self.wanted = wanted
        self._others = {name: Counter() for name in wanted}

    def takes(self, row: Mapping, columns: Collection[str]) -> bool:
        """Return whether a row of a table with these columns counts; if not, remember why."""
        for name, value in self.wanted.items():
            if name in columns and (found := str(row.get(name))) != value:
                self._others[name][found] += 1
                return False
        return True

    def count_others(self) -> Counter[str]:
        """Count the rows that were not taken, by why."""
        counts = (count_others(name, self.wanted[name], others) for name, others in self._others.items())
        return sum(counts, Counter())


def count_others(name: str, wanted: str, others: Counter[str]) -> Counter[str]:
    """Count what is of another split or language than the wanted one: how many, by which."""
    kinds = ", ".join(f"{kind or "''"} ({count})" for kind, count in others.most_common(8))
    flag = {"language": "--language-code"}.get(name, f"--{name}")
    reason = f"of another {name} than {wanted!r} ({flag} selects it; found: {kinds})"
    return Counter({reason: others.total()} if others else {})
