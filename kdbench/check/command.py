"""What `kdbench check` does: all checks on all methods, as a table."""

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
    """Of one check on one method."""

    method: str
    check: str
    result: str
    """passed, FAILED or skipped."""
    reason: str = ""


def check_methods(
    entries: Iterable[MethodEntry], on_check: Callable[[str], None] = lambda label: None
) -> list[Outcome]:
    """All checks on all methods, each with its default options."""
    subjects = [Subject(entry, entry.options({})) for entry in entries]
    outcomes = [outcome for subject in subjects for outcome in check_method(subject, on_check)]
    broken = {outcome.method for outcome in outcomes if outcome.check == BUILD}
    on_check("all methods in two processes")
    # Together, since every start of two processes imports torch twice.
    complaints = train_in_two_processes([s for s in subjects if s.entry.name not in broken])
    for method, complaint in complaints.items():
        result = "passed" if complaint is None else "FAILED"
        outcomes.append(Outcome(method, "works in two processes", result, complaint or ""))
    return outcomes


def check_method(
    subject: Subject, on_check: Callable[[str], None] = lambda label: None
) -> list[Outcome]:
    """The checks that one process can do, on one method."""
    entry = subject.entry
    try:
        subject.spec.check()
        subject.build()
    except UserError as error:
        return [_every(entry, "FAILED", str(error))]
    except Exception as error:  # a method's constructor may raise anything
        return [_every(entry, "FAILED", entry.blame(error))]
    outcomes = []
    for name, check in CHECKS.items():
        on_check(f"{entry.name}: {name}")
        outcomes.append(run_check(subject, name, check))
    return outcomes


def run_check(subject: Subject, name: str, check: Check) -> Outcome:
    """One check; whatever the method raises in it is its failure."""
    method = subject.entry.name
    try:
        check(subject)
    except CheckSkippedError as skip:
        return Outcome(method, name, "skipped", str(skip))
    except CheckFailedError as failure:
        return Outcome(method, name, "FAILED", str(failure))
    except Exception as error:  # a method may raise anything
        return Outcome(method, name, "FAILED", subject.entry.blame(error).split("\n")[0])
    return Outcome(method, name, "passed")


def table(outcomes: Iterable[Outcome]) -> str:
    """A row per check, a column per method, then the reasons, each once for a method."""
    outcomes = list(outcomes)
    methods = list(dict.fromkeys(outcome.method for outcome in outcomes))
    found = {(outcome.method, outcome.check): outcome.result for outcome in outcomes}
    rows = [
        [check, *(found.get((method, check), "-") for method in methods)]
        for check in dict.fromkeys(outcome.check for outcome in outcomes)
    ]
    alike: dict[tuple[str, str, str], list[str]] = {}
    for outcome in outcomes:
        if outcome.reason:
            key = outcome.method, outcome.result, outcome.reason
            alike.setdefault(key, []).append(outcome.check)
    reasons = [
        f"{method}, {check}: {result}: {reason}"
        + (f" (and in {pluralize(len(others), 'other check')})" if others else "")
        for (method, result, reason), (check, *others) in alike.items()
    ]
    return "\n".join([tabulate(rows, headers=["check", *methods]), "", *reasons])


def _every(entry: MethodEntry, result: str, reason: str) -> Outcome:
    return Outcome(entry.name, BUILD, result, reason)
