"""The commands and outputs of the README are correct."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kdbench
from kdbench.report.command import make_report
from kdbench.report.page.write import write_page
from kdbench.scaffold import write_method

README = Path(kdbench.__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def text() -> str:
    return README.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_readme_example_method_trains(text, tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (name,) = re.findall(r"it is this one, `(\w+\.py)`", text)
    (command,) = re.findall(rf"^kdbench (run --methods \./{name}.*)$", text, flags=re.MULTILINE)
    (tmp_path / name).write_text(example)
    ran = subprocess.run(
        [sys.executable, "-m", "kdbench", *command.split(), "--epochs", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "mean_of_logits" in ran.stdout and "independent" in ran.stdout


def test_the_readme_example_is_the_file_that_new_writes(text, tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert write_method("mean_of_logits", tmp_path, set()).read_text() == example


def test_the_options_that_the_readme_names_exist(text):
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "PATH": ""}
    shown = "".join(
        subprocess.run(
            [sys.executable, "-m", "kdbench", *command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        ).stdout
        for command in (["run"], ["report"], ["data", "prepare"], ["status"])
    )
    of_users = text.split("## Developing")[0]
    ours = re.sub(r"(torchrun|accelerate launch) [^\n`]*?(-m kdbench|`)", "", of_users)
    named = set(re.findall(r"--[a-z][a-z-]+", ours))
    assert named
    assert named <= set(re.findall(r"--[a-z][a-z-]+", shown))


def test_the_readme_table_is_the_report_of_the_committed_results(text):
    (table,) = re.findall(r"<!-- table -->\n(.*?)<!-- /table -->", text, flags=re.DOTALL)
    results = README.parent / "results"
    made = make_report(results, ["cifar100-reduced"], "markdown", "baseline")
    assert made.damaged == []
    _, _, below_title = made.text.partition("\n")
    leaderboard, _, _ = below_title.partition("\n### ")  # the table at equal cost is in findings.md
    assert table.strip() == leaderboard.strip()


def test_the_page_in_docs_matches_the_committed_results(tmp_path):
    """Figures are excluded, because they depend on the version of matplotlib."""
    write_page(README.parent / "results", None, "baseline", tmp_path)
    pages = README.parent / "docs" / "leaderboard", tmp_path
    mine, made = ((folder / "index.html").read_text(encoding="utf-8") for folder in pages)
    figures = re.compile(r"<svg.*?</svg>", flags=re.DOTALL)
    assert figures.sub("", mine) == figures.sub("", made)
    assert len(figures.findall(mine)) == len(figures.findall(made)) > 5


def test_the_tests_that_the_reliability_page_names_exist():
    root = Path(kdbench.__file__).parents[1]
    page = (root / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", page)
    file, functions = "", 0
    for other, function in named:
        file = other or file  # of two tests of a file the second is named without it
        assert (root / "tests" / file).is_file(), file
        if function:
            source = (root / "tests" / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {function}\(", source, re.MULTILINE), function
            functions += 1
    assert functions > 40
