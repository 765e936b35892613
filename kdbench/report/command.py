"""What `kdbench report` does: read, summarise, render."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdbench.errors import UserError, unknown
from kdbench.paths import built_in_files
from kdbench.report.analysis.cost import ByGroup, equal_cost, equal_cost_tables, groups_of
from kdbench.report.analysis.summary import leaderboard, runs_frame
from kdbench.report.tables.published import Source, read_published
from kdbench.report.tables.render import Format, render
from kdbench.results.files import DamagedFile, load_results
from kdbench.results.schema import Result
from kdbench.suite.load import suite_files


@dataclass(frozen=True)
class Report:
    """A rendered leaderboard, and the files that are none of its results."""

    text: str
    damaged: list[DamagedFile]


@dataclass(frozen=True)
class Gathered:
    """What a results folder holds."""

    results: list[Result]
    siblings: list[Result]
    """Of the same suites under other epochs or in another precision, where none was asked for."""
    published: list[Source]
    damaged: list[DamagedFile]
    """Files that are neither."""


def make_report(
    results: Path,
    suites: Sequence[str] | None,
    form: Format,
    against: str,
    names: Sequence[str] | None = None,
    width: int | None = None,
    with_controls: bool = True,
) -> Report:
    """The leaderboards of a results folder, in the named columns, to fit a terminal's `width`.

    With `suites`, of these only. Below them stand, `with_controls`, those that were trained for as
    many FLOPs, where there are any.

    Raises:
        UserError: there is no result to show, or no such suite, method or column.
    """
    if names is not None and form in ("csv", "json"):
        raise UserError(f"--columns is for tables; --format {form} always holds all of them.")
    found = gather(results, suites, against)
    board = leaderboard(runs_frame(found.results), against)
    text = render(board, form, against, names, found.published, width)
    if with_controls and form not in ("csv", "json"):
        for table in controls(found, against).values():
            if width is not None and form == "terminal":
                table = table.to_fit(width)
            text += f"\n{table.latex() if form == 'latex' else table.text(form == 'markdown')}"
    return Report(text, found.damaged)


def controls(found: Gathered, against: str) -> ByGroup:
    """Tables at equal cost, of the boards that are shown."""
    tables = equal_cost_tables(equal_cost([*found.results, *found.siblings], against), against)
    return {group: tables[group] for group in groups_of(found.results) if group in tables}


def _read(
    results: Path, suites: Sequence[str] | None, folders: Iterable[str]
) -> tuple[list[Result], list[Result], list[DamagedFile]]:
    """Results, their siblings, and damaged files."""
    if suites is None:
        everything, damaged = load_results(results)
        return everything, [], damaged
    read = {name: load_results(results, name) for name in suites}
    good = [result for name in suites for result in read[name][0]]
    bases = {name.partition("@")[0] for name in suites}
    others = {name for name in folders if name.partition("@")[0] in bases} - set(suites)
    siblings = [result for name in sorted(others) for result in load_results(results, name)[0]]
    return good, siblings, [item for name in suites for item in read[name][1]]


def gather(results: Path, suites: Sequence[str] | None, against: str) -> Gathered:
    """The results of a folder, and what in it is none.

    Raises:
        UserError: there is no result to show, or no such suite or method.
    """
    folders = {folder.parents[1].name for folder in results.glob("*/*/*/")}
    known_suites = folders | set(suite_files())
    for suite in suites or []:
        if suite not in known_suites:
            raise unknown("suite", suite, known_suites)
    good, siblings, damaged = _read(results, suites, folders)
    if not good:
        of_suite = f" of suite '{', '.join(suites)}'" if suites else ""
        unreadable = f" ({len(damaged)} damaged files)" if damaged else ""
        raise UserError(
            f"No results{of_suite} in '{results}'{unreadable}; `kdbench run` makes some."
        )
    methods = {item.identity.method for item in good} | set(built_in_files())
    if against not in methods:
        raise unknown("method in --against", against, methods)
    others = list(read_published(results))
    sources = [item for item in others if isinstance(item, Source)]
    damaged += [item for item in others if isinstance(item, DamagedFile)]
    return Gathered(good, siblings, sources, damaged)
