"""The commands and outputs of the README are correct."""

import re
from pathlib import Path

import pytest

import kdbench
from kdbench.report.command import make_report
from kdbench.report.page.write import write_page
from kdbench.scaffold import write_method

ROOT = Path(kdbench.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_the_readme_example_method_trains(kdbench):
    (name,) = re.findall(r"it is this one, `(\w+\.py)`", README)
    (command,) = re.findall(rf"^kdbench (run --methods \./{name}.*)$", README, flags=re.MULTILINE)
    Path(name).write_text(EXAMPLE)
    code, out, _ = kdbench(*command.split(), "--epochs", "2")
    assert code == 0 and "mean_of_logits" in out and "independent" in out


def test_the_readme_example_is_the_file_that_new_writes(tmp_path):
    assert write_method("mean_of_logits", tmp_path, set()).read_text() == EXAMPLE


def test_the_options_that_the_readme_names_exist(kdbench, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    commands = ("run", "report", "data prepare", "status")
    shown = "".join(kdbench(*command.split(), "--help")[1] for command in commands)
    of_users = README.split("## Developing")[0]
    ours = re.sub(r"(torchrun|accelerate launch) [^\n`]*?(-m kdbench|`)", "", of_users)
    named = set(re.findall(r"--[a-z][a-z-]+", ours))
    assert named and named <= set(re.findall(r"--[a-z][a-z-]+", shown))


def test_the_readme_table_is_the_report_of_the_committed_results():
    (table,) = re.findall(r"<!-- table -->\n(.*?)<!-- /table -->", README, flags=re.DOTALL)
    made = make_report(ROOT / "results", ["cifar100-reduced"], "markdown", "baseline")
    assert made.damaged == []
    _, _, below_title = made.text.partition("\n")
    leaderboard, _, _ = below_title.partition("\n### ")  # the table at equal cost is in findings.md
    assert table.strip() == leaderboard.strip()


def test_the_page_in_docs_matches_the_committed_results(tmp_path):
    """Figures are excluded, because they depend on the version of matplotlib."""
    write_page(ROOT / "results", None, "baseline", tmp_path)
    pages = ROOT / "docs" / "leaderboard", tmp_path
    mine, made = ((folder / "index.html").read_text(encoding="utf-8") for folder in pages)
    figures = re.compile(r"<svg.*?</svg>", flags=re.DOTALL)
    assert figures.sub("", mine) == figures.sub("", made)
    assert len(figures.findall(mine)) == len(figures.findall(made)) > 5


def test_the_tests_that_the_reliability_page_names_exist():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    file, functions = "", 0
    for other, function in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", page):
        file = other or file  # of two tests of a file the second is named without it
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not function or re.search(rf"^def {function}\(", source, re.MULTILINE), function
        functions += bool(function)
    assert functions > 40
