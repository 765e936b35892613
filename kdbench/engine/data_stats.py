"""What a run learns about its data on the way: waiting for it, and images that are none."""

from collections.abc import Callable, Iterable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from kdbench.data import Evaluation, Training
from kdbench.engine.checkpoint import Progress

MUCH_WAITING = 0.1
"""Share of training, between two accounts, that may be spent waiting for data without a word."""

NAMED = 5
"""Undecodable images that a result names."""


class Intake:
    """Keeps the account in the run's progress."""

    def __init__(
        self,
        training: Training,
        others: Iterable[Evaluation | None],
        accelerator: Accelerator,
        say: Callable[[str], None],
    ):
        self.training = training
        evaluations = [other for other in others if other is not None]
        self.sources: list[Training | Evaluation] = [training, *evaluations]
        self.accelerator = accelerator
        self.say = say
        self._waited = 0.0
        self._said = False

    def account_waiting(self, progress: Progress, seconds: float) -> None:
        """Add it up after so many seconds of training, that of the process that waits most, and
        say once that it is much.
        """
        total = self.training.waited_seconds
        if total is None:
            return
        waited, self._waited = total - self._waited, total
        if self.accelerator.num_processes > 1:  # who waits for data keeps the others waiting
            waited = max(gather_object([waited]))
        progress.waiting_seconds = (progress.waiting_seconds or 0.0) + waited
        if waited > MUCH_WAITING * seconds and not self._said:
            self._said = True
            self.say(
                f"Training waits for data, {waited / seconds:.0%} of the time; "
                "more --workers or a faster disk would help."
            )

    def account_undecodable(self, progress: Progress) -> None:
        """Keep which images could not be decoded, of all processes; each is said once."""
        found = {name: why for source in self.sources for name, why in source.undecodable.items()}
        if self.accelerator.num_processes > 1:
            found = dict(gather_object(list(found.items())))
        new = sorted(found.keys() - progress.undecodable.keys())
        progress.undecodable |= found
        if new:
            self.say(
                f"{len(new)} images cannot be decoded (the first is {new[0]}: {found[new[0]]}); in "
                "training others of their class stand in, in evaluation they count as wrong."
            )


def waiting_share(progress: Progress) -> float | None:
    """Of the training time so far; None where there is nothing to wait for."""
    if progress.waiting_seconds is None or not progress.training_seconds:
        return None
    return progress.waiting_seconds / progress.training_seconds


def undecodable_notes(progress: Progress) -> dict[str, Any]:
    """For the result: how many, and the first few."""
    if not progress.undecodable:
        return {}
    first = [f"{name}: {why}" for name, why in sorted(progress.undecodable.items())[:NAMED]]
    return {"undecodable images": len(progress.undecodable), "undecodable, the first": first}
