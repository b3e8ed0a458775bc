"""The tree says what a file may import: imports run one way, and each arrow is drawn here."""

import ast
from pathlib import Path

import pytest

from tests.support.environment import ROOT

# What each folder or file of rsa_megatron imports of the others. An arrow more, or one that nothing needs, is a failure.
# (Any may write files and folders by atomic.py.)
ARROWS = {
    "config": [],
    "batch": [],
    "anyres": [],
    "recipes": [],
    "megatron_on_cpu": [],
    "atomic": [],
    "folder_lock": [],
    "json_lines": [],
    "job_queue": [],
    "job_commands": [],
    "example_files": [],
    "screen": [],
    "ranks": ["screen"],
    "command_line": ["ranks", "screen"],
    "alignment": [],
    "realign": ["alignment"],
    "hooks": ["alignment", "batch", "config"],
    "plugin": ["batch", "config", "hooks"],
    "huggingface": ["alignment", "config"],
    "data": ["anyres", "batch"],
    "models": ["anyres", "data"],
    "planning": ["hooks", "models"],
    "evaluation": ["alignment", "batch", "data", "hooks", "screen"],
    "plots": ["json_lines"],
    "training": [
        "alignment",
        "batch",
        "config",
        "data",
        "evaluation",
        "example_files",
        "folder_lock",
        "hooks",
        "megatron_on_cpu",
        "models",
        "planning",
        "plugin",
        "ranks",
        "recipes",
        "screen",
    ],
    "cli": [
        "alignment",
        "anyres",
        "batch",
        "command_line",
        "data",
        "evaluation",
        "example_files",
        "json_lines",
        "models",
        "planning",
        "plots",
        "ranks",
        "realign",
        "recipes",
        "screen",
        "training",
    ],
    "checkpoint_conversion": ["anyres", "batch", "command_line", "data", "megatron_on_cpu", "models"],
}

# Of other packages, what each may not import. Only training/ imports megatron.training.
FORBIDDEN = {
    **dict.fromkeys(
        [
            "config",
            "anyres",
            "recipes",
            "json_lines",
            "folder_lock",
            "job_queue",
            "job_commands",
            "example_files",
            "screen",
            "command_line",
        ],
        ["torch", "numpy", "megatron", "transformers", "PIL"],
    ),
    **dict.fromkeys(
        ["batch", "alignment", "realign", "planning", "atomic", "ranks"], ["megatron", "transformers", "PIL"]
    ),
    **dict.fromkeys(["hooks", "plugin"], ["megatron.training", "megatron.energon", "transformers", "PIL"]),
    "huggingface": ["megatron", "numpy", "PIL"],
    "models": ["megatron.training", "megatron.energon", "PIL"],
    "data": ["megatron.core", "megatron.training"],
    "evaluation": ["megatron.training", "megatron.energon"],
    "plots": ["torch", "megatron", "transformers", "PIL"],
    "megatron_on_cpu": ["megatron.training", "transformers"],
    "cli": ["megatron"],
    "checkpoint_conversion": ["megatron.training", "megatron.energon"],
    "training": [],
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it goes"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files_of(place: str) -> list[Path]:
    folder = ROOT / place if place == "checkpoint_conversion" else ROOT / "rsa_megatron" / place
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    assert files
    return files


def places_in(path: Path) -> set[str]:
    """Folders and files of rsa_megatron that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("rsa_megatron.")} & ARROWS.keys()


def test_every_folder_and_file_has_its_arrows():
    package = ROOT / "rsa_megatron"
    there = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert there - {"__init__", "__main__"} | {"checkpoint_conversion"} == ARROWS.keys() == FORBIDDEN.keys()


@pytest.mark.parametrize("place", ARROWS)
def test_each_place_imports_what_its_arrows_say(place):
    found = set().union(*(places_in(file) for file in files_of(place))) - {place, "atomic"}
    assert sorted(found) == ARROWS[place]


def test_no_arrow_comes_back():
    """In the order of ARROWS: of two places that need each other one would stand before what it imports."""
    seen = set()
    for place, needs in ARROWS.items():
        assert seen.issuperset(needs), f"{place} stands before what it imports: {set(needs) - seen}"
        seen.add(place)


def test_the_plugin_needs_config_batch_alignment_and_hooks():
    assert not any(
        "rsa_megatron.atomic" in name
        for place in ("plugin", "hooks", "alignment")
        for file in files_of(place)
        for name in imports(file)
    )
    closure, new = set(), {"plugin"}
    while new:
        closure |= new
        new = set().union(*(ARROWS[place] for place in new)) - closure
    assert closure == {"plugin", "config", "batch", "alignment", "hooks"}


@pytest.mark.parametrize("place", FORBIDDEN)
def test_a_place_imports_no_package_that_it_must_do_without(place):
    for file in files_of(place):
        for name in imports(file):
            for forbidden in FORBIDDEN[place]:
                assert not (name + ".").startswith(forbidden + "."), f"{file} imports {name}"


def test_examples_import_the_package_and_of_each_other_their_own_folder():
    examples = ROOT / "examples"
    folders = {file.stem: file.parent for file in examples.rglob("*.py")}
    for file in examples.rglob("*.py"):
        for name in imports(file):
            first = name.partition(".")[0]
            assert first != "checkpoint_conversion", f"{file}: it is a command, python -m checkpoint_conversion"
            assert folders.get(first, file.parent) == file.parent, f"{file} imports {first} of another folder"


def test_no_file_is_named_for_nothing():
    folders = ("rsa_megatron", "examples", "checkpoint_conversion", "tests", "benchmarks")
    names = {path.stem for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert not names & {"utils", "util", "common", "helpers", "misc", "base"}
