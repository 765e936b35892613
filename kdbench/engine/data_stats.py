"""Statistics about a run's data: time spent waiting for it, and images that cannot be decoded."""

from collections.abc import Callable, Iterable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from kdbench.data import Evaluation, Training
from kdbench.engine.checkpoint import Progress

WAITING_WARNING_SHARE = 0.1
"""Share of training time spent waiting for data above which the user is warned."""

MAX_LISTED_IMAGES = 5
"""Number of undecodable images that a result lists by name."""


class DataStats:
    """Collects statistics about the data sources of a run and stores them in its progress."""

    def __init__(
        self,
        training: Training,
        others: Iterable[Evaluation | None],
        accelerator: Accelerator,
        on_message: Callable[[str], None],
    ):
        self.training = training
        evaluations = [other for other in others if other is not None]
        self.sources: list[Training | Evaluation] = [training, *evaluations]
        self.accelerator = accelerator
        self.on_message = on_message
        self._waited = 0.0
        self._warned = False

    def record_waiting(self, progress: Progress, seconds: float) -> None:
        """Add the waiting time of the last `seconds` of training, and warn once if it is long.

        With several processes, the longest waiting time counts.
        """
        total = self.training.waited_seconds
        if total is None:
            return
        waited, self._waited = total - self._waited, total
        if self.accelerator.num_processes > 1:  # the slowest process delays all others
            waited = max(gather_object([waited]))
        progress.waiting_seconds = (progress.waiting_seconds or 0.0) + waited
        if waited > WAITING_WARNING_SHARE * seconds and not self._warned:
            self._warned = True
            self.on_message(
                f"Training waits for data {waited / seconds:.0%} of the time; "
                "use more --workers or a faster disk."
            )

    def record_undecodable(self, progress: Progress) -> None:
        """Record the images of all processes that could not be decoded, and report new ones."""
        reasons = {name: why for source in self.sources for name, why in source.undecodable.items()}
        if self.accelerator.num_processes > 1:
            reasons = dict(gather_object(list(reasons.items())))
        new = sorted(reasons.keys() - progress.undecodable.keys())
        progress.undecodable |= reasons
        if new:
            self.on_message(
                f"{len(new)} images cannot be decoded (the first is {new[0]}: {reasons[new[0]]}). "
                "Training replaces them with other images of their class; evaluation counts them "
                "as wrong."
            )


def waiting_share(progress: Progress) -> float | None:
    """Return the share of training time spent waiting for data; None if all data is in memory."""
    if progress.waiting_seconds is None or not progress.training_seconds:
        return None
    return progress.waiting_seconds / progress.training_seconds


def undecodable_notes(progress: Progress) -> dict[str, Any]:
    """Return the notes of a result: the number of undecodable images, and the first few."""
    if not progress.undecodable:
        return {}
    listed = sorted(progress.undecodable.items())[:MAX_LISTED_IMAGES]
    first = [f"{name}: {why}" for name, why in listed]
    return {"undecodable images": len(progress.undecodable), "undecodable, the first": first}
