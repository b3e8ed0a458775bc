"""What README and docs/ say can be done: commands and their flags are there, links lead somewhere, code runs, flags.md is the code's."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests import flags_page
from tests.support import processes
from tests.support.environment import ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.remove(ROOT / "docs" / "log.md")  # history: commands and files of their day
#: until version 0.3
MOVED = {
    "measure_alignment": "measure",
    "plan_run": "plan",
    "plot_alignment": "plot",
    "prepare_shards": "data",
    "realign": "realign",
}
OF_MEGATRON_LM = ("examples/multimodal/train.py",)
TRAINING = re.compile(r"(examples/pretrain_llava_rsa\.py|-m rsa_megatron\.training)")


def blocks(page: Path) -> list[str]:
    """The indented blocks of a page, without their indent."""
    found = re.findall(r"(?:(?:^|(?<=\n\n))(?: {4}.*\n|\n(?= {4}))+)", page.read_text())
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in found]


def command_lines(page: Path) -> list[str]:
    """Each command of a page in one line, without comments and what it sets before it."""
    lines = []
    for block in blocks(page):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            line = re.sub(r"\s+#.*$", "", line).strip()
            if re.match(r"(?:[A-Z0-9_]+=\S+ )*(rsa-megatron|torchrun|python -m|make |examples/)", line):
                lines.append(line)
    return lines


COMMANDS = [(page.name, line) for page in PAGES for line in command_lines(page)]


@pytest.fixture(scope="module")
def help_of(preloaded_python):
    """The help of a command by its words."""

    @cache
    def help_of(*words: str, flag: str = "--help") -> str:
        result = subprocess.run([preloaded_python, *words, flag], capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return help_of


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 30 and {name for name, _ in COMMANDS} > {
        "README.md",
        "training.md",
        "data.md",
        "measuring.md",
    }


@pytest.mark.parametrize("page, line", COMMANDS, ids=lambda value: value[:60])
def test_a_command_of_the_docs_is_there_with_its_flags(page, line, help_of):
    flags = re.findall(r"(?<![\w-])--[a-z][\w-]*", line)
    if line.startswith("make "):
        (targets,) = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert line.split()[1] in targets.split()
        return
    if TRAINING.search(line) or "run_stages.sh" in line or "slurm/" in line:
        text = (
            help_of("-m", "rsa_megatron.training", flag="--help-megatron")
            + help_of("-m", "torch.distributed.run")
            + "--nodes --wait --dependency"
        )
    elif command := re.search(
        r"(?:^rsa-megatron|-m rsa_megatron) (\w+)(?: (pack|link|show|fill|fit|transform|report|\w+(?=\s+\S+\.jsonl)|[\w-]*megatron[\w-]*|verify))?",
        line,
    ):
        words = [word for word in command.groups() if word]
        text = help_of("-m", "rsa_megatron", *words) + help_of("-m", "torch.distributed.run")
        if "--checkpoint" in flags:  # with it, Megatron's flags follow
            text += help_of("-m", "rsa_megatron.training", flag="--help-megatron")
    elif command := re.search(r"-m checkpoint_conversion ([\w-]+)", line):
        text = help_of("-m", "checkpoint_conversion", command[1])
    elif script := re.search(r"examples/[\w/]+\.py", line):
        assert (ROOT / script[0]).is_file()
        return
    else:
        return
    missing = [flag for flag in flags if flag not in text]
    assert not missing, f"{page}: {line}"


@pytest.mark.parametrize("script, command", MOVED.items())
def test_a_script_that_became_a_command_points_to_it_and_still_runs(script, command, preloaded_python):
    line = [preloaded_python, f"examples/{script}.py", "--help"]
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and f"usage: rsa-megatron {command}" in result.stdout
    assert f"note: examples/{script}.py is now the command rsa-megatron {command}\n" in result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
    for path in re.findall(
        r"`((?:rsa_megatron|examples|checkpoint_conversion|tests|benchmarks|docs|results)/[\w./-]*\w)`", text
    ):
        assert (ROOT / path).exists() or path in OF_MEGATRON_LM, f"{page.name}: {path}"


def test_the_flags_page_is_the_codes():
    (page,) = processes.run(flags_page.page, 1)
    assert flags_page.PAGE.read_text() == page, "python -m tests.flags_page"


def test_the_code_of_the_pages_runs():
    """The plugin's lines on functions of a job, and the check of an installation."""
    code = next(block for block in blocks(ROOT / "README.md") if "RSAPlugin(RSAConfig" in block)
    names = {"model_provider": lambda: None, "forward_step": lambda iterator, model: None}
    exec(code, names)
    import argparse

    assert names["add_extra_arguments"](argparse.ArgumentParser()).parse_args(["--rsa-weight", "0.5"]).rsa_weight == 0.5
    assert names["rsa"].config.weight == 0.5
    (check,) = re.findall(r'python -c "(.*?)"', (ROOT / "README.md").read_text())
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "tensor(1.5000)\n"


def test_the_plugin_pages_code_runs():
    """A selection, and a task encoder of a job with the mixin before it; the lines with + are a diff."""
    code = [
        block for block in blocks(ROOT / "docs" / "plugin.md") if block.startswith(("def select", "from rsa_megatron"))
    ]
    assert len(code) == 2
    from rsa_megatron import RSAConfig, RSAPlugin
    from tests.support.energon_jobs import Job

    names = {"RSAConfig": RSAConfig, "RSAPlugin": RSAPlugin, "TheirTaskEncoder": Job}
    for block in code:
        exec(block, names)
    assert names["rsa"].config.weight == 0.01
    assert names["select"]({"caption_mask": 1, "is_caption_pair": 2}) == (1, 2)
    assert issubclass(names["MyEncoder"], Job)


def test_the_site_builds_without_a_warning(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(build, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "site" / "flags" / "index.html").is_file()


def test_the_front_page_is_one_page():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 160
