"""The table and its one transform, against loops written out here."""

import random

import pytest
import torch

from checkpoint_conversion.weight_map import expected_shapes, join, split, table
from rsa_megatron.models.architectures import ARCHITECTURES


def test_split_is_the_inverse_of_join_for_random_sizes():
    draw = random.Random(0)
    for _ in range(200):
        groups = draw.randint(1, 5)
        others = [draw.randint(1, 4) for _ in range(draw.randint(0, 2))]
        parts = [torch.randn(groups * draw.randint(1, 6), *others) for _ in range(draw.randint(1, 4))]
        parts_again = split(join(parts, groups), [len(part) for part in parts], groups)
        assert len(parts_again) == len(parts) and all(map(torch.equal, parts_again, parts))


def test_query_groups_lie_as_megatron_reads_them():
    """Of each group in turn: the rows of its query heads, then of its key, then of its value."""
    num_heads, num_groups, head, hidden = 6, 2, 5, 7
    q, k, v = (torch.randn(heads * head, hidden) for heads in (num_heads, num_groups, num_groups))
    expected = []
    for group in range(num_groups):
        for query_head in range(group * num_heads // num_groups, (group + 1) * num_heads // num_groups):
            expected += [q[query_head * head + row] for row in range(head)]
        expected += [k[group * head + row] for row in range(head)]
        expected += [v[group * head + row] for row in range(head)]
    assert torch.equal(join([q, k, v], num_groups), torch.stack(expected))
    assert not torch.equal(join([q, k, v], 1), torch.stack(expected)), "without groups the rows lie elsewhere"


def test_one_part_is_copied_and_gate_lies_before_up():
    gate, up = torch.randn(2, 3, 4)
    assert torch.equal(join([gate], 1), gate)
    assert torch.equal(join([gate, up], 1), torch.cat([gate, up]))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_table_has_every_parameter_of_an_architecture(name):
    architecture = ARCHITECTURES[name]
    shapes = expected_shapes(table(architecture))
    unused_norm = 2 * architecture.vision.hidden_size  # counted nowhere: kept for the round trip, never used
    pieces = [count for part in architecture.parameter_counts().values() for count in part.values()]
    expected = sum(pieces) + unused_norm
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == expected


def test_keys_and_names_are_there_once():
    rows = table(ARCHITECTURES["llava-ov-7b"])
    assert len({row.key for row in rows}) == len(rows)
    assert len(expected_shapes(rows)) == sum(len(row.parts) * max(1, row.num_layers) for row in rows)
