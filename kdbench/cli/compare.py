"""The `kdbench compare` command. Slow imports happen inside the command."""

from typing import Annotated

import typer
from typer import Argument, Option

from kdbench.cli.common import RESULTS, ResultsDir, TableFormat, report_damaged


def compare(
    a: Annotated[
        str, Argument(help="Results folder, method, or git revision of the results folder.")
    ],
    b: Annotated[str, Argument(help="Another one of the same kind.")],
    format_: Annotated[
        TableFormat, Option("--format", help="Output format.")
    ] = TableFormat.terminal,
    results_dir: ResultsDir = RESULTS,
) -> None:
    """Compare B with A, seed by seed, with intervals and p values."""
    from kdbench.report.analysis import compare as comparison

    result = comparison.compare(a, b, results_dir)
    print(comparison.render(result, format_.value), end="")
    if report_damaged(result.damaged):
        raise typer.Exit(2)
