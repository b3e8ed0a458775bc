"""Compares every tensor of a Hugging Face folder with the checkpoint's, through the table of names; one tensor at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint_conversion.hf_weights import Readable
from checkpoint_conversion.torch_dist_load import MegatronCheckpoint
from checkpoint_conversion.weight_map import Row, split, walk

#: Of the same number of bytes as a float, to compare bits: NaN is then itself, and 0.0 not -0.0.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor of the folder differs from the checkpoint's."""

    #: in the folder, and of the checkpoint's tensor that holds it
    name: str
    key: str
    num_rows: int
    num_values: int
    shape: torch.Size
    largest: float

    def __str__(self) -> str:
        total = self.shape.numel()
        return (
            f"{self.name} ({self.key}): {self.num_rows} of {self.shape[0]} rows, {self.num_values} of {total} values, by up to "
            f"{self.largest:.1e}"
        )


@dataclass(frozen=True)
class TensorComparison:
    """What a comparison of all tensors has found."""

    num_tensors: int
    #: in the table's order
    differences: list[TensorDifference]
    #: tensors of the two sides in two dtypes, by these
    rounded: dict[tuple[torch.dtype, torch.dtype], int]
    #: rows of the vocabulary beyond the model's, by the checkpoint's key
    padding: dict[str, int]

    def list_lines(self) -> list[str]:
        """List what is to be said of it beside the differences."""
        lines = [
            f"{number} tensors are {_name(theirs)} in the folder and {_name(ours)} in the checkpoint: compared after rounding "
            "one to the other"
            for (theirs, ours), number in self.rounded.items()
        ]
        lines += [
            f"{key}: {rows} rows of padding in the checkpoint, not compared" for key, rows in self.padding.items()
        ]
        same = self.num_tensors - len(self.differences)
        exactly = "" if self.rounded else ", bit for bit"
        return [*lines, f"tensors: {same} of {self.num_tensors} the same{exactly}"]

    def describe_differences(self, most: int = 3) -> str:
        """Describe the first ones and their number."""
        number = len(self.differences)
        first = "; ".join(map(str, self.differences[:most]))
        more = f"; and {number - most} more" if number > most else ""
        return f"{number} of {self.num_tensors} tensors differ: {first}{more}"


def compare_tensors(rows: list[Row], tensors: dict[str, Readable], checkpoint: MegatronCheckpoint) -> TensorComparison:
    """Compare each tensor of the folder with the part of the checkpoint's that it makes up.

    Args:
        rows: the table.
        tensors: of the folder, those of the table (hf_weights.check).
        checkpoint: however it was split over ranks.
    """
    differences, rounded, number = [], {}, 0
    for row, layer in walk(rows):
        parts = split(checkpoint.read(row, layer), [shape[0] for shape in row.parts.values()], row.groups)
        for name, ours in zip(row.part_names(layer), parts):
            theirs = tensors[name].read()
            number += 1
            if theirs.dtype != ours.dtype:
                pair = theirs.dtype, ours.dtype
                rounded[pair] = rounded.get(pair, 0) + 1
            if found := _compare(name, row.key, theirs, ours):
                differences.append(found)
    padding = {row.key: checkpoint.count_padding(row) for row in rows if row.is_vocabulary}
    return TensorComparison(number, differences, rounded, {key: rows for key, rows in padding.items() if rows})


def _compare(name: str, key: str, theirs: Tensor, ours: Tensor) -> TensorDifference | None:
    is_other = _differ(theirs, ours)
    if not is_other.any():
        return None
    largest = (theirs[is_other].double() - ours[is_other].double()).abs().max().item()
    num_rows = is_other.flatten(1).any(1).sum() if is_other.dim() > 1 else is_other.sum()
    return TensorDifference(name, key, int(num_rows), int(is_other.sum()), theirs.shape, largest)


def _differ(theirs: Tensor, ours: Tensor) -> Tensor:
    """Return where the bits differ; of two dtypes, where neither is the other rounded."""
    if theirs.dtype == ours.dtype:
        return _bits(theirs) != _bits(ours)
    return (_bits(theirs.to(ours.dtype)) != _bits(ours)) & (_bits(theirs) != _bits(ours.to(theirs.dtype)))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_BITS[tensor.dtype.itemsize])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
