"""Commands that show results. What takes long to import is imported by the command."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from typer import Option

from kdbench.cli.common import RESULTS, ResultsDir, complain
from kdbench.errors import UserError

if TYPE_CHECKING:
    from kdbench.report.style import ImageFormat
    from kdbench.report.tables import Format
    from kdbench.store import Damaged

SITE = Path("site")


class ReportFormat(StrEnum):
    """How `kdbench report` prints."""

    terminal = "terminal"
    markdown = "markdown"
    csv = "csv"
    json = "json"
    html = "html"
    png = "png"
    svg = "svg"
    pdf = "pdf"


FILES = (ReportFormat.html, ReportFormat.png, ReportFormat.svg, ReportFormat.pdf)
"""What is written rather than printed."""


def report(
    suite: Annotated[str | None, Option(help="One suite only.")] = None,
    format_: Annotated[ReportFormat, Option("--format")] = ReportFormat.terminal,
    against: Annotated[str, Option(help="Method that differences refer to.")] = "baseline",
    results_dir: ResultsDir = RESULTS,
    output: Annotated[
        Path | None, Option(help="Folder for a page (html) or figures (png, svg, pdf).")
    ] = None,
) -> None:
    """Print the leaderboards of all results, or write them as a page or figures."""
    if format_ in FILES:
        left_out = write_report(results_dir, suite, format_, against, output or SITE)
    elif output:
        raise UserError(f"--output goes with --format {', '.join(FILES)}; {format_} is printed.")
    else:
        left_out = print_report(results_dir, suite, format_, against)
    if left_out:
        raise typer.Exit(2)


def print_report(results: Path, suite: str | None, form: ReportFormat, against: str) -> bool:
    """Whether a damaged file was left out."""
    from kdbench.report.command import make_report

    made = make_report(results, suite, cast("Format", form.value), against)
    print(made.text, end="")
    return _complain_of(made.damaged)


def write_report(
    results: Path, suite: str | None, form: ReportFormat, against: str, output: Path
) -> bool:
    """Whether a damaged file was left out."""
    from kdbench.report.site import write_figures, write_page

    if form is ReportFormat.html:
        written = write_page(results, suite, against, output)
    else:
        image = cast("ImageFormat", form.value)
        written = write_figures(results, suite, image, against, output)
    print(written.text, end="")
    return _complain_of(written.damaged)


def _complain_of(damaged: "list[Damaged]") -> bool:
    for item in damaged:
        complain(f"'{item.file}' is no valid result and was left out: {item.reason}.")
    return bool(damaged)


def list_() -> None:
    """Print suites, methods and architectures."""
    from kdbench.report.listing import listing

    print(listing())
