"""Who watches a run."""

from typing import Protocol

from kdbench.results.schema import Epoch


class Observer(Protocol):
    """Told how a run goes, for a display or a status file."""

    def on_step(self) -> None:
        """A training step was issued."""

    def on_epoch(self, epoch: Epoch, resumed: bool) -> None:
        """An epoch ended, or was found in a checkpoint."""

    def on_resume(self, step: int) -> None:
        """The run goes on after that many steps, counted from its first."""

    def on_message(self, text: str) -> None:
        """Something the user should know."""


class Unobserved:
    """An observer that sees nothing."""

    def on_step(self) -> None: ...

    def on_epoch(self, epoch: Epoch, resumed: bool) -> None: ...

    def on_resume(self, step: int) -> None: ...

    def on_message(self, text: str) -> None: ...


class Observers:
    """Several that watch one run."""

    def __init__(self, *observers: Observer):
        self.observers = observers

    def on_step(self) -> None:
        for observer in self.observers:
            observer.on_step()

    def on_epoch(self, epoch: Epoch, resumed: bool) -> None:
        for observer in self.observers:
            observer.on_epoch(epoch, resumed)

    def on_resume(self, step: int) -> None:
        for observer in self.observers:
            observer.on_resume(step)

    def on_message(self, text: str) -> None:
        for observer in self.observers:
            observer.on_message(text)
