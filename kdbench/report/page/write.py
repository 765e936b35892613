"""Writing of the HTML page and of figures, for `kdbench report --output`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdbench.atomic import atomic_write
from kdbench.errors import pluralize
from kdbench.report.analysis.boards import boards
from kdbench.report.analysis.cost import cost_frame
from kdbench.report.command import read_results_folder
from kdbench.report.figures.captioned import captioned_figures
from kdbench.report.figures.plots import short
from kdbench.report.figures.style import ImageFormat, drawing, save
from kdbench.report.page.render import render_page
from kdbench.results.files import DamagedFile


@dataclass(frozen=True)
class WrittenReport:
    """A message with the location of the files, and the files that are not valid results."""

    text: str
    damaged: list[DamagedFile]


def write_page(
    results: Path,
    suites: Sequence[str] | None,
    against: str,
    output: Path,
    names: Sequence[str] | None = None,
) -> WrittenReport:
    """Write all results as `index.html` to the folder `output`.

    Raises:
        UserError: There are no results, a suite, method or column is unknown, or the file cannot
            be written.
    """
    content = read_results_folder(results, suites, against)
    file = output / "index.html"
    others = content.published, content.damaged
    page = render_page(content.results, against, *others, names, content.siblings)
    with atomic_write(file, durable=False) as stream:
        stream.write(page.encode())
    return WrittenReport(f"Wrote '{file}'.\n", content.damaged)


def write_figures(
    results: Path, suites: Sequence[str] | None, form: ImageFormat, against: str, output: Path
) -> WrittenReport:
    """Write the figures of all boards to the folder `output`.

    Raises:
        UserError: Under the same conditions as `write_page`.
    """
    content = read_results_folder(results, suites, against)
    costs, count = cost_frame([*content.results, *content.siblings]), 0
    with drawing():
        for board in boards(content.results, against):
            for item in captioned_figures(board, costs, against):
                if item.figure is None:
                    continue
                item.figure.suptitle(f"{item.title}: {short(board.title, 60)}", fontsize=10)
                save(item.figure, output / f"{_stem(board.title)}-{item.name}.{form}", form)
                count += 1
    return WrittenReport(f"Wrote {pluralize(count, 'figure')} to '{output}'.\n", content.damaged)


def _stem(title: str) -> str:
    """Return a title as a safe file name."""
    return re.sub(r"[^\w.+=@-]+", "-", title).strip("-.")[:120]
