"""The `kdbench report` command: reads results, summarizes and renders them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdbench.errors import UserError, unknown_name_error
from kdbench.paths import built_in_files
from kdbench.report.analysis.cost import ByGroup, equal_cost, equal_cost_tables, select_tables
from kdbench.report.analysis.summary import leaderboard, runs_frame
from kdbench.report.tables.published import Source, read_published
from kdbench.report.tables.render import Format, render
from kdbench.results.files import DamagedFile, load_results
from kdbench.results.schema import Result
from kdbench.suite.load import suite_files


@dataclass(frozen=True)
class Report:
    """A rendered leaderboard, and the files that are not valid results."""

    text: str
    damaged: list[DamagedFile]


@dataclass(frozen=True)
class ResultsFolder:
    """Content of a results folder."""

    results: list[Result]
    siblings: list[Result]
    """Results of the requested suites with other epochs or precision."""
    published: list[Source]
    damaged: list[DamagedFile]
    """Files that are neither valid results nor published numbers."""


def make_report(
    results: Path,
    suites: Sequence[str] | None,
    form: Format,
    against: str,
    names: Sequence[str] | None = None,
    width: int | None = None,
    with_controls: bool = True,
) -> Report:
    """Return the leaderboards of a results folder.

    Args:
        results: the results folder.
        suites: suites to show; None means all.
        form: output format.
        against: method that differences refer to.
        names: columns to show; None means the usual ones.
        width: width of the terminal in characters, if the tables must fit one.
        with_controls: add tables that compare methods with the control at equal training FLOPs.

    Raises:
        UserError: There are no results, or a suite, method or column is unknown.
    """
    if names is not None and form in ("csv", "json"):
        raise UserError(f"--columns applies to tables; --format {form} always has all columns.")
    content = read_results_folder(results, suites, against)
    board = leaderboard(runs_frame(content.results), against)
    text = render(board, form, against, names, content.published, width)
    if with_controls and form not in ("csv", "json"):
        for table in equal_cost_controls(content, against).values():
            if width is not None and form == "terminal":
                table = table.to_fit(width)
            text += f"\n{table.latex() if form == 'latex' else table.text(form == 'markdown')}"
    return Report(text, content.damaged)


def equal_cost_controls(content: ResultsFolder, against: str) -> ByGroup:
    """Return the equal-cost tables of the boards that are shown."""
    tables = equal_cost_tables(equal_cost([*content.results, *content.siblings], against), against)
    return select_tables(tables, content.results)


def _load(
    results: Path, suites: Sequence[str] | None, folders: Iterable[str]
) -> tuple[list[Result], list[Result], list[DamagedFile]]:
    """Return the results, their siblings, and damaged files."""
    if suites is None:
        everything, damaged = load_results(results)
        return everything, [], damaged
    read = {name: load_results(results, name) for name in suites}
    good = [result for name in suites for result in read[name][0]]
    bases = {name.partition("@")[0] for name in suites}
    others = {name for name in folders if name.partition("@")[0] in bases} - set(suites)
    siblings = [result for name in sorted(others) for result in load_results(results, name)[0]]
    return good, siblings, [item for name in suites for item in read[name][1]]


def read_results_folder(results: Path, suites: Sequence[str] | None, against: str) -> ResultsFolder:
    """Read the results of a folder, and the published numbers in it.

    Raises:
        UserError: There are no results, or a suite or the reference method is unknown.
    """
    folders = {folder.parents[1].name for folder in results.glob("*/*/*/")}
    known_suites = folders | set(suite_files())
    for suite in suites or []:
        if suite not in known_suites:
            raise unknown_name_error("suite", suite, known_suites)
    good, siblings, damaged = _load(results, suites, folders)
    if not good:
        of_suite = f" of suite '{', '.join(suites)}'" if suites else ""
        unreadable = f" ({len(damaged)} damaged files)" if damaged else ""
        raise UserError(
            f"No results{of_suite} in '{results}'{unreadable}; train some with `kdbench run`."
        )
    methods = {item.identity.method for item in good} | set(built_in_files())
    if against not in methods:
        raise unknown_name_error("method in --against", against, methods)
    others = list(read_published(results))
    sources = [item for item in others if isinstance(item, Source)]
    damaged += [item for item in others if isinstance(item, DamagedFile)]
    return ResultsFolder(good, siblings, sources, damaged)
