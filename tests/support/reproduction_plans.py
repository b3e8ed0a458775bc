"""The plan of a reproduction, and the flags of its runs."""

from pathlib import Path

from reproduction_plan import Place

PLACE = Place(Path("/out"), "scenes", "test")


def flag(run, name: str) -> str:
    return run.command[run.command.index(name) + 1]
