"""The `kdbench check` command: runs all contract checks on methods and shows a table."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tabulate import tabulate

from kdbench.check.checks import CHECKS, Check, CheckFailedError, CheckSkippedError
from kdbench.check.subject import Subject
from kdbench.check.two_processes import train_in_two_processes
from kdbench.discovery import MethodEntry
from kdbench.errors import UserError, pluralize

BUILD = "can be built"


@dataclass(frozen=True)
class Outcome:
    """Outcome of one check on one method."""

    method: str
    check: str
    result: str
    """One of passed, FAILED and skipped."""
    reason: str = ""


def check_methods(
    entries: Iterable[MethodEntry], on_check: Callable[[str], None] = lambda label: None
) -> list[Outcome]:
    """Run all checks on all methods, with default options.

    Args:
        entries: methods to check.
        on_check: called with a label before each check.
    """
    subjects = [Subject(entry, entry.options({})) for entry in entries]
    outcomes = [outcome for subject in subjects for outcome in check_method(subject, on_check)]
    broken = {outcome.method for outcome in outcomes if outcome.check == BUILD}
    on_check("all methods in two processes")
    # All methods share two processes, because starting them imports torch twice.
    problems = train_in_two_processes([s for s in subjects if s.entry.name not in broken])
    for method, problem in problems.items():
        result = "passed" if problem is None else "FAILED"
        outcomes.append(Outcome(method, "works in two processes", result, problem or ""))
    return outcomes


def check_method(
    subject: Subject, on_check: Callable[[str], None] = lambda label: None
) -> list[Outcome]:
    """Run all checks that need one process on one method."""
    entry = subject.entry
    try:
        subject.spec.check()
        subject.build()
    except UserError as error:
        return [Outcome(entry.name, BUILD, "FAILED", str(error))]
    except Exception as error:  # a method's constructor may raise anything
        return [Outcome(entry.name, BUILD, "FAILED", entry.locate_error(error))]
    outcomes = []
    for name, check in CHECKS.items():
        on_check(f"{entry.name}: {name}")
        outcomes.append(run_check(subject, name, check))
    return outcomes


def run_check(subject: Subject, name: str, check: Check) -> Outcome:
    """Run one check. Any exception that the method raises counts as a failure."""
    method = subject.entry.name
    try:
        check(subject)
    except CheckSkippedError as skip:
        return Outcome(method, name, "skipped", str(skip))
    except CheckFailedError as failure:
        return Outcome(method, name, "FAILED", str(failure))
    except Exception as error:  # a method may raise anything
        return Outcome(method, name, "FAILED", subject.entry.locate_error(error).split("\n")[0])
    return Outcome(method, name, "passed")


def format_table(outcomes: Iterable[Outcome]) -> str:
    """Return a table with a row per check and a column per method, followed by the reasons.

    Equal reasons of one method are listed once.
    """
    outcomes = list(outcomes)
    methods = list(dict.fromkeys(outcome.method for outcome in outcomes))
    results = {(outcome.method, outcome.check): outcome.result for outcome in outcomes}
    rows = [
        [check, *(results.get((method, check), "-") for method in methods)]
        for check in dict.fromkeys(outcome.check for outcome in outcomes)
    ]
    checks_by_reason: dict[tuple[str, str, str], list[str]] = {}
    for outcome in outcomes:
        if outcome.reason:
            key = outcome.method, outcome.result, outcome.reason
            checks_by_reason.setdefault(key, []).append(outcome.check)
    reasons = [
        f"{method}, {check}: {result}: {reason}"
        + (f" (and in {pluralize(len(others), 'other check')})" if others else "")
        for (method, result, reason), (check, *others) in checks_by_reason.items()
    ]
    return "\n".join([tabulate(rows, headers=["check", *methods]), "", *reasons])
