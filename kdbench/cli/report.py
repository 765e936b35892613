"""The `kdbench report` and `kdbench list` commands. Slow imports happen inside the commands."""

import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from typer import Option

from kdbench.cli.common import RESULTS, ResultsDir, report_damaged, split_names
from kdbench.errors import UserError

if TYPE_CHECKING:
    from kdbench.report.figures.style import ImageFormat
    from kdbench.report.tables.render import Format

SITE = Path("site")


class ReportFormat(StrEnum):
    """Output format of `kdbench report`."""

    terminal = "terminal"
    markdown = "markdown"
    latex = "latex"
    csv = "csv"
    json = "json"
    html = "html"
    png = "png"
    svg = "svg"
    pdf = "pdf"


FILES = (ReportFormat.html, ReportFormat.png, ReportFormat.svg, ReportFormat.pdf)
"""Formats that are written to files instead of being printed."""


def report(
    suite: Annotated[str | None, Option(help="Show one suite only.")] = None,
    format_: Annotated[
        ReportFormat, Option("--format", help="Output format.")
    ] = ReportFormat.terminal,
    against: Annotated[str, Option(help="Method that differences refer to.")] = "baseline",
    columns: Annotated[
        str | None,
        Option(help="Comma-separated list of columns, or 'all'. An unknown name lists them."),
    ] = None,
    results_dir: ResultsDir = RESULTS,
    output: Annotated[
        Path | None, Option(help="Folder for a page (html) or figures (png, svg, pdf).")
    ] = None,
) -> None:
    """Print the leaderboards of all results, or write them as a page or figures."""
    names = None if columns is None else split_names(columns)
    suites = None if suite is None else [suite]
    if format_ in FILES:
        left_out = _write_report(results_dir, suites, format_, against, output or SITE, names)
    elif output:
        raise UserError(f"--output needs --format {', '.join(FILES)}; {format_} is printed.")
    else:
        left_out = print_report(results_dir, suites, format_, against, names)
    if left_out:
        raise typer.Exit(2)


def print_report(
    results: Path,
    suites: list[str] | None,
    form: ReportFormat,
    against: str,
    columns: list[str] | None = None,
    with_controls: bool = True,
) -> bool:
    """Print a report; return True if a damaged file was left out.

    Tables are fitted to the terminal; piped output has all columns.
    """
    from kdbench.report.command import make_report

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    text = cast("Format", form.value)
    result = make_report(results, suites, text, against, columns, width, with_controls)
    print(result.text, end="")
    return report_damaged(result.damaged)


def _write_report(
    results: Path,
    suites: list[str] | None,
    form: ReportFormat,
    against: str,
    output: Path,
    columns: list[str] | None,
) -> bool:
    """Write a page or figures; return True if a damaged file was left out."""
    from kdbench.report.page.write import write_figures, write_page

    if form is ReportFormat.html:
        written = write_page(results, suites, against, output, columns)
    elif columns is None:
        image = cast("ImageFormat", form.value)
        written = write_figures(results, suites, image, against, output)
    else:
        raise UserError(f"--columns applies to tables; --format {form} has none.")
    print(written.text, end="")
    return report_damaged(written.damaged)


def list_() -> None:
    """List suites, methods and architectures."""
    from kdbench.report.tables.listing import listing

    print(listing())
