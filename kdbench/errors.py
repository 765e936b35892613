"""Errors that a user can act on. They are shown as one sentence, never as a traceback."""

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches


class UserError(Exception):
    """Error that the user can fix; the message names the cause and the remedy."""

    exit_code = 2


class UnwritableError(UserError):
    """Raised when a file cannot be written. The run that needs it fails; other runs continue.

    Args:
        action: what could not be done, such as "write 'file'".
        reason: why it could not be done.
        remedy: what the user can do, with a leading separator.
    """

    def __init__(self, action: str, reason: str, remedy: str = ""):
        super().__init__(f"Cannot {action}: {reason}{remedy}.")
        self.reason = reason


class PlanInterruptedError(Exception):
    """Raised after Ctrl-C or another signal; the message says how to continue."""

    def __init__(self, message: str, exit_code: int = 130):
        super().__init__(message)
        self.exit_code = exit_code


RESUME_HINT = "start the same command again on all machines to resume from the last checkpoint"


class PlanAbandonedError(Exception):
    """Raised when a run failed in some of its processes, which can no longer train together.

    If a process was lost, the run itself is not at fault.
    """

    exit_code = 1

    def __init__(self, run: str, reason: str, lost: bool = False):
        remedy = (
            "its processes are out of step, so the remaining runs were not started; leave this run "
            "out, or start the processes with 'kdbench run --num-processes'"
        )
        super().__init__(f"{run} failed: {reason}; {RESUME_HINT if lost else remedy}.")
        self.reason = reason


def suggest(name: str, choices: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` with the most similar choice, or an empty string."""
    misspelled, by_lower = name.lower(), {choice.lower(): choice for choice in choices}
    matches = get_close_matches(misspelled, list(by_lower), cutoff=0.5)

    def similarity(choice: str) -> tuple[float, int]:
        matcher = SequenceMatcher(None, choice, misspelled)
        return matcher.ratio(), matcher.find_longest_match().size

    return f" Did you mean '{by_lower[max(matches, key=similarity)]}'?" if matches else ""


def printable(text: str) -> str:
    """Return text with control characters and other invisible characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def pluralize(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 run` or `2 runs`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def unknown_name_error(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """Return the error for an unknown name, with a suggestion and all choices."""
    names = sorted(choices)
    listed = ", ".join(names) or "(none)"
    return UserError(f"Unknown {kind} '{name}'.{suggest(name, names)} Choose from: {listed}.")
