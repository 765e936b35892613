"""Errors that a user can act on: one clear sentence, never a traceback."""

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches


class UserError(Exception):
    """Something the user can put right; the message names the cause and the way out."""

    exit_code = 2


class UnwritableError(UserError):
    """A folder or a disk does not take a file. What needs it fails, and no other run."""

    def __init__(self, what: str, reason: str, remedy: str = ""):
        super().__init__(f"Cannot {what}: {reason}{remedy}.")
        self.reason = reason


class PlanInterruptedError(Exception):
    """Ctrl-C or another signal; the message says what is kept and how to go on."""

    def __init__(self, message: str, exit_code: int = 130):
        super().__init__(message)
        self.exit_code = exit_code


GOES_ON = "the same command, started again on all machines, goes on from the last checkpoint"


class PlanAbandonedError(Exception):
    """A run failed in some of its processes, and they cannot train together any more.

    Where it failed for one that was lost, nothing is wrong with the run.
    """

    exit_code = 1

    def __init__(self, run: str, reason: str, lost: bool = False):
        remedy = (
            "its processes are out of step, so the plan ends here; leave this run out, or let "
            "'kdbench run --num-processes' start them, and the others go on"
        )
        super().__init__(f"{run} failed: {reason}; {GOES_ON if lost else remedy}.")
        self.reason = reason


def nearest(name: str, choices: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing where no choice is near."""
    wrong, spelt = name.lower(), {choice.lower(): choice for choice in choices}
    near = get_close_matches(wrong, list(spelt), cutoff=0.5)

    def likeness(choice: str) -> tuple[float, int]:
        """Of two with as many letters in common the one that has more in a row."""
        matcher = SequenceMatcher(None, choice, wrong)
        return matcher.ratio(), matcher.find_longest_match().size

    return f" Did you mean '{spelt[max(near, key=likeness)]}'?" if near else ""


def printable(text: str) -> str:
    """Text of others, fit for a terminal: control characters, line breaks and what else cannot be
    seen are written as escapes.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def pluralize(number: int, what: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def unknown(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest that does and all choices."""
    names = sorted(choices)
    listed = ", ".join(names) or "(none)"
    return UserError(f"Unknown {kind} '{name}'.{nearest(name, names)} Choose from: {listed}.")
