"""Commands that show results. What takes long to import is imported by the command."""

import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from kdbench.cli.common import RESULTS, ResultsDir, complain, names_of


class ReportFormat(StrEnum):
    """How `kdbench report` prints."""

    terminal = "terminal"
    markdown = "markdown"
    latex = "latex"
    csv = "csv"
    json = "json"


def report(
    suite: Annotated[str | None, Option(help="One suite only.")] = None,
    format_: Annotated[ReportFormat, Option("--format")] = ReportFormat.terminal,
    against: Annotated[str, Option(help="Method that differences refer to.")] = "baseline",
    columns: Annotated[
        str | None, Option(help="Comma list of columns, or 'all'; a wrong name lists them.")
    ] = None,
    results_dir: ResultsDir = RESULTS,
) -> None:
    """Print the leaderboards of all results."""
    names = None if columns is None else names_of(columns)
    if print_report(results_dir, suite, format_, against, names):
        raise typer.Exit(2)


def print_report(
    results: Path,
    suite: str | None,
    form: ReportFormat,
    against: str,
    columns: list[str] | None = None,
) -> bool:
    """Whether a damaged file was left out. A table fits the terminal, and is whole in a pipe."""
    from kdbench.report.command import make_report
    from kdbench.validation import sentence

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    made = make_report(results, suite, form.value, against, columns, width)
    print(made.text, end="")
    for damaged in made.damaged:
        what = f"'{damaged.file}' is not valid and was left out: {damaged.reason}"
        complain(sentence([what]))
    return bool(made.damaged)


def list_() -> None:
    """Print suites, methods and architectures."""
    from kdbench.report.listing import listing

    print(listing())
