"""Makes mistakes on purpose, one at a time, in a copy of the project, and runs the tests that are to notice.

    python -m tests.mutations                 all of them (two minutes)
    python -m tests.mutations payload epoch   those with such a word in their names
    python -m tests.mutations --all-tests     with all of `make test` for each, until its first failure: hours

Prints the test that failed first for each; ends with 1 if a mistake was noticed by none. The copy is removed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutations.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    chosen = [one for one in MUTATIONS if not args.words or any(word in one.name for word in args.words)]
    if not chosen:
        sys.exit(
            f"error: no mutation's name has any of {args.words}; there is: {'; '.join(one.name for one in MUTATIONS)}"
        )
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        files = (
            subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
            .stdout.decode()
            .split("\0")
        )
        for name in filter(None, files):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        for number, mutation in enumerate(chosen, start=1):
            noticed_by = first_failure(copy, mutation, args.all_tests)
            print(f"{number}/{len(chosen)}  {mutation.name}: {noticed_by or 'NOT NOTICED'}", flush=True)
            survivors += [] if noticed_by else [mutation.name]
    if survivors:
        print(f"error: noticed by no test: {'; '.join(survivors)}", file=sys.stderr)
    return 1 if survivors else 0


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="words of the names of mutations")
    parser.add_argument("--all-tests", action="store_true", help="run all tests for each, not those named beside it")
    return parser.parse_args(arguments)


def mutated(text: str, mutation: Mutation) -> str:
    """The file's text with the mistake.

    Raises:
        ValueError: the place is not there, or there are several.
    """
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file}: {mutation.old!r} stands there {text.count(mutation.old)} times, not once")
    return text.replace(mutation.old, mutation.new)


def first_failure(project: Path, mutation: Mutation, all_tests: bool) -> str | None:
    """The test that fails first with the mistake made; None where all pass."""
    file = project / mutation.file
    right = file.read_text()
    file.write_text(mutated(right, mutation))
    try:
        tests = ["tests", "-n", "2", "--dist", "loadfile"] if all_tests else list(mutation.tests)
        command = [sys.executable, "-m", "pytest", "--quiet", "--exitfirst", "-p", "no:cacheprovider", *tests]
        # A cache of its own: the data's makers may be among what is changed. The other megatron-cores are this project's.
        own = {"XDG_CACHE_HOME": str(project.parent / "cache"), "MEGATRON_CORES": str(ROOT / ".venv")}
        result = subprocess.run(command, cwd=project, env=os.environ | own, capture_output=True, text=True)
    finally:
        file.write_text(right)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?$", result.stdout, re.MULTILINE)
    if result.returncode == 1 and failed:
        return failed[1]
    if result.returncode == 0:
        return None
    raise SystemExit(f"error: the tests of {mutation.name!r} could not run:\n{(result.stdout + result.stderr)[-3000:]}")


if __name__ == "__main__":
    sys.exit(main())
