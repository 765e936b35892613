"""`kdbench compare`. What takes long to import is imported by the command."""

from typing import Annotated

import typer
from typer import Argument, Option

from kdbench.cli.common import RESULTS, ResultsDir, TableFormat, report_damaged


def compare(
    a: Annotated[str, Argument(help="A results folder, a method, or a git revision of results.")],
    b: Annotated[str, Argument(help="Another of the same kind.")],
    format_: Annotated[TableFormat, Option("--format")] = TableFormat.terminal,
    results_dir: ResultsDir = RESULTS,
) -> None:
    """Print how B differs from A, seed by seed, and whether it could be chance."""
    from kdbench.report.analysis import compare as comparison

    found = comparison.compare(a, b, results_dir)
    print(comparison.render(found, format_.value), end="")
    if report_damaged(found.damaged):
        raise typer.Exit(2)
