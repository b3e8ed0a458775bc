"""What tests/mutations changes is there to be changed: the script, which `make test` leaves out, does not go stale."""

import ast

import pytest

from tests.mutations.__main__ import mutated
from tests.mutations.mutations import MUTATIONS
from tests.support.environment import ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_changes_one_place_and_leaves_python(mutation):
    right = (ROOT / mutation.file).read_text()
    wrong = mutated(right, mutation)
    assert ast.dump(ast.parse(wrong)) != ast.dump(ast.parse(right))
    assert all((ROOT / file).is_file() for file in mutation.tests)
