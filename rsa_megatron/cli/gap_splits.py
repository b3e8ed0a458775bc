"""Two sources of embeddings in splits: rows that statistics are fitted on, rows held out for every other figure, and pairs.

Rows are read piece by piece each time, and no split is held in memory; what is stored of a source is a mark for each row.
A split is spread evenly over its source, so that one in the order of its datasets is represented in both.

Shapes: N rows of a source, n of a piece; D width.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rsa_megatron.evaluation.embedding_files import Embeddings
from rsa_megatron.realign.operator import EmbeddingOperator


class Rows:
    """Some rows of a source, in order: iterate for its pieces [n, D], as often as you like.

    Args:
        pieces: of the source, an iterable that starts from the beginning each time.
        chosen_N: which rows.
        operator: moves them on the way, in float64: rounded to float16 a row of width 1280 would be 2e-4 off.
    """

    def __init__(self, pieces: Iterable[Tensor], chosen_N: Tensor, operator: EmbeddingOperator | None = None):
        self._pieces, self._chosen_N, self._operator = pieces, chosen_N, operator

    @property
    def num_rows(self) -> int:
        return int(self._chosen_N.sum())

    def __iter__(self) -> Iterator[Tensor]:
        row = 0
        for piece_nD in self._pieces:
            rows_nD = piece_nD[self._chosen_N[row : row + len(piece_nD)]]
            row += len(piece_nD)
            if len(rows_nD):
                yield rows_nD if self._operator is None else self._operator.transform(rows_nD, dtype=torch.float64)

    def move_with(self, operator: EmbeddingOperator) -> "Rows":
        return Rows(self._pieces, self._chosen_N, operator)

    def sample(self, most: int) -> Tensor:
        """Read at most `most` of them, spread evenly, into memory: the same ones at each call."""
        chosen_n = self._chosen_N.nonzero()[:, 0]
        count = min(most, len(chosen_n))
        sampled_N = torch.zeros_like(self._chosen_N)
        sampled_N[chosen_n[torch.arange(count) * len(chosen_n) // max(count, 1)]] = True
        return torch.cat(list(Rows(self._pieces, sampled_N, self._operator)))


@dataclass(frozen=True)
class Splits:
    """Of images and texts: the rows to fit on, and others."""

    fit_images: Rows
    fit_texts: Rows
    held_images: Rows
    held_texts: Rows
    #: the held-out rows that have a partner, row i of both the same sample; None where sources do not pair up
    paired_images: Rows | None
    paired_texts: Rows | None
    #: why they do not; None where they do
    unpaired: str | None


def split_sources(images: Embeddings, texts: Embeddings, fraction: float, *, unpaired: bool = False) -> Splits:
    """Split two sources; both rows of a pair go to the same split.

    Args:
        fraction: of the rows, to fit on.
        unpaired: equal keys, or numbers of rows, do not make pairs.

    Raises:
        ValueError: a split would have fewer than two rows.
    """
    pairs, reason = (([], []), "--unpaired was passed") if unpaired else match_rows(images, texts)
    with_partner = [torch.zeros(source.num_rows, dtype=torch.bool) for source in (images, texts)]
    for chosen_N, numbers in zip(with_partner, pairs):
        chosen_N[numbers] = True
    fit = [torch.zeros_like(chosen_N) for chosen_N in with_partner]
    for fit_N, partner_N in zip(fit, with_partner):
        for group_N in (partner_N, ~partner_N):
            fit_N[group_N] = mark_fit_rows(int(group_N.sum()), fraction)
    rows = [
        [Rows(source, chosen_N) for source, chosen_N in zip((images, texts), both)]
        for both in (fit, [~fit_N for fit_N in fit])
    ]
    for what, part in zip(("fitted on", "held out"), rows):
        for name, chosen in zip(("images", "texts"), part):
            if chosen.num_rows < 2:
                left = f"{chosen.num_rows} {name} to be {what}"
                raise ValueError(f"--fit-fraction {fraction:g} leaves {left}; at least two are needed")
    paired = [Rows(source, partner_N & ~fit_N) for source, partner_N, fit_N in zip((images, texts), with_partner, fit)]
    if reason is None and paired[0].num_rows < 2:
        reason = f"{paired[0].num_rows} of {len(pairs[0])} pairs are held out"
    return Splits(*rows[0], *rows[1], *(paired if reason is None else (None, None)), reason)


def mark_fit_rows(num_rows: int, fraction: float) -> Tensor:
    """Mark that share of the rows, as evenly as possible, [num_rows]."""
    before_N = torch.arange(num_rows + 1, dtype=torch.float64).mul(fraction).floor()
    return before_N[1:] > before_N[:-1]


def match_rows(images: Embeddings, texts: Embeddings) -> tuple[tuple[list[int], list[int]], str | None]:
    """Return the numbers of the rows that both sources have, in order; or none, and why."""
    none = ([], [])
    if images.keys is None or texts.keys is None:
        if images.num_rows != texts.num_rows:
            return none, f"without keys {images.num_rows} images and {texts.num_rows} texts do not pair up"
        return (list(range(images.num_rows)),) * 2, None
    common = set(images.keys) & set(texts.keys)
    for name, keys in (("images", images.keys), ("texts", texts.keys)):
        if len(set(keys)) < len(keys):
            return none, f"{len(keys) - len(set(keys))} keys of the {name} are duplicates"
    numbers = tuple([number for number, key in enumerate(source.keys) if key in common] for source in (images, texts))
    if not common:
        return none, "images and texts have no key in common"
    if [images.keys[number] for number in numbers[0]] != [texts.keys[number] for number in numbers[1]]:
        return none, f"the {len(common)} common keys of images and texts are in a different order"
    return numbers, None
