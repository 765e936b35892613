"""What `kdbench report --output` does: read, draw, write."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdbench.atomic import atomic_write
from kdbench.errors import pluralize
from kdbench.report.analysis.boards import boards
from kdbench.report.analysis.cost import cost_frame
from kdbench.report.command import gather
from kdbench.report.figures.captioned import drawn
from kdbench.report.figures.plots import short
from kdbench.report.figures.style import ImageFormat, drawing, save
from kdbench.report.page.render import render_page
from kdbench.results.files import DamagedFile


@dataclass(frozen=True)
class Written:
    """Where it is, in a sentence, and the files that are none of the results."""

    text: str
    damaged: list[DamagedFile]


def write_page(
    results: Path,
    suites: Sequence[str] | None,
    against: str,
    output: Path,
    names: Sequence[str] | None = None,
) -> Written:
    """All results as `index.html` in the folder `output`, tables in the named columns.

    Raises:
        UserError: there is no result to show, no such suite, method or column, or `output` takes
            no file.
    """
    found = gather(results, suites, against)
    file = output / "index.html"
    others = found.published, found.damaged
    page = render_page(found.results, against, *others, names, found.siblings)
    with atomic_write(file, durable=False) as stream:
        stream.write(page.encode())
    return Written(f"The page is '{file}'.\n", found.damaged)


def write_figures(
    results: Path, suites: Sequence[str] | None, form: ImageFormat, against: str, output: Path
) -> Written:
    """The figures of all boards as files in the folder `output`.

    Raises:
        UserError: as of `write_page`.
    """
    found = gather(results, suites, against)
    costs, count = cost_frame([*found.results, *found.siblings]), 0
    with drawing():
        for board in boards(found.results, against):
            for item in drawn(board, costs, against):
                if item.figure is None:
                    continue
                item.figure.suptitle(f"{item.title}: {short(board.title, 60)}", fontsize=10)
                save(item.figure, output / f"{_stem(board.title)}-{item.name}.{form}", form)
                count += 1
    return Written(f"{pluralize(count, 'figure')} in '{output}'.\n", found.damaged)


def _stem(title: str) -> str:
    """A file's name: what of a title is safe in one."""
    return re.sub(r"[^\w.+=@-]+", "-", title).strip("-.")[:120]
