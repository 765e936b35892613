"""Commands that show results. What takes long to import is imported by the command."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from kdbench.cli.common import RESULTS, ResultsDir, complain


class ReportFormat(StrEnum):
    """How `kdbench report` prints."""

    terminal = "terminal"
    markdown = "markdown"
    csv = "csv"
    json = "json"


def report(
    suite: Annotated[str | None, Option(help="One suite only.")] = None,
    format_: Annotated[ReportFormat, Option("--format")] = ReportFormat.terminal,
    against: Annotated[str, Option(help="Method that differences refer to.")] = "baseline",
    results_dir: ResultsDir = RESULTS,
) -> None:
    """Print the leaderboards of all results."""
    if print_report(results_dir, suite, format_, against):
        raise typer.Exit(2)


def print_report(results: Path, suite: str | None, form: ReportFormat, against: str) -> bool:
    """Whether a damaged file was left out."""
    from kdbench.report.command import make_report

    made = make_report(results, suite, form.value, against)
    print(made.text, end="")
    for damaged in made.damaged:
        complain(f"'{damaged.file}' is no valid result and was left out: {damaged.reason}.")
    return bool(made.damaged)


def list_() -> None:
    """Print suites, methods and architectures."""
    from kdbench.report.listing import listing

    print(listing())
