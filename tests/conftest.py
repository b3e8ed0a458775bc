"""What all tests share: the environment, the fixtures that several folders use, and the summary at the end."""

from tests.support import environment  # noqa: F401  # isort: skip  # before torch

import collections
import sys
from pathlib import Path

import pytest

from tests.support.demo_data import cached_demo


@pytest.fixture(scope="session")
def demo() -> Path:
    return cached_demo()


@pytest.fixture(scope="session", params=["untied", "tied"])
def models(request, demo, tmp_path_factory):
    """A random Hugging Face model and its converted checkpoint, once with tied and once with untied embeddings."""
    from tests.support.hf_parity import Models

    return Models(tmp_path_factory.mktemp(request.param), demo, tied=request.param == "tied")


@pytest.fixture(scope="session")
def job_data(tmp_path_factory) -> Path:
    """Data sets of captions and of questions, as a job with a task encoder of its own may have them."""
    from tests.support.energon_jobs import write_data

    return write_data(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="session")
def tokenizer(demo):
    """The demo's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo / "tokenizer")


@pytest.fixture(scope="session")
def preloaded_python() -> str:
    """An interpreter for commands, which has loaded what they import."""
    from tests.support import preloaded

    return preloaded.python()


@pytest.fixture(scope="session")
def preloaded_python_without_megatron() -> str:
    """Another, for benchmarks, in which nothing of torch is replaced."""
    from tests.support import preloaded

    return preloaded.python(with_megatron=False)


@pytest.fixture
def preloaded_commands(preloaded_python, monkeypatch) -> None:
    """Commands that the test starts by sys.executable run in that interpreter, and so do those that they start."""
    monkeypatch.setattr(sys, "executable", preloaded_python)


@pytest.fixture
def preloaded_benchmarks(preloaded_python_without_megatron, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", preloaded_python_without_megatron)


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/unit/" in item.path.as_posix() and not item.get_closest_marker("slow"):
            item.add_marker("check")


def pytest_terminal_summary(terminalreporter):
    """How many tests each folder had, and the seconds that they took (of all workers together)."""
    seconds, outcomes = collections.Counter(), collections.defaultdict(collections.Counter)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            folder = "/".join(report.nodeid.split("/")[:2])
            outcomes[folder][outcome] += 1
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                seconds["/".join(report.nodeid.split("/")[:2])] += report.duration
    for folder, counts in sorted(outcomes.items()):
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        terminalreporter.write_line(f"[{folder}] {told}: {seconds[folder]:.0f} s of work")
