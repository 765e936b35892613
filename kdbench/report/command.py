"""What `kdbench report` does: read, summarise, render."""

from dataclasses import dataclass
from pathlib import Path

from kdbench.errors import UserError, unknown
from kdbench.paths import built_in_files
from kdbench.report.summary import leaderboard, runs_frame
from kdbench.report.tables import Format, render
from kdbench.store import Damaged, Result, read_all
from kdbench.suite import suite_files


@dataclass(frozen=True)
class Report:
    """A rendered leaderboard, and the files that are none of its results."""

    text: str
    damaged: list[Damaged]


def make_report(results: Path, suite: str | None, form: Format, against: str) -> Report:
    """The leaderboards of a results folder.

    Raises:
        UserError: as of `gather`.
    """
    good, damaged = gather(results, suite, against)
    board = leaderboard(runs_frame(good), against)
    return Report(render(board, form, against), damaged)


def gather(results: Path, suite: str | None, against: str) -> tuple[list[Result], list[Damaged]]:
    """The results of a folder, and what in it is none.

    Raises:
        UserError: there is no result to show, or no such suite or method.
    """
    found = list(read_all(results, suite))
    known_suites = {file.name for file in results.glob("*") if file.is_dir()} | set(suite_files())
    if suite is not None and suite not in known_suites:
        raise unknown("suite", suite, known_suites)
    good = [item for item in found if isinstance(item, Result)]
    damaged = [item for item in found if isinstance(item, Damaged)]
    if not good:
        of_suite = f" of suite '{suite}'" if suite else ""
        unreadable = f" ({len(damaged)} damaged files)" if damaged else ""
        raise UserError(
            f"No results{of_suite} in '{results}'{unreadable}; `kdbench run` makes some."
        )
    methods = {item.identity.method for item in good} | set(built_in_files())
    if against not in methods:
        raise unknown("method in --against", against, methods)
    return good, damaged
